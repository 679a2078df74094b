"""FoX, the Forgetting Transformer: every token makes all heads forget some of what came before. arXiv 2503.02130."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchattn_kernels.rows import full_precision

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.selection import require_causal
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, VariantConfig, VariantInfo
from ...softmax.biases import KeyBiasVariant, running_sum

_OWNER = "fox"


@dataclass(frozen=True, kw_only=True)
class FoxConfig(VariantConfig):
    """Settings of FoX; every field is described by `patchattn info fox`."""

    scaled: bool = option(
        True,
        help="Multiply log f by a learned number per head that starts at 0: exactly the model. False is the paper's "
        "gate, which forgets at once.",
        source="ours, for pretrained models; the paper trains from scratch",
    )
    initial_bias: float = option(
        0.0,
        help="Start of the gates' biases: the larger, the less is forgotten.",
        source="released code",
        minimum=-100.0,
        maximum=100.0,
    )
    initial_std: float = option(
        0.02,
        help="Standard deviation of the gates' weights at the start.",
        source="released code",
        minimum=0.0,
        maximum=1.0,
    )


class Fox(KeyBiasVariant):
    """Attention with logits `s_ij + sum of log f_l over j < l <= i`, `log f = -a softplus(-(w x + b))` per head.

    x is the layer's input. As softmax ignores what all keys of a row have in common, this is a bias of keys alone: the
    negative sum of log f up to each. That is remembered per key, in float32.
    """

    config_class = FoxConfig
    config: FoxConfig
    splits_by_head = True

    def __init__(self, config: FoxConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads, width = (site.require(fact, by="FoX") for fact in ("query_heads", "input_size"))
        self.weight = nn.Parameter(torch.empty(heads, width).normal_(std=config.initial_std))
        self.bias = nn.Parameter(torch.full((heads,), float(config.initial_bias)))
        self.scale = nn.Parameter(torch.zeros(heads)) if config.scaled else None

    @classmethod
    def fit(
        cls, config: FoxConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[FoxConfig, Sequence[AttentionSite]]:
        return config, require_causal(
            model, sites, by="FoX", because="it says what is forgotten between a token and a later one"
        )

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"scaled": True}

    @property
    def needs_context(self) -> bool:
        return True

    @property
    def keeps_state(self) -> bool:
        return True

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def key_bias(self, call: AttentionCall) -> torch.Tensor:
        forgotten = self.log_forget(call)
        if self.observers:
            self.report(call, forget=forgotten.exp().transpose(1, 2))
        if call.mask.pairs is not None or call.mask.real_columns is not None:  # padding within a text forgets nothing
            forgotten = forgotten.masked_fill(~call.mask.real()[:, None], 0.0)
        context, keys, rows = call.context, call.key.shape[2], forgotten.shape[-1]
        state = context.sequence_state(_OWNER)
        past = None if state is None else state.per_key.get("sum")
        own = context.own_key()
        first = 0 if own is None else own
        if past is None:
            past = forgotten.new_zeros(*forgotten.shape[:2], keys)
        total = running_sum(past.to(forgotten.dtype), forgotten, first)
        if state is not None:
            state.write("sum", total, per_key=True)
        if isinstance(first, int):
            return total[..., first + rows - 1 : first + rows] - total
        return total.index_select(-1, (first + rows - 1).reshape(1)) - total

    def log_forget(self, call: AttentionCall) -> torch.Tensor:
        """`(B, H, Tq)` float32 or wider."""
        states, weight, scale = call.context.layer_input(), self.weight, self.scale
        opening = full_precision(nn.functional.linear(states.to(weight.dtype), weight, self.bias))
        forgotten = nn.functional.logsigmoid(opening)
        forgotten = forgotten if scale is None else forgotten * scale.to(forgotten.dtype)
        return forgotten.transpose(1, 2)


register_variant(
    VariantInfo(
        name="fox",
        variant=Fox,
        title="Forgetting Transformer: Softmax Attention with a Forget Gate",
        arxiv_id="2503.02130",
        year=2025,
        code="https://github.com/zhixuan-lin/forgetting-transformer",
        summary="Every token lets heads forget some of what came before it.",
        extra_parameters="the layer's width and two values per query head and layer",
        needs_training=True,
        innermost=True,
        # A row's bias leaves out what all its keys have in common, which a sink beside them would feel.
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "softcap", "sinks"},
        examples=({}, {"scaled": False}),
    )
)
