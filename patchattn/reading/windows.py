"""Scores of keys by what the last queries of a prompt attend to, as SnapKV and those after it have them."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from patchattn_kernels import AttentionRule, column_mass

from ..cache.state import SequenceState
from ..core.call import AttentionCall
from ..core.settings import option
from .eviction import Event, ScoredConfig, ScoredEviction

_QUERY, _SEEN, _REAL = "window.query", "window.seen", "window.real"

Group = Literal["mean", "max", "sum"]


@dataclass(frozen=True, kw_only=True)
class WindowConfig(ScoredConfig):
    """Settings of variants whose scores are the attention of the last queries of a prompt."""

    event: Event = option(
        "prompt",
        help="When keys are dropped: 'prompt', at the first single token after calls of several, so that chunks of a "
        "prompt do not matter; 'chunk', at the end of every call of several tokens, by the last queries of that call.",
        source="the papers compress a prompt once",
        choices=("prompt", "chunk"),
    )
    window: int = option(
        32,
        help="Last queries of the prompt whose attention is counted; their keys are kept, within the budget.",
        source="released code",
        unit="tokens",
        minimum=1,
    )
    kernel: int = option(
        7,
        help="Length of the pooling over neighbouring keys, odd; 1 does not pool.",
        source="released code: the published configurations",
        unit="keys",
        minimum=1,
    )
    pooling: Literal["max", "mean"] = option(
        "max",
        help="How neighbours are pooled; the mean counts zeros beyond both ends.",
        source="released code: the published configurations",
        choices=("max", "mean"),
    )
    group: Group = option(
        "mean",
        help="How the scores of the query heads that share a kv head become one, before pooling.",
        source="ours; KVCache-Factory's mode for grouped heads",
        choices=("mean", "max", "sum"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise ValueError(
                f"kernel must be odd, so that a key is in the middle of its neighbours, got {self.kernel}."
            )


class WindowEviction(ScoredEviction):
    """Keeps the keys that the last queries of a prompt attend to, and those queries' own."""

    config: WindowConfig

    def last(self, counts: torch.Tensor) -> int:
        return self.config.window

    def window(self) -> int:
        return self.config.window

    def observe(self, call: AttentionCall, state: SequenceState) -> None:
        rows = call.query.shape[2]
        if rows == 1:
            for name in (_QUERY, _SEEN, _REAL):
                state.tensors.pop(name, None)
            return
        count, batch = min(rows, self.config.window), len(call.query)
        mask = call.mask.of_rows(torch.arange(rows - count, rows, device=call.query.device))
        seen, added = mask.seen(), mask.added()
        seen = seen if added is None else torch.where(seen, added, torch.finfo(added.dtype).min)
        parts = {
            _QUERY: call.query[:, :, rows - count :],
            _SEEN: seen.expand(batch, -1, -1, -1),
            _REAL: mask.real().expand(batch, -1),
        }
        if self.config.event == "prompt" and _QUERY in state.tensors:
            parts = self._joined(state, parts, past=call.mask.keys - rows)
        for name, part in parts.items():
            state.write(name, part.clone())

    def _joined(self, state: SequenceState, new: dict[str, torch.Tensor], past: int) -> dict[str, torch.Tensor]:
        """With the queries of the calls before, of which `past` keys are left."""
        query, seen, real = (state.tensors[name] for name in (_QUERY, _SEEN, _REAL))
        end = query.shape[2] - max(0, seen.shape[-1] - past)
        start = max(0, end - self.config.window + new[_QUERY].shape[2])
        hidden = False if seen.dtype == torch.bool else torch.finfo(seen.dtype).min
        keys = new[_SEEN].shape[-1]
        seen = F.pad(seen[:, :, start : max(start, end), :past], (0, keys - past), value=hidden)
        heads = max(seen.shape[1], new[_SEEN].shape[1])
        return {
            _QUERY: torch.cat([query[:, :, start : max(start, end)], new[_QUERY]], dim=2),
            _SEEN: torch.cat([part.expand(-1, heads, -1, -1) for part in (seen, new[_SEEN])], dim=2),
            _REAL: torch.cat([real[:, start : max(start, end)], new[_REAL]], dim=1),
        }

    def scores(self, call: AttentionCall, state: SequenceState) -> torch.Tensor:
        config, kwargs = self.config, call.kwargs
        softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        rule = AttentionRule(call.scaling, softcap=softcap, sinks=sinks, mask=state.tensors[_SEEN])
        mass, _ = column_mass(state.tensors[_QUERY], call.key, rule, real=state.tensors[_REAL])
        scores = grouped(mass, call.key.shape[1], config.group)
        real = call.mask.real_keys().expand_as(scores)
        order = real.long().cumsum(-1)
        scores = scores.masked_fill(order[..., -1:] - order < config.window, 0.0)  # whose own keys stay anyway
        return pooled(scores, real, config.kernel, config.pooling)


def grouped(scores: torch.Tensor, kv_heads: int, how: Group) -> torch.Tensor:
    """`(B, Hkv, Tk)` of the scores of query heads `(B, H, Tk)`."""
    groups = scores.unflatten(1, (kv_heads, -1))
    if how == "max":
        return groups.amax(2)
    return groups.mean(2) if how == "mean" else groups.sum(2)


def pooled(scores: torch.Tensor, real: torch.Tensor, kernel: int, how: str) -> torch.Tensor:
    """`(B, G, Tk)` scores pooled over neighbouring real keys; what is not real counts as zero, as beyond the ends."""
    if kernel == 1:
        return scores
    places = real.to(torch.uint8).argsort(dim=-1, stable=True)
    taken = scores.masked_fill(~real, 0.0).gather(-1, places)
    pool = F.max_pool1d if how == "max" else F.avg_pool1d
    found = pool(taken, kernel, stride=1, padding=kernel // 2)
    return torch.empty_like(found).scatter_(-1, places, found)
