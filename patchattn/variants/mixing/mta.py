"""Multi-Token Attention: logits and weights of neighbouring queries, keys and heads are mixed. arXiv 2504.00927."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core.call import AttentionCall
from ...core.chain import window_of
from ...core.registry import register_variant
from ...core.selection import require_causal
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantConfig, VariantInfo
from ...softmax.earlier_rows import EarlierRowsVariant
from ...softmax.rows import HIDDEN


@dataclass(frozen=True, kw_only=True)
class MTAConfig(VariantConfig):
    """Settings of Multi-Token Attention; every field is described by `patchattn info mta`."""

    queries: int = option(6, help="Rows that a kernel reads, the last of which is its own.", source="paper", minimum=1)
    keys: int = option(11, help="Keys that a kernel reads, an odd number, around its own.", source="paper", minimum=1)
    logits: bool = option(True, help="Convolve logits, before the softmax.", source="paper")
    weights: bool = option(True, help="Convolve weights, after the softmax.", source="released configuration")
    heads_of_logits: bool = option(
        True, help="Mix logits over heads, behind their convolution.", source="released configuration"
    )
    heads_of_weights: bool = option(True, help="Mix weights over heads, behind their convolution.", source="paper")
    group: int | None = option(
        None, help="Mix weights within groups of so many heads; None: all.", source="released configuration", minimum=1
    )
    gate: bool = option(
        True,
        help="Multiply what a head gives by twice a sigmoid of a learned function of it, the same for all heads.",
        source="released configuration, without the factor",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys % 2 == 0:
            raise ValueError(f"keys must be odd, as many on either side of a kernel's own, got {self.keys}.")


class MTA(EarlierRowsVariant):
    """Attention with weights `B (w * softmax(A (v * s)))`, v and w 2-D kernels per head, A and B matrices over heads.

    All start at the identity. A kernel reads of its row and of rows before it the keys that both see.
    """

    config_class = MTAConfig
    config: MTAConfig

    def __init__(self, config: MTAConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads, width = (site.require(fact, by="Multi-Token Attention") for fact in ("query_heads", "head_dim"))
        group = heads if config.group is None else config.group
        if config.heads_of_weights and heads % group:
            raise ValueError(f"group={group} does not divide the {heads} query heads of {site.name}.")
        self.kernel_of_logits = _kernel(heads, config) if config.logits else None
        self.kernel_of_weights = _kernel(heads, config) if config.weights else None
        self.heads_of_logits = _matrices(1, heads) if config.heads_of_logits else None
        self.heads_of_weights = _matrices(heads // group, group) if config.heads_of_weights else None
        self.gate_weight = nn.Parameter(torch.zeros(width)) if config.gate else None
        self.gate_bias = nn.Parameter(torch.zeros(1)) if config.gate else None

    @classmethod
    def fit(
        cls, config: MTAConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[MTAConfig, Sequence[AttentionSite]]:
        """Leave out what is not causal self-attention, and, if weights are convolved, layers with a sliding window.

        The softmax of a row before needs keys there that the kv cache has let go of.
        """
        because = "a row reads the rows of tokens before it"
        causal = require_causal(model, sites, by="Multi-Token Attention", because=because)
        fitting = [site for site in causal if not config.weights or window_of(model.get_submodule(site.name)) is None]
        if not fitting:
            raise NotImplementedError(
                "Multi-Token Attention with weights=True leaves out layers with a sliding window, whose kv cache lets "
                "go of keys that rows before have weights of, and no other one is among the chosen attention modules: "
                "set weights=False."
            )
        return config, fitting

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return dict.fromkeys(("logits", "weights", "heads_of_logits", "heads_of_weights", "gate"), False)

    @property
    def is_identity(self) -> bool:
        return not any(getattr(self.config, name) for name in self.neutral_config())

    @property
    def reach(self) -> int:
        return (self.config.queries - 1) * (self.config.logits + self.config.weights)

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        output, weights = super().attend(call, inner)
        if self.gate_weight is None or self.gate_bias is None:
            return output, weights
        if output.shape[-1] != len(self.gate_weight):
            raise NotImplementedError(
                f"Multi-Token Attention gates {len(self.gate_weight)} channels of a head of {self.site.name}, whose "
                f"values are {output.shape[-1]} wide: set gate=False."
            )
        given = output.to(torch.promote_types(output.dtype, torch.float32))
        opening = given @ self.gate_weight.to(given.dtype) + self.gate_bias.to(given.dtype)
        return output * (2 * opening.sigmoid())[..., None].to(output.dtype), weights

    def weights(self, logits: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        if self.kernel_of_logits is not None:
            logits = _convolved(self.kernel_of_logits, logits, visible)
        if self.heads_of_logits is not None:
            logits = _mixed(self.heads_of_logits, logits.where(visible, 0.0))
        weights = logits.where(visible, HIDDEN).softmax(-1)
        if self.kernel_of_weights is not None:
            weights = _convolved(self.kernel_of_weights, weights, visible)
        return weights if self.heads_of_weights is None else _mixed(self.heads_of_weights, weights * visible)


def _kernel(heads: int, config: MTAConfig) -> nn.Parameter:
    """`(H, queries, keys)` that gives what it reads: 1 at its own row and key."""
    kernel = torch.zeros(heads, config.queries, config.keys)
    kernel[:, -1, config.keys // 2] = 1
    return nn.Parameter(kernel)


def _matrices(count: int, size: int) -> nn.Parameter:
    """`(G, n, n)` identities."""
    return nn.Parameter(torch.eye(size).repeat(count, 1, 1))


def _convolved(kernel: torch.Tensor, rows: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """`(B, H, R, Tk)` of rows and the keys they see; what a row does not see is read as 0, also of rows before it."""
    queries, keys = kernel.shape[1:]
    count, found = rows.shape[2], torch.zeros_like(rows)
    rows, kernel = rows.where(visible, 0.0), kernel.to(rows.dtype)
    for back in range(min(queries, count)):
        earlier = F.pad(rows, (0, 0, back, 0))[:, :, :count] * visible
        of_heads = kernel[:, queries - 1 - back, None, None]
        found = found + F.conv2d(earlier, of_heads, padding=(0, keys // 2), groups=len(kernel))
    return found


def _mixed(matrices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`(B, H, R, Tk)`: head i of a group becomes the sum over its heads j of `matrix[i, j]` times head j."""
    grouped = rows.unflatten(1, matrices.shape[:2])
    return torch.einsum("gij,bgjrk->bgirk", matrices.to(rows.dtype), grouped).flatten(1, 2)


register_variant(
    VariantInfo(
        name="mta",
        variant=MTA,
        title="Multi-Token Attention",
        arxiv_id="2504.00927",
        year=2025,
        code="https://github.com/facebookresearch/RAM/tree/main/projects/mta",
        summary="Attention depends on several queries and keys side by side, and on all heads.",
        extra_parameters="132 values per query head, two per pair of them, and a head's width and one, per layer",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "sinks"},
        examples=({"queries": 3, "keys": 3}, {"queries": 2, "keys": 5, "weights": False, "group": 2}),
    )
)
