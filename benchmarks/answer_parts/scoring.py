"""Scores of a forced answer: a prompt and what is expected are given in pieces, as the method acts in generation.

All of an answer is right if every token of it is the most likely one: that is to say that greedy decoding writes it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from caches import held_tokens
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.reading.budgets import Budget
from patchattn.reading.eviction import ScoredEviction
from patchattn.variants.selection.squeezed import PrefixClusters, prefix_clusters

from .cases import TEXT, Case
from .methods import WINDOW, How, Method

When = Literal["with", "before"]  # a cache is compressed with the question in sight, or before it comes
Found = list[float]
TAIL = 64  # last tokens of a text, given to the patched model behind a copied cache
EVERYTHING = 1 << 30  # keys
PARTS = 4  # of a text, whose losses are told apart


@dataclass
class Read:
    """Keys that were read and seen, of all attention modules, and shares of those stored."""

    modules: int
    first: int = 0
    read: float = 0.0
    reported: float = 0.0
    seen: float = 0.0

    def see(self, observation: Any) -> None:
        """Add up what one module reports of a call."""
        if (density := observation.values.get("density")) is None:
            return
        density = density[0].float()
        density = density.mean(dim=-1) if density.dim() == 2 else density
        seen = self.first + 1.0 + torch.arange(len(density), device=density.device)
        self.read += float((density * seen).sum())
        self.reported += float(seen.sum())

    def begin(self, first: int, rows: int) -> None:
        """Expect a call, in which modules that do not report read all."""
        self.first = first
        self.seen += self.modules * float(first * rows + rows * (rows + 1) / 2)

    @property
    def density(self) -> float:
        return (self.read + self.seen - self.reported) / self.seen if self.seen else 1.0


def pieces(case: Case, how: How | Literal["dense"], when: When, start: int) -> list[int]:
    """Where calls end, of a prompt and its answer but for the last token; those up to `start` are in the cache.

    A cache that is compressed once is so at the first single token behind a prompt, the others follow in one call. All
    of a text is one call.
    """
    if case.task == TEXT:
        how = "dense"
    prompt, end = len(case.prompt), len(case.prompt) + len(case.answer) - 1
    text = prompt if when == "with" and how != "question" else len(case.text)
    ends = {
        "dense": [],
        "rows": [],
        "prompt": [prompt],
        "steps": list(range(prompt, end)),
        "question": [text, prompt, *range(prompt, end)],
        "once": [text, text + 1],
        "always": [text, *([] if case.in_one_call else range(prompt, end))],
    }[how]
    return sorted({*(place for place in ends if start < place < end), end})


@torch.inference_mode()
def logits_of(
    model: Any, cache: DynamicCache, case: Case, ends: Sequence[int], start: int, before: Callable[[int, int], Any]
) -> torch.Tensor:
    """`(answer, V)` before each token of the answer; `before` is told of each call's first token and its end."""
    tokens, wanted, found = case.prompt + case.answer[:-1], len(case.prompt) - 1, []
    for end in ends:
        rows = end - max(start, wanted)
        ids = torch.tensor([tokens[start:end]], device=model.device)
        with before(start, end):
            logits = model(ids, logits_to_keep=max(1, rows), **cache_argument(model, cache)).logits[0]
        if rows > 0:
            found.append(logits)
        start = end
    return torch.cat(found)


def scored(logits: torch.Tensor, case: Case, share: float) -> Found:
    """Whether all is right, nats a token, the share of keys that were read or are stored, nats of a text's parts."""
    answer = torch.tensor(case.answer, device=logits.device)
    nats = torch.nn.functional.cross_entropy(logits.float(), answer, reduction="none")
    right = float((logits.argmax(dim=-1) == answer).all())
    parts = [float(part.mean()) for part in nats.tensor_split(PARTS)] if case.task == TEXT else []
    return [right, float(nats.mean()), share, *parts]


