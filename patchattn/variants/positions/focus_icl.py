"""FocusICL: a prompt's question reads batches of demonstrations without what is trivial in them. Yuan et al., arXiv
2408.13987."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from patchattn_kernels.rows import blocks, full_precision, row_logits

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantInfo
from ...positions.pieces import (
    QUERY,
    SEGMENT,
    PlacedConfig,
    PlacedVariant,
    reads,
    segments,
    shared_places,
    without_prefix,
)
from ...positions.spans import Span, Text
from ...softmax.channels import attend_wider, parts

_STEP = 64.0  # of queries: keys hold that much less, so that float16 has room


@dataclass(frozen=True, kw_only=True)
class FocusICLConfig(PlacedConfig):
    """Settings of FocusICL; every field is described by `patchattn info focus_icl`."""

    trivial: float = option(
        0.1,
        help="Share p of the demonstrations' tokens that a token behind them does not read, those that it attends to "
        "least, by head. 0: it reads all.",
        source="ours; the paper searches it by the perplexity of the demonstrations",
        minimum=0.0,
        maximum=0.99,
    )
    batch: int | None = option(
        None,
        help="B: demonstrations that are read together; such batches stand side by side. None: all are one batch.",
        source="ours; the paper searches it likewise",
        unit="demonstrations",
        minimum=1,
        maximum=1 << 30,
    )


def in_batches(text: Text, size: int | None) -> Text:
    """Spans of batches in place of those of demonstrations; what is a prefix stays."""
    prefix, found = without_prefix(text)
    size = size or max(1, len(found))
    batches = [found[start : start + size] for start in range(0, len(found), size)]
    front = [Span("prefix", 0, prefix)] if prefix else []
    return (*front, *(Span("demonstration", batch[0].start, batch[-1].end) for batch in batches))


@dataclass(frozen=True)
class OfBatches:
    """Says of the spans of a sequence what `say` says of its batches; equal ones share what was said."""

    say: Callable[[Text, int], Sequence[int]]
    size: int | None

    def __call__(self, text: Text, count: int) -> Sequence[int]:
        return self.say(in_batches(text, self.size), count)


def number_of_batches(batches: Text, count: int) -> list[int]:
    """How many batches there are, 1 at least, of each of the first tokens."""
    return [max(1, len(without_prefix(batches)[1]))] * count


class FocusICL(PlacedVariant):
    """Batches of demonstrations see a shared prefix and themselves, at the same positions. What follows reads each with
    the prefix and itself, without what it attends to least, and the readings are merged by their sums."""

    config_class = FocusICLConfig
    config: FocusICLConfig
    name = "focus_icl"
    splits_by_head = True

    def __init__(self, config: FocusICLConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        # Not made while the model runs: older compilers do not follow them then.
        self._segments = OfBatches(segments, config.batch)
        self._places = OfBatches(shared_places, config.batch)
        self._batches = OfBatches(number_of_batches, config.batch)

    @property
    def segments(self) -> Callable[[Text, int], Sequence[int]]:
        return self._segments

    @property
    def places(self) -> Callable[[Text, int], Sequence[int]]:
        return self._places

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        call = self.placed(call).seeing(self.by_pair(call, reads))
        if self.config.trivial:
            call = call.seeing(self._not_trivial(call))
        if self.config.batch is None:
            return inner(call)
        # One softmax is the merge: what a token reads with every batch counts once for each.
        row = self.of_rows(call, self.segments)[:, None, :, None]
        batches = self.of_rows(call, self._batches)[:, None, :1]
        shared = (call.key_fact(SEGMENT) <= QUERY) * batches.to(torch.float32).log()
        pieces = parts(shared / (_STEP * call.scaling), call.key.dtype, most=3)
        query = (row == QUERY).to(call.query.dtype) * _STEP
        return attend_wider(call, query.expand(-1, -1, -1, len(pieces)), torch.stack(pieces, dim=-1), inner)

    def _not_trivial(self, call: AttentionCall) -> torch.Tensor:
        """`(B, H, Tq, Tk)` bool: all but the share of the demonstrations' keys with the lowest logits, in rows of what
        follows; of equal ones the earlier stay."""
        query, key, rule = full_precision(call.query.detach()), full_precision(call.key.detach()), call.rule()
        is_read = self.by_pair(call, lambda row, key: (row == QUERY) & (key > QUERY))
        found = []
        for rows in blocks(query.shape[2], query.shape[:2].numel() * key.shape[2]):
            logits = row_logits(query, key, rule, rows)
            ranked = logits.masked_fill(~is_read[:, :, rows], -math.inf)
            rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            count = (ranked > -math.inf).sum(-1, keepdim=True)
            stay = count - (count * self.config.trivial).floor().long()
            found.append((rank < stay) | ~is_read[:, :, rows])
        return torch.cat(found, dim=2)


register_variant(
    VariantInfo(
        name="focus_icl",
        variant=FocusICL,
        title="Focused Large Language Models are Stable Many-Shot Learners",
        arxiv_id="2408.13987",
        year=2024,
        summary="A question reads batches of demonstrations side by side, without the tokens that it attends to least.",
        extra_parameters="none",
        needs_training=False,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "position_bias", "softcap", "sinks"},
        examples=(
            {"spans": [["prefix", 0, 1], ["demonstration", 1, 3], ["demonstration", 3, 6]], "batch": 1},
            {"spans": [["demonstration", 0, 3], ["demonstration", 3, 6]], "trivial": 0.4},
        ),
    )
)
