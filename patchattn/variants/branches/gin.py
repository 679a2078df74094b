"""Sparse-GIN: a small network over the graph of large attention weights. Graph-aware attention, arXiv 2501.02393."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from patchattn_kernels.rows import full_precision

from ...core import ranks
from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.selection import require_causal, require_self
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, Variant, VariantConfig, VariantInfo
from ...softmax.rows import in_chunks, row_weights, rows_at_once, some_rows


@dataclass(frozen=True, kw_only=True)
class GINConfig(VariantConfig):
    """Settings of Sparse-GIN; every field is described by `patchattn info gin`."""

    graph: Literal["seen", "self"] = option(
        "seen",
        help="Which edges there are: from every key that a token sees, or only each token's own, which is all that the "
        "causal filter of the released code leaves.",
        source="paper; the released code has self",
        choices=("seen", "self"),
    )
    width: int = option(
        155, help="Features of a token in the graph.", source="released configuration", unit="channels", minimum=1
    )
    centre: float = option(
        0.1, help="Weights, summed over heads and cut at 1, above which edges grow strong.", source="released code"
    )
    slope: float = option(
        10.0, help="How fast, around the centre: an edge is a sigmoid.", source="released code", minimum=0.0
    )
    smallest: float = option(
        0.6, help="Weaker edges are left out.", source="released configuration", minimum=0.0, maximum=1.0
    )


class GIN(Variant):
    """Attention to which `V_h mlp(e u_i + sum_j B_ij u_j)` is added, u a projection of the layer's input.

    `B = sigmoid(slope (min(sum_h a_h, 1) - centre))`, a the attention weights, and 0 where that is below `smallest`. V
    is zero at the start.
    """

    config_class = GINConfig
    config: GINConfig

    def __init__(self, config: GINConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads, dim, inputs = (site.require(fact, by="gin") for fact in ("query_heads", "head_dim", "input_size"))
        width = config.width
        self.inward = nn.Parameter(torch.randn(width, inputs) * inputs**-0.5)
        self.own = nn.Parameter(torch.zeros(1))
        self.first = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.second = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.outward = nn.Parameter(torch.zeros(heads, dim, width))

    @classmethod
    def fit(
        cls, config: GINConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[GINConfig, Sequence[AttentionSite]]:
        """Leave cross attention out, whose keys are no nodes of the same graph."""
        if config.graph == "self":
            because = "graph='self' is what a causal filter leaves"
            return config, require_causal(model, sites, by="gin", because=because)
        return config, require_self(sites, by="gin", because="keys of another sequence are no nodes of its graph")

    @property
    def needs_context(self) -> bool:
        return True

    @property
    def keeps_state(self) -> bool:
        return True

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        output, weights = inner(call)
        if output.shape[-1] != self.outward.shape[1]:
            raise NotImplementedError(
                f"gin gives every head of {self.site.name} {self.outward.shape[1]} channels, and its values are "
                f"{output.shape[-1]} wide."
            )
        nodes = F.linear(call.context.layer_input().to(self.inward.dtype), self.inward)
        known = full_precision(call.context.remembered("gin", {"nodes": nodes.mT})["nodes"])
        if known.shape[-1] != call.key.shape[2]:
            raise NotImplementedError(
                f"gin takes keys for the tokens of their layer, and {self.site.name} attends to {call.key.shape[2]} "
                f"keys of {known.shape[-1]} tokens. Leave it out with modules=... or layers=..."
            )

        def of(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            edges = self._edges(some_rows(call, start, end))
            return edges @ known.mT, edges[:, None]

        sums, _ = in_chunks(call, call.query.shape[2], rows_at_once(call, copies=2), of)
        found = (sums + self.own * nodes).to(self.first.dtype)
        hidden = F.layer_norm(F.linear(found, self.first), found.shape[-1:])
        found = found + F.linear(hidden.relu(), self.second)
        return output + torch.einsum("btf,hdf->bthd", found, self.outward).to(output.dtype), weights

    def _edges(self, call: AttentionCall) -> torch.Tensor:
        """`(B, R, Tk)` how strongly each key that a row sees gives to it."""
        config = self.config
        summed = row_weights(call, lambda logits, _: logits.softmax(-1)).sum(1).clamp(max=1.0)
        edges = (config.slope * (summed - config.centre)).sigmoid()
        is_edge = (edges >= config.smallest) & call.mask.seen().any(1)
        if config.graph == "self":
            is_edge = is_edge & (
                ranks.own(call.mask)[..., None] == torch.arange(call.key.shape[2], device=edges.device)
            )
        return edges * is_edge


register_variant(
    VariantInfo(
        name="gin",
        variant=GIN,
        title="Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers",
        arxiv_id="2501.02393",
        year=2025,
        code="https://github.com/lamm-mit/Graph-Aware-Transformers",
        summary="A small network over the graph of large attention weights adds to what heads give.",
        extra_parameters="155 values per channel of the layer's input and of its heads, two matrices of 155 squared",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"cross", "sinks"},
        presets={"released": {"graph": "self"}},
        examples=({"width": 8}, {"width": 8, "graph": "self"}),
    )
)
