"""APE: pieces of a prompt are encoded side by side, and read with a temperature. Yang et al., arXiv 2502.05431."""

from dataclasses import dataclass

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantInfo
from ...positions.pieces import QUERY, PlacedConfig, PlacedVariant, reads
from ...softmax.merging import merged


@dataclass(frozen=True, kw_only=True)
class APEConfig(PlacedConfig):
    """Settings of APE; every field is described by `patchattn info ape`."""

    temperature: float = option(
        0.9,
        help="T: logits of what follows the pieces are divided by it, to keys of the pieces. 1 changes nothing.",
        source="released code: the published example",
        minimum=0.01,
        maximum=100.0,
    )
    scale: float = option(
        0.9,
        help="S: with T, factor of the log of the sum of those exponentials, which weighs the pieces against the rest.",
        source="released code: the published example",
        minimum=0.01,
        maximum=100.0,
    )


class APE(PlacedVariant):
    """Pieces see a shared prefix and themselves, at the same positions; what follows them sees all, their keys with a
    temperature and a scale."""

    config_class = APEConfig
    config: APEConfig
    name = "ape"
    splits_by_head = True

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        temperature, scale = self.config.temperature, self.config.scale
        call = self.placed(call).seeing(self.by_pair(call, reads))
        if temperature == scale == 1.0:
            return inner(call)
        is_context = self.by_pair(call, lambda row, key: (row == QUERY) & (key > QUERY))
        context = call.replace(scaling=call.scaling / temperature).seeing(is_context)
        return merged(call.seeing(~is_context), context, factors=(1.0, scale * temperature))


register_variant(
    VariantInfo(
        name="ape",
        variant=APE,
        title="APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding",
        arxiv_id="2502.05431",
        year=2025,
        code="https://github.com/Infini-AI-Lab/APE",
        summary="Documents in a prompt are read side by side at the same positions, with a temperature.",
        extra_parameters="none",
        needs_training=False,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "position_bias", "softcap", "sinks"},
        examples=({"spans": [["prefix", 0, 1], ["document", 1, 3], ["document", 3, 6]]},),
    )
)
