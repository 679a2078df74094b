"""Retrieval heads: how much of an answer each head copies out of its context. arXiv 2404.15574."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from patchattn_kernels.rows import full_precision, row_logits

from ..core.call import AttentionCall
from ..core.heads import BaseFacts, HeadList
from ..core.importance import HeadImportance, SiteScores
from ..core.probing import probed
from ..core.selection import base_model, input_device, select_sites
from ..reading.gates import HeadGates

_LEAST_ANSWERED = 0.5  # a trial counts if the model knows more than this share of the answer


@dataclass(frozen=True)
class RetrievalTrial:
    """A text that holds something to be copied, and the copy at its end.

    Attributes:
        tokens: `(T,)` ids: the prompt and behind it the answer.
        needle: numbers of the first token that is to be copied, and of the one after the last.
        answer: number of tokens of the answer, which are the last ones.
    """

    tokens: list[int]
    needle: tuple[int, int]
    answer: int

    def __post_init__(self) -> None:
        start, stop = self.needle
        if not (0 <= start < stop <= len(self.tokens) - self.answer and self.answer > 0):
            raise ValueError(
                f"A trial's needle lies in its prompt and an answer follows it, got the needle {self.needle} and an "
                f"answer of {self.answer} among {len(self.tokens)} tokens."
            )


@dataclass(frozen=True)
class RetrievalScores:
    """What a search for retrieval heads found.

    Attributes:
        scores: of every query head, mean over the trials that count.
        counted: trials that count: the model expects more than half of the answer's tokens.
        trials: all of them.
    """

    scores: HeadImportance
    counted: int
    trials: int

    def highest(self, count: int | None = None, *, threshold: float | None = None) -> HeadList:
        """The heads that retrieve most, as `decore` and `heads` take them.

        Args:
            count: so many; equal scores go by layer and head.
            threshold: instead, all whose score is above it; the paper's is 0.1.

        Raises:
            ValueError: neither or both of them, a count of less than 1 or of more than there are, or no head.
        """
        return self.scores.highest(count, threshold=threshold)

    def gates(self) -> HeadGates:
        """Gates as `duo` takes them: of every kv head the highest score of its query heads, at most 1.

        The kv heads that retrieve least then keep the first and the last keys alone.

        Raises:
            ValueError: a layer's query heads do not share its kv heads alike.
        """
        rows = []
        for name, site in sorted(self.scores.sites.items(), key=lambda item: item[1].layer):
            size, left = divmod(len(site.scores), site.kv_heads)
            if left:
                raise ValueError(f"{name} has {len(site.scores)} query heads on {site.kv_heads} kv heads.")
            groups = [site.scores[start : start + size] for start in range(0, len(site.scores), size)]
            rows.append(tuple(min(1.0, max(group)) for group in groups))
        return HeadGates(tuple(rows), self.scores.base)


@torch.no_grad()
def retrieval_scores(
    model: nn.Module,
    trials: Iterable[RetrievalTrial],
    *,
    modules: str | Iterable[str] | None = None,
    batch_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> RetrievalScores:
    """Retrieval score of every query head of a causal language model.

    Where the model is about to say a token y of the answer, a head retrieves it if the key that it attends to most, the
    first one of equal ones, is a token of the needle, and that token is y. A trial adds 1 / (length of the needle) for
    each, so that a head which copies a token twice can exceed 1 (as the released code counts). The answer is forced:
    one forward over prompt and answer, in place of generating it. No matrix of attention is made but for its rows.

    Args:
        model: in evaluation mode, patched or not.
        trials: texts with something to be copied.
        modules: which attention modules, as in `patch_model`, where the model has several towers.
        batch_size: trials of a forward, padded on the right, which changes no score.
        progress: called with the number of trials done.

    Raises:
        ValueError: a batch of no trial, no trial, none that counts, a model in training mode, or an attention module
            that is not run.
        NotImplementedError: keys have been dropped or gathered, so that a key is no token of the text; or a variant
            computes attention itself, as `act` does.
    """
    base: Any = base_model(model)
    if base.training:
        raise ValueError("retrieval_scores needs a model in evaluation mode: model.eval().")
    sites = [site for site in select_sites(base, modules=modules) if not site.is_cross]
    sums = {site.name: torch.zeros(site.require("query_heads", by="retrieval_scores")).double() for site in sites}
    device, done, counted, tokens = input_device(base), 0, 0, 0
    found: dict[str, torch.Tensor] = {}
    with probed(base, lambda call, output: see(call), modules=[f"^{site.name}$" for site in sites], at="base"):
        for some in _batched(trials, batch_size):
            given = _Padded.of(some, device)

            def see(call: AttentionCall, given: _Padded = given) -> None:
                found[call.site.name] = _hits(call, given) / (given.stop - given.start).double().cpu()

            logits = base(input_ids=given.ids, attention_mask=given.mask, use_cache=False).logits
            if missing := [name for name in sums if name not in found]:
                raise ValueError(f"{missing[0]} was not run on a text. Leave it out with modules=...")
            right = (logits[:, given.rows].argmax(-1) == given.ids[:, given.rows + 1]) & given.wanted
            for one, trial in enumerate(some):
                if float(right[one].sum()) / trial.answer > _LEAST_ANSWERED:
                    counted, tokens = counted + 1, tokens + trial.answer
                    for name, total in sums.items():
                        total += found[name][one]
            found.clear()
            done += len(some)
            if progress is not None:
                progress(done)
    if not done:
        raise ValueError("There are no trials: give at least one text.")
    if not counted:
        raise ValueError(
            f"The model expects more than half of the answer in none of {done} trials: no head can be scored. Use "
            "shorter texts."
        )
    scores = {
        site.name: SiteScores(
            site.layer_index,
            site.require("kv_heads", by="retrieval_scores"),
            tuple((sums[site.name] / counted).tolist()),
        )
        for site in sites
    }
    importance = HeadImportance(scores, "retrieval", BaseFacts.of(base, sites[0]), {}, tokens)
    return RetrievalScores(importance, counted, done)


@dataclass(frozen=True, eq=False)
class _Padded:
    """A batch of trials.

    Attributes:
        ids, mask: `(B, T)`, padded on the right.
        rows: `(R,)` rows of which any trial's answer is predicted from.
        wanted: `(B, R)` bool: which of them are a trial's own.
        start, stop: `(B, 1)` the needles.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    wanted: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor

    @classmethod
    def of(cls, trials: Sequence[RetrievalTrial], device: torch.device) -> "_Padded":
        lengths = torch.tensor([len(trial.tokens) for trial in trials], device=device)[:, None]
        answers = torch.tensor([trial.answer for trial in trials], device=device)[:, None]
        needles = torch.tensor([trial.needle for trial in trials], device=device)
        places = torch.arange(int(lengths.max()), device=device)
        own = (places >= lengths - answers - 1) & (places < lengths - 1)
        rows = own.any(0).nonzero()[:, 0]
        width = len(places)
        ids = torch.tensor([[*trial.tokens, *[0] * (width - len(trial.tokens))] for trial in trials], device=device)
        return cls(ids, (places < lengths).long(), rows, own[:, rows], needles[:, :1], needles[:, 1:])


def _batched(trials: Iterable[RetrievalTrial], size: int) -> Iterator[list[RetrievalTrial]]:
    if size < 1:
        raise ValueError(f"A batch has at least one trial, got batch_size={size}.")
    left = iter(trials)
    while some := list(islice(left, size)):
        yield some


def _hits(call: AttentionCall, given: _Padded) -> torch.Tensor:
    """`(B, H)` how many rows of a text have their largest weight on a token of the needle that is the next one."""
    if call.mask.index is not None or call.key.shape[2] != given.ids.shape[1]:
        raise NotImplementedError(f"Keys of {call.site.name} are no longer the tokens of the text, one by one.")
    logits = row_logits(full_precision(call.query), full_precision(call.key), call.rule(), given.rows)
    place = logits.argmax(-1)  # (B, H, R), the first of equal ones
    said = given.ids[:, None].expand(-1, place.shape[1], -1).gather(2, place)
    inside = (place >= given.start[:, None]) & (place < given.stop[:, None])
    hit = inside & (said == given.ids[:, None, given.rows + 1]) & given.wanted[:, None]
    return hit.cpu().double().sum(-1)
