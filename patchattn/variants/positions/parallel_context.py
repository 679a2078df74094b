"""Parallel context encoding, with a shared prefix and a choice of pieces. Zhang et al., arXiv 2412.16545."""

from dataclasses import dataclass

import torch

from patchattn_kernels.rows import blocks, full_precision, log_sum_exp, row_logits, weights_of

from ...core.call import AttentionCall
from ...core.keeping import of_query_heads
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantInfo
from ...positions.pieces import QUERY, SEGMENT, PlacedConfig, PlacedVariant, reads


@dataclass(frozen=True, kw_only=True)
class ParallelContextConfig(PlacedConfig):
    """Settings of parallel context encoding; every field is described by `patchattn info parallel_context`."""

    top: int | None = option(
        None,
        help="K: what follows the pieces reads, token by token, the so many that it attends to most. None: all.",
        source="ours; the paper's number was not found",
        unit="pieces",
        minimum=1,
        maximum=1 << 30,
    )


class ParallelContext(PlacedVariant):
    """Pieces see a shared prefix and themselves, at the same positions; what follows them sees all, or those that it
    attends to most."""

    config_class = ParallelContextConfig
    config: ParallelContextConfig
    name = "parallel_context"
    splits_by_head = True

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        call = self.placed(call).seeing(self.by_pair(call, reads))
        if self.config.top is None:
            return inner(call)
        is_read = self.by_pair(call, lambda row, key: (row != QUERY) | (key <= QUERY))
        return inner(call.seeing(is_read | self._chosen(call, self.config.top)))

    def _chosen(self, call: AttentionCall, top: int) -> torch.Tensor:
        """`(B, 1 or H, Tq, Tk)` bool: which keys are of the pieces whose mass, the mean over heads, is among the row's
        largest; of equal ones the earlier piece comes first."""
        query, key, rule = full_precision(call.query.detach()), full_precision(call.key.detach()), call.rule()
        piece = of_query_heads(call.key_fact(SEGMENT)[:, :, None].clamp(min=QUERY), query.shape[1])
        found = []
        for rows in blocks(query.shape[2], query.shape[:2].numel() * key.shape[2]):
            logits = row_logits(query, key, rule, rows)
            weights = weights_of(logits, log_sum_exp(logits, rule))
            index = piece.expand(*weights.shape[:1], -1, weights.shape[2], -1)
            mass = weights.new_zeros(*weights.shape[:3], key.shape[2] + 1)  # no more pieces than keys
            mass = mass.scatter_add(-1, index.expand_as(weights), weights)
            mass = call.of_all_heads(mass, 1).mean(1, keepdim=True)
            mass[..., QUERY] = -1.0
            rank = mass.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            found.append((rank < top).expand(-1, index.shape[1], -1, -1).gather(-1, index))
        return torch.cat(found, dim=2)


register_variant(
    VariantInfo(
        name="parallel_context",
        variant=ParallelContext,
        title="Attention Entropy is a Key Factor: An Analysis of Parallel Context Encoding with Full-attention-based "
        "Pre-trained Language Models",
        arxiv_id="2412.16545",
        year=2024,
        summary="Documents in a prompt are read side by side at the same positions, behind a shared prefix.",
        extra_parameters="none",
        needs_training=False,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "position_bias"},
        examples=(
            {"spans": [["prefix", 0, 1], ["document", 1, 3], ["document", 3, 6]]},
            {"spans": [["document", 0, 2], ["document", 2, 4], ["document", 4, 6]], "top": 1},
        ),
    )
)