class Prefixes:
    """Caches of the beginning of one prompt, filled once and copied."""

    def __init__(self, model: Any, case: Case, *, known: int) -> None:
        self.model, self.case, self.known = model, case, known
        self.filled: dict[str, DynamicCache] = {}
        self.clusters: PrefixClusters | None = None

    def clustered(self) -> PrefixClusters:
        """What Squeezed Attention knows of the text of the prompt; found once, without a patch."""
        if self.clusters is None:
            self.clusters = prefix_clusters(self.model, self.case.text, window=WINDOW)
        return self.clusters

    def of(self, name: str) -> tuple[DynamicCache, int]:
        """A copy of what the model, as it is patched now, has read of the known tokens."""
        if not self.known:
            return DynamicCache(config=self.model.config), 0
        if name not in self.filled:
            self.filled[name] = cache = DynamicCache(config=self.model.config)
            ids = torch.tensor([self.case.prompt[: self.known]], device=self.model.device)
            with torch.inference_mode():
                self.model(ids, logits_to_keep=1, **cache_argument(self.model, cache))
        return copy.deepcopy(self.filled[name]), self.known


@contextmanager
def uncounted(read: Read) -> Iterator[None]:
    """A call that what was read so far does not tell of."""
    yield
    read.read = read.reported = read.seen = 0.0


@contextmanager
def patched(model: Any, variant: str, settings: dict[str, Any]) -> Iterator[None]:
    patchattn.patch_model(model, variant, settings)
    try:
        yield
    finally:
        patchattn.unpatch_model(model)


def set_budget(model: Any, keys: int) -> None:
    """Of variants that are there: what they remember of a cache stays right, since nothing was dropped so far."""
    for variant in model.modules():
        if isinstance(variant, ScoredEviction):
            config = replace(variant.config, budget=keys)
            variant.budget = Budget(config, variant.default_budget, variant.site)


def dense(model: Any, case: Case, prefixes: Prefixes) -> Found:
    """What the model as it is makes of an answer."""
    cache, start = prefixes.of("dense")
    ends = pieces(case, "dense", "with", start)
    return scored(logits_of(model, cache, case, ends, start, lambda *_: nullcontext()), case, 1.0)


def outcome(
    model: Any, case: Case, prefixes: Prefixes, method: Method, settings: dict[str, Any], when: When = "with"
) -> Found:
    """What the model makes of an answer under a method, as `scored` gives it.

    Args:
        model: not patched.
        case: the prompt and the answer.
        prefixes: of this case.
        method: a variant.
        settings: of it.
        when: a cache is compressed.
    """
    read = Read(len(patchattn.find_sites(model)))

    def before(first: int, end: int) -> Any:
        if method.how == "question" and end <= len(case.text):
            return patchattn.unpatched(model) if method.alone else uncounted(read)
        if method.how == "prompt" and first == len(case.prompt) and case.task != TEXT:
            return patchattn.unpatched(model)  # it leaves decoding dense
        read.begin(first, end - first)
        return nullcontext()

    if method.variant == "squeezed":
        settings = {**settings, "clusters": prefixes.clustered()}
    if method.alone and method.how != "question":
        cache, start = prefixes.of("dense")
    elif method.shares and prefixes.known:
        with patched(model, method.variant, {**settings, "budget": EVERYTHING}):
            cache, start = prefixes.of(method.variant)
    else:
        cache, start = DynamicCache(config=model.config), 0
    drops_late = method.shares and method.how != "steps"  # what it remembers is of a variant with these settings
    given = {**settings, "budget": EVERYTHING} if drops_late else settings
    with patched(model, method.variant, given), patchattn.observe(model, read.see):
        if drops_late:
            set_budget(model, settings["budget"])
        logits = logits_of(model, cache, case, pieces(case, method.how, when, start), start, before)
    return scored(logits, case, read.density if read.reported else held_tokens(cache))
