"""LongHeads: every head reads the chunks it wants, which stand within the length that it was trained on.

arXiv 2402.10685.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from patchattn_kernels.rows import blocks, full_precision, log_sum_exp, weights_of, with_heads

from ...cache.state import SequenceState
from ...core.call import AttentionCall
from ...core.host import host
from ...core.mask import Mask
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantInfo
from ...positions.rotary import ROTATED_BY, Rotary
from ...positions.variant import RotaryConfig, RotaryVariant
from ...reading.choose import highest
from ...reading.forced import ends_of_text, visible_pages
from ...reading.selection import density
from ...reading.whole import refuse_some_keys, whole_sites

_QUERIES, _UNTIL, _CHUNKS = "queries", "until", "chunks"


@dataclass(frozen=True, kw_only=True)
class LongHeadsConfig(RotaryConfig):
    """Settings of LongHeads; every field is described by `patchattn info longheads`."""

    window: int | Literal["trained"] | None = option(
        "trained",
        help="Keys that a token reads at most, rounded down to whole chunks, and the length within which they stand. "
        "'trained': the length that the model was trained on. None: all, where they are.",
        source="paper: 4096, which LLaMA-2 was trained on",
        unit="keys",
        minimum=1,
    )
    chunk: int = option(256, help="Keys of a chunk.", source="paper", unit="keys", minimum=1)
    slack: int = option(
        32,
        help="So many last tokens can be taken back exactly (assisted decoding): as many more queries are remembered.",
        source="ours: transformers guesses 20 tokens at a time",
        unit="tokens",
        minimum=0,
    )


class LongHeads(RotaryVariant):
    """Attention of every query head of every token to its first chunk, its last two and those that score highest.

    Between the chunks that are read there are no gaps: each stands right behind the one before it.
    """

    config_class = LongHeadsConfig
    config: LongHeadsConfig
    name = "longheads"
    splits_by_head = True
    needs_rotation = True

    def __init__(self, config: LongHeadsConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        window = site.max_positions if config.window == "trained" else config.window
        if config.window == "trained" and window is None:
            raise ValueError(f"longheads cannot tell how long a text {site.name} was trained on: give window=...")
        self.count = None if window is None else int(window) // config.chunk
        if self.count is not None and self.count < 3:
            raise ValueError(
                f"window={window} holds {self.count} chunks of {config.chunk} keys, and a token always reads three: "
                "the first one, its own and the one before. Give a larger window, or a smaller chunk."
            )

    @classmethod
    def fit(
        cls, config: LongHeadsConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[LongHeadsConfig, Sequence[AttentionSite]]:
        """Leave out what is not causal self-attention, layers with a sliding window, and those that rotate nothing."""
        whole = whole_sites(model, sites, by=f"'{cls.name}'")
        if config.window is None:
            return replace(config, rotary=None), whole
        return super().fit(config, model, whole)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"window": None}

    @property
    def is_identity(self) -> bool:
        return self.config.window is None

    @property
    def keeps_state(self) -> bool:
        return True

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        return self.rotated_by(call)

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if self.rotary is None or self.count is None:
            return inner(call)
        owner = type(self).__name__
        refuse_some_keys(call, by=owner)
        state = call.context.sequence_state(owner)
        if state is not None and not state.grows:
            raise NotImplementedError(
                f"longheads knows chunks by their places, and in the kv cache of {self.site.name}, static or sliding, "
                "these do not last: use a dynamic cache."
            )
        if call.value.shape[-1] != call.key.shape[-1]:
            raise NotImplementedError(
                f"longheads asks for keys with what chunks give as values, and in {self.site.name} keys have "
                f"{call.key.shape[-1]} numbers, values {call.value.shape[-1]}."
            )
        with torch.no_grad():
            chunks = self._chunks(call, self.rotary, state)
        if call.mask.columns <= self.count * self.config.chunk:
            kept = None
        else:
            with torch.no_grad():
                kept = self._kept(call, self.rotary, chunks, self.count)
        if self.observers:
            size, keys = self.config.chunk, call.key.shape[2]
            keep = None if kept is None else kept.repeat_interleave(size, dim=-1)[..., :keys]
            self.report(call, density=density(call, call.seeing(keep)))
        return inner(call) if kept is None else self._moved(call, self.rotary, kept)

    def _chunks(self, call: AttentionCall, rotary: Rotary, state: SequenceState | None) -> torch.Tensor:
        """`(B, H, P, D)` what stands for each complete chunk, made once where a kv cache grows."""
        size, columns = self.config.chunk, call.mask.columns
        query = _within(call.query, rotary, rotary.rotated_by(call), call.mask, columns - call.mask.queries, size)
        if state is None:
            return _stand_ins(call, rotary, query, columns // size, size)
        if _QUERIES in state.tensors:
            past = state.tensors[_QUERIES]
            # how far they reach is remembered as a size; some of the last ones may have been taken back since
            gone = state.tensors[_UNTIL].shape[1] - (columns - call.mask.queries)
            query = torch.cat([past[:, :, : max(0, past.shape[2] - gone)], query], dim=2)
        known = state.pages.get(_CHUNKS)
        have = 0 if known is None else known[1].shape[2]
        if columns - query.shape[2] > have * size:
            raise NotImplementedError(
                f"longheads has let go of queries of an unfinished chunk in {self.site.name}: more than "
                f"slack={self.config.slack} tokens were taken back. Patch with a larger slack."
            )
        made = state.blocks(
            _CHUNKS, size, call.key, lambda keys, _: _stand_ins(call, rotary, query, keys.shape[2] // size, size)
        )
        first = max(0, columns - self.config.slack) // size * size  # of what a chunk may have to be made of again
        state.write(_QUERIES, query[:, :, max(0, query.shape[2] - (columns - first)) :].clone())
        state.write(_UNTIL, query.new_empty(len(query), columns, 0))
        return call.query[:, :, :0] if made is None else made

    def _kept(self, call: AttentionCall, rotary: Rotary, chunks: torch.Tensor, count: int) -> torch.Tensor:
        """`(B, H, Tq, ceil(Tk / chunk))` bool: which chunks queries read."""
        visible, own = visible_pages(call.mask, self.config.chunk)
        forced = ends_of_text(visible, own, first=1, local=2)
        old = rotary.rotated_by(call)
        scores = full_precision(rotary.turned(call.query, old, torch.zeros_like(old))) @ full_precision(chunks).mT
        return highest(F.pad(scores, (0, visible.shape[-1] - scores.shape[-1])), visible, forced, count)

    def _moved(self, call: AttentionCall, rotary: Rotary, kept: torch.Tensor) -> AttentionOutput:
        """Attention to the chunks that are kept, each right behind the one before it."""
        size, keys, groups = self.config.chunk, call.key.shape[2], call.key.shape[1]
        number = torch.arange(kept.shape[-1], device=kept.device)
        real = F.pad(call.mask.real_keys(), (0, len(number) * size - keys)).unflatten(-1, (-1, size)).sum(dim=-1)
        left_out = real[:, :, None] * (visible_pages(call.mask, size)[0] & ~kept)
        skipped = left_out.flip(-1).cumsum(dim=-1).flip(-1)  # tokens of a chunk and of those behind it
        key = F.pad(full_precision(call.key), (0, 0, 0, len(number) * size - keys)).unflatten(2, (-1, size))
        query, value, rule = full_precision(call.query), full_precision(call.value), call.rule()
        cos, sin = rotary.tables(torch.arange(keys + 1, device=number.device)[None], query.dtype)
        batch, heads, count, dim = query.shape
        rate = (call.kwargs.get("dropout") or 0.0) if call.module.training else 0.0
        wants_weights = call.kwargs.get("output_attentions") or not host().computes_softmax(call.base)
        outputs, found = [], []
        for rows in blocks(count, batch * heads * max(keys, len(number) * dim)):
            gone = skipped[:, :, rows]
            turned = query[:, :, rows, None].expand(-1, -1, -1, len(number), -1)
            turned = rotary.rotated(turned, cos[0][gone], -sin[0][gone])  # nearer by what is left out
            turned = turned.unflatten(1, (groups, -1)).movedim(4, 2).flatten(3, 4)
            logits = (turned @ key.mT).unflatten(3, (heads // groups, -1)).movedim(2, 4).flatten(4).flatten(1, 2)
            logits = logits[..., :keys] * rule.scaling
            if rule.softcap is not None:
                logits = torch.tanh(logits / rule.softcap) * rule.softcap
            for term in rule.added(rows, keys):
                logits = logits + term
            seen = with_heads(rule.visible(rows, (count, keys), key.device))
            seen = seen & kept[:, :, rows].repeat_interleave(size, dim=-1)[..., :keys]
            logits = logits.masked_fill(~seen, float("-inf"))
            weights = weights_of(logits, log_sum_exp(logits, rule))
            dropped = F.dropout(weights, rate) if rate else weights
            outputs.append((dropped.unflatten(1, (groups, -1)) @ value[:, :, None]).flatten(1, 2))
            if wants_weights:
                found.append(weights)
        weights_found = torch.cat(found, dim=2).to(call.value.dtype) if wants_weights else None
        return torch.cat(outputs, dim=2).transpose(1, 2).to(call.value.dtype), weights_found


def _within(x: torch.Tensor, rotary: Rotary, old: torch.Tensor, mask: Mask, first: int, size: int) -> torch.Tensor:
    """Queries or keys as if they stood at their places within their chunks; column `first` is that of the first."""
    order = F.pad(mask.key_order()[:, 0], (1, 0))
    column = first + torch.arange(x.shape[2], device=x.device)
    place = order[:, column + 1] - 1 - order[:, column // size * size]  # padding in a chunk takes up no place
    return rotary.turned(x, old, place.clamp(min=0))


def _stand_ins(call: AttentionCall, rotary: Rotary, query: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """`(B, H, count, D)` what stands for each of the last complete chunks of a call.

    The mean of what attention within the chunk gives, to all of it, is a query itself: the weights that it gives to the
    keys of the chunk make their mean (section 3.1).

    Args:
        call: the call.
        rotary: of its attention module.
        query: `(B, H, n, D)` the last n queries there were, at their places within their chunks.
        count: how many chunks.
        size: keys of a chunk.
    """
    end = call.mask.columns // size * size
    part = slice(end - count * size, end)
    behind = call.mask.columns - end
    key = _within(call.key[:, :, part], rotary, call.key_fact(ROTATED_BY)[..., part], call.mask, part.start, size)
    query = query[:, :, query.shape[2] - behind - count * size : query.shape[2] - behind]
    key, value, query = (
        full_precision(each).unflatten(2, (count, size)) for each in (key, call.value[:, :, part], query)
    )
    real = call.mask.real_keys()[..., part].unflatten(-1, (count, size))[:, :, None]
    key, value = key[:, :, None], value[:, :, None]
    query = query.unflatten(1, (key.shape[1], -1))
    logits = (query @ key.mT * call.scaling).masked_fill(~real[..., None, :], float("-inf"))
    given = (logits.softmax(dim=-1).nan_to_num(0.0) @ value) * real[..., None]
    mean = given.sum(dim=-2, keepdim=True) / real.sum(dim=-1).clamp(min=1)[..., None, None]
    logits = (mean @ key.mT * call.scaling).masked_fill(~real[..., None, :], float("-inf"))
    return (logits.softmax(dim=-1).nan_to_num(0.0) @ key).squeeze(-2).flatten(1, 2)


register_variant(
    VariantInfo(
        name="longheads",
        variant=LongHeads,
        title="LongHeads: Multi-Head Attention is Secretly a Long Context Processor",
        arxiv_id="2402.10685",
        year=2024,
        code="https://github.com/LuLuLuyi/LongHeads",
        summary="Every head reads the chunks it wants, which stand within the length that the model was trained on.",
        extra_parameters="none",
        needs_training=False,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "position_bias", "static_cache"},
        examples=({"window": 4, "chunk": 1},),
    )
)
