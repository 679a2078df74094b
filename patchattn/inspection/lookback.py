"""Lookback Lens: how much of each head's attention goes to the context, and what that tells. arXiv 2407.07071."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from patchattn_kernels.rows import full_precision, row_logits

from ..core.call import AttentionCall
from ..core.heads import BaseFacts, parse_facts
from ..core.probing import probed
from ..core.selection import base_model, select_sites
from ..core.sites import AttentionSite
from ..core.token_numbers import key_numbers
from ..decoding.chunks import Chunk, ChunkScore
from ..decoding.text import checked_span
from ..files.documents import naming, quoted, read_json_object, write_json
from .channels import on_device

_ROWS = 64  # of queries, whose attention is computed at a time


@torch.no_grad()
def lookback_ratios(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    context: Sequence[Sequence[int]],
    answer: Sequence[int],
    modules: str | None = None,
) -> list[torch.Tensor]:
    """Lookback ratio of every query head at each token of an answer.

    With X the mean of a row's attention over the context's tokens and Y that over all later tokens that it sees, its
    own included, the ratio is `X / (X + Y)`; with none, Y is 0. The row is the one that the token is predicted from.
    The answer is forced: one forward over prompt and answer, in place of generating it; a few rows of attention at a
    time.

    Args:
        model: a causal language model in evaluation mode, patched or not.
        inputs: one batch: `input_ids` and, with padding on either side, `attention_mask`.
        context: for every sequence the number of its context's first token and of the one after its last; the first
            token that is no padding is 0.
        answer: for every sequence how many of its last tokens are the answer.
        modules: which attention modules, as in `patch_model`, where the model has several towers.

    Returns:
        For every sequence `(n, L, H)` of its n answer tokens, in float32 or wider.

    Raises:
        ValueError: a model in training mode, not as many spans and answers as sequences, an answer of no token or that
            begins before the end of the context, or an attention module that is not run.
        TypeError: a span that is none.
        NotImplementedError: keys have been dropped or gathered, so that a key is no token of the text; layers of
            unequal heads; or a variant computes attention itself, as `act` does.
    """
    base: Any = base_model(model)
    if base.training:
        raise ValueError("lookback_ratios needs a model in evaluation mode: model.eval().")
    given = on_device(base, inputs)
    ids, mask = given["input_ids"], given.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    numbers = torch.where(real, real.long().cumsum(-1) - 1, -1)
    spans, lengths = [checked_span(span) for span in context], real.sum(-1).tolist()
    if not len(spans) == len(answer) == len(ids):
        raise ValueError(f"There are {len(spans)} contexts and {len(answer)} answers for {len(ids)} sequences.")
    for row, ((_, stop), count, length) in enumerate(zip(spans, answer, lengths, strict=True)):
        if not 1 <= count <= length - stop:
            raise ValueError(
                f"Sequence {row} has {length} tokens: an answer of {count} does not lie behind the context, which ends "
                f"at {stop}."
            )
    sites = _sites(base, modules)
    first = torch.tensor(lengths, device=ids.device) - torch.tensor(list(answer), device=ids.device) - 1
    wanted = (numbers >= first[:, None]) & (numbers < real.sum(-1, keepdim=True) - 1)
    rows = wanted.any(0).nonzero()[:, 0]
    found: dict[str, torch.Tensor] = {}

    def see(call: AttentionCall, output: torch.Tensor) -> None:
        if call.branch == 0:
            found[call.site.name] = _ratios(call, spans, rows)

    with probed(base, see, modules=[f"^{site.name}$" for site in sites], at="base"):
        base(**given, use_cache=False)
    of_rows = _stacked(found, sites)  # (B, R, L, H)
    return [of_rows[row, wanted[row, rows].to(of_rows.device)] for row in range(len(ids))]


def lookback_windows(ratios: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """Features of an answer: the mean ratio over all its tokens, or over each run of so many of them.

    Args:
        ratios: `(n, L, H)` of one answer.
        size: tokens of a window; `None`: the whole answer, at most n.

    Returns:
        `(windows, L * H)`, first layer first.

    Raises:
        ValueError: no token, or a window longer than the answer.
    """
    count = len(ratios)
    size = count if size is None else size
    if not 1 <= size <= count:
        raise ValueError(f"A window has 1 to {count} tokens, as many as the answer has, got {size}.")
    return ratios.flatten(1).unfold(0, size, 1).mean(-1)


@dataclass(frozen=True)
class LookbackProbe:
    """A logistic regression on lookback ratios: how likely an answer keeps to its context.

    Attributes:
        weights: of every layer's query heads, first layer first.
        bias: added to their sum.
        base: the model that it is of.
    """

    weights: tuple[tuple[float, ...], ...]
    bias: float
    base: BaseFacts

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        features: torch.Tensor,
        labels: Sequence[int] | torch.Tensor,
        *,
        modules: str | None = None,
        regularisation: float = 1.0,
    ) -> "LookbackProbe":
        """Fit it by scikit-learn, unscaled and with up to 1000 iterations as the released code does.

        Args:
            model: that the features are of.
            features: `(N, L * H)` of `lookback_windows`.
            labels: N of them, 1 for what keeps to its context, 0 for what does not.
            modules: as of `lookback_ratios`.
            regularisation: scikit-learn's C: the larger, the less.

        Raises:
            ValueError: features of other heads than the model's, or labels that are not 0 and 1, both there.
            ImportError: there is no scikit-learn (`pip install patchattn[eval]`).
        """
        from sklearn.linear_model import LogisticRegression

        base = base_model(model)
        sites = _sites(base, modules)
        heads = sites[0].query_heads or 0
        shape, known = (len(sites) * heads), sorted(set(torch.as_tensor(labels).tolist()))
        if features.dim() != 2 or features.shape[1] != shape:
            raise ValueError(f"Expected {shape} features, of {len(sites)} layers, got {tuple(features.shape)}.")
        if known != [0, 1] or len(labels) != len(features):
            raise ValueError(f"Expected a label 0 or 1 of each of {len(features)} rows, both there, got {known}.")
        found = LogisticRegression(max_iter=1000, C=regularisation)
        found.fit(features.double().cpu().numpy(), np.asarray(torch.as_tensor(labels).cpu()))
        weights = tuple(tuple(map(float, layer)) for layer in found.coef_.reshape(len(sites), heads))
        return cls(weights, float(found.intercept_[0]), BaseFacts.of(base, sites[0]))

    def probability(self, features: torch.Tensor) -> torch.Tensor:
        """`(N,)` probability of class 1 of features `(N, L * H)`."""
        weights = torch.tensor(self.weights, dtype=torch.float64).flatten()
        return (features.double().cpu() @ weights + self.bias).sigmoid()

    def save(self, path: str | Path, **about: Any) -> None:
        """Write it as JSON; `about` is noted beside it."""
        content = {"weights": [list(layer) for layer in self.weights], "bias": self.bias, "base": vars(self.base)}
        write_json(Path(path), {**content, "about": about})

    @classmethod
    def load(cls, path: str | Path) -> "LookbackProbe":
        """Read what `save` wrote; ValueError or TypeError, naming the file, on anything else."""
        content = read_json_object(path)
        try:
            if not {"weights", "bias", "base"} <= set(content) <= {"weights", "bias", "base", "about"}:
                raise ValueError(f"A probe has the fields weights, bias, base and about, got {quoted(list(content))}.")
            facts, given = parse_facts(content["base"]), content["weights"]
            shaped = isinstance(given, list) and len(given) == facts.layers
            if not shaped or any(not isinstance(layer, list) or len(layer) != facts.heads for layer in given):
                raise ValueError(f"A probe of {facts} has {facts.layers} lists of {facts.heads} weights.")
            numbers = [*(number for layer in given for number in layer), content["bias"]]
            if any(isinstance(one, bool) or not isinstance(one, int | float) for one in numbers):
                raise TypeError("The weights and the bias of a probe are numbers.")
            if not all(map(math.isfinite, numbers)):
                raise ValueError("A weight of the probe is not finite.")
        except (TypeError, ValueError) as error:
            raise naming(path, error) from error
        return cls(tuple(tuple(map(float, layer)) for layer in given), float(content["bias"]), facts)


class LookbackScore(ChunkScore):
    """Judges chunks by a `LookbackProbe`, on the mean ratios of their tokens: Lookback Lens Guided Decoding.

    For `BestOfChunks`.

    Args:
        probe: of the model.
        context: as of `lookback_ratios`, for the prompts of one `generate`.
        modules: likewise.
    """

    def __init__(self, probe: LookbackProbe, context: Sequence[Sequence[int]], *, modules: str | None = None) -> None:
        self.probe, self.spans, self.modules = probe, [checked_span(span) for span in context], modules
        self._sites: list[AttentionSite] = []
        self._found: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        base = base_model(model)
        self._sites = _sites(base, self.modules)
        self.probe.base.check(base, self._sites[0], "lookback probe")

        def see(call: AttentionCall, output: torch.Tensor) -> None:
            if call.branch == 0:
                repeated, left = divmod(len(call.query), max(len(self.spans), 1))
                if left or not repeated:
                    raise ValueError(f"There are {len(self.spans)} contexts for a batch of {len(call.query)} rows.")
                spans = [span for span in self.spans for _ in range(repeated)]
                last = torch.tensor([call.query.shape[2] - 1], device=call.query.device)
                self._found[call.site.name] = _ratios(call, spans, last)

        with probed(base, see, modules=[f"^{site.name}$" for site in self._sites], at="base"):
            try:
                yield
            finally:
                self._found.clear()

    def look(self) -> torch.Tensor:
        found = _stacked(self._found, self._sites)[:, 0].flatten(1)
        self._found.clear()
        return found

    def score(self, chunk: Chunk) -> torch.Tensor:
        looks, real = chunk.looks, chunk.real
        if looks is None:
            raise ValueError("LookbackScore judges what it has looked at: give it to BestOfChunks.")
        weights = real.to(looks).unsqueeze(-1)
        mean = (looks * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return self.probe.probability(mean).to(chunk.ids.device)


def _sites(base: nn.Module, modules: str | None) -> list[AttentionSite]:
    """Self-attention of one tower, of equal heads."""
    sites = [site for site in select_sites(base, modules=modules) if not site.is_cross]
    if len({(site.tower, site.query_heads) for site in sites}) != 1 or sites[0].query_heads is None:
        raise NotImplementedError("Lookback ratios are of the layers of one tower, of equal heads: choose modules=...")
    return sites


def _stacked(found: Mapping[str, torch.Tensor], sites: Sequence[AttentionSite]) -> torch.Tensor:
    """`(B, R, L, H)` of `(B, R, H)` by attention module."""
    if missing := [site.name for site in sites if site.name not in found]:
        raise ValueError(f"{missing[0]} was not run on a text. Leave it out with modules=...")
    return torch.stack([found[site.name] for site in sites], dim=2)


def _ratios(call: AttentionCall, spans: Sequence[tuple[int, int]], rows: torch.Tensor) -> torch.Tensor:
    """`(B, R, H)` on the CPU: lookback ratios of some rows."""
    if call.mask.index is not None or call.query.shape[1] != call.site.query_heads or call.mask.extra:
        raise NotImplementedError(f"Keys of {call.site.name} are no longer the tokens of the text, one by one.")
    numbers = key_numbers(call.mask).expand(len(call.query), -1)
    limits = torch.tensor(spans, device=numbers.device)
    is_real = call.mask.real_keys()[:, 0]
    inside = is_real & (numbers >= limits[:, :1]) & (numbers < limits[:, 1:])
    after = is_real & (numbers >= limits[:, 1:])
    query, key, rule = full_precision(call.query), full_precision(call.key), call.rule()
    parts = []
    for some in rows.split(_ROWS):
        logits = row_logits(query, key, rule, some)
        # of rows that see nothing at all the ratio is 0; a sink in the softmax would leave it as it is
        weights = logits.softmax(-1).nan_to_num(0.0)
        seen = logits > float("-inf")
        back, new = (_mean(weights, seen & keys[:, None, None]) for keys in (inside, after))
        parts.append((back / (back + new)).nan_to_num(0.0).transpose(1, 2).cpu())
    return torch.cat(parts, dim=1)


def _mean(weights: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """`(B, H, R)` mean weight of some keys, 0 of none."""
    return (weights * among).sum(-1) / among.sum(-1).clamp(min=1)
