"""Differential attention: a learned part of another head's attention is taken away. arXiv 2410.05258."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.token_numbers import refuse_other_tokens
from ...core.variant import Attend, AttentionOutput, Variant, VariantConfig, VariantInfo


@dataclass(frozen=True, kw_only=True)
class DifferentialConfig(VariantConfig):
    """Settings of differential attention; every field is described by `patchattn info differential`."""

    initial_lambda: float = option(
        0.0,
        help="Start of every head's lambda, the part of the other head's attention that is taken away. 0 is the model.",
        source="ours, for pretrained models; the paper has 0.8 - 0.6 exp(-0.3 l) in layer l",
        minimum=-10.0,
        maximum=10.0,
    )


class Differential(Variant):
    """Attention `(A_h - lambda_h A_p(h)) V_h`, A the weights of a head, and p(h) a head half of all heads away.

    That head reads another kv head: within one group the output projection could learn as much. The second term is a
    call of its own, of the same queries and keys, whose values are those of other kv heads.
    """

    config_class = DifferentialConfig
    config: DifferentialConfig
    needs_groups = True

    def __init__(self, config: DifferentialConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads, kv_heads = (site.require(fact, by="differential attention") for fact in ("query_heads", "kv_heads"))
        if kv_heads < 2 or heads % kv_heads:
            raise NotImplementedError(
                f"{site.name} has {heads} query heads on {kv_heads} kv heads: differential attention pairs heads of "
                "two kv heads that serve equally many. Leave it out with modules=... or layers=..."
            )
        self.factor = nn.Parameter(torch.full((heads,), float(config.initial_lambda)))

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"initial_lambda": 0.0}

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.factor]

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        refuse_other_tokens(call.mask, by="differential", site=self.site.name)
        heads, groups = call.query.shape[1], call.key.shape[1]
        by = groups // 2
        output, weights = inner(call)
        others, their_weights = inner(call.replace(value=call.value.roll(by, dims=1)))
        shift = -by * (heads // groups)
        output = output - others.roll(shift, dims=2) * self.factor[:, None].to(output.dtype)
        if weights is not None and their_weights is not None:
            weights = weights - their_weights.roll(shift, dims=1) * self.factor[:, None, None].to(weights.dtype)
        return output, weights

    def fold(self, plain: nn.Module) -> None:
        if self.factor.any():
            raise NotImplementedError("its second attention is in no weights")


register_variant(
    VariantInfo(
        name="differential",
        variant=Differential,
        title="Differential Transformer",
        arxiv_id="2410.05258",
        year=2024,
        code="https://github.com/microsoft/unilm/tree/master/Diff-Transformer",
        summary="Of every head's attention a learned part of another head's is taken away.",
        extra_parameters="one value per query head and layer",
        needs_training=True,
        innermost=True,
        examples=({}, {"initial_lambda": 0.4}),
    )
)
