"""Perplexity of a causal language model by a sliding window, and its loss by position in the window."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...core.patching import applied_patches
from ...core.registry import variant_info
from ...core.selection import base_model
from ...core.settings import Settings, option
from .cost import measured
from .figures import plot_positions
from .generation import positions
from .haystack import read_texts
from .positions import check_positions
from .task import EvalTask, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DEFAULT_LENGTH = 1024
_LARGEST = 700.0  # whose exponential is a float64
_ROWS = 256  # of logits turned into losses at a time: all of a long window would take as much memory again


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings(Settings):
    """The text and the windows on it.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, or a stride that leaves no context.
    """

    data: str | None = option(
        None, help="A text file, or a folder with .txt files; None: the test part of WikiText-2 (raw) from the Hub."
    )
    max_length: int | None = option(
        None, help="Length of the window; None: the model's positions, at most 1024.", unit="tokens", minimum=2
    )
    stride: int | None = option(None, help="How far the window moves; None: half its length.", unit="tokens", minimum=1)
    buckets: int = option(8, help="Parts of the window whose losses are stated one by one.", minimum=1)
    parts: int = option(
        32, help="Samples that the windows are shared among: what a killed run and several processes go by.", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.stride is not None and self.stride >= self.max_length:
            raise ValueError(
                f"stride must be below max_length, {self.max_length}, or first tokens of windows would never be "
                f"predicted; got {self.stride}."
            )


@dataclass(frozen=True)
class Window:
    """Tokens that the model sees at once.

    Attributes:
        start, end: of the window in the text's tokens.
        first: the first token in it that no window before has scored.
    """

    start: int
    end: int
    first: int


def windows(tokens: int, max_length: int, stride: int) -> Iterator[Window]:
    """The windows on a text of so many tokens; together they score every token but the first, each once.

    A window starts `stride` tokens behind the one before, and scores what that had not reached: all but the first
    window's tokens are predicted from at least `max_length - stride` tokens before them.
    """
    first = 1
    for start in range(0, tokens, stride):
        end = min(start + max_length, tokens)
        if first < end:
            yield Window(start, end, first)
        first = end
        if end == tokens:
            return


class PerplexityTask(EvalTask):
    """Perplexity of a text.

    A row holds sums over one part of the windows: `nll` (nats) of `tokens` scored, `bytes` of UTF-8 that these stand
    for, and for every bucket of positions `position_nll` of `position_tokens`, for which all tokens of all windows
    count, and not only those that are scored: every bucket has as many.

    Scores are `perplexity`, `nats_per_token`, `bits_per_byte`, and `nats_per_token@<first>-<last>` for tokens with so
    many tokens before them in the window.

    Args:
        settings: fields of `PerplexitySettings`.

    Raises:
        TypeError, ValueError: a wrong or unknown setting, or a text that cannot be read or loaded.
        ImportError: a text from the Hub without `datasets`.
    """

    name = "perplexity"
    main_score = "perplexity"
    unit = ""
    higher_is_better = False

    def __init__(self, **settings: Any) -> None:
        self.settings = PerplexitySettings.from_dict(settings)
        self._text = wikitext() if self.settings.data is None else read_texts(self.settings.data)
        self._bytes = len(self._text.encode())
        self._tokenized: tuple[Any, torch.Tensor] | None = None

    def __len__(self) -> int:
        return self.settings.parts

    def identity(self) -> Mapping[str, Any]:
        """The settings, and a digest in place of the text, which may move."""
        digest = hashlib.sha256(self._text.encode()).hexdigest()
        return {"task_settings": {**self.settings.to_dict(), "data": digest}}

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """Refuse a model that cannot take the windows.

        Raises:
            ValueError: an encoder, a variant under which tokens know of later ones, a table of too few positions, a
                stride as long as the window, more buckets than positions, or a text of less than two tokens.
        """
        if model.config.is_encoder_decoder:
            raise ValueError(f"{type(model).__name__} has an encoder; expected a model with a decoder alone.")
        ahead = [patch.variant for patch in applied_patches(base_model(model)) if patch.looks_ahead]
        if dropping := [name for name in ahead if variant_info(name).kind == "cache"]:
            raise ValueError(
                f"Under {dropping[0]!r} a window in one forward is that of the unpatched model: keys are dropped "
                "between calls, by scores of the calls before."
            )
        if ahead:
            raise ValueError(
                f"Under {ahead[0]!r} the rows of one forward depend on later ones: it would know what it is to predict."
            )
        length, _ = self._sizes(model)
        check_positions(model, length)
        if len(self._tokens(tokenizer)) < 2:
            raise ValueError("The text has fewer than two tokens: there is nothing to predict.")

    def answer(self, model: Any, tokenizer: Any, indices: Sequence[int]) -> list[Row]:
        """Sums over the windows of some parts; as many windows go through the model at once as there are parts."""
        tokens = self._tokens(tokenizer)
        length, stride = self._sizes(model)
        found = list(windows(len(tokens), length, stride))
        shares = [
            found[len(found) * index // self.settings.parts : len(found) * (index + 1) // self.settings.parts]
            for index in indices
        ]
        rows = [self._row(part, len(tokens), length) for part in shares]
        with torch.inference_mode(), measured(model) as cost:
            for turn in range(max(map(len, shares))):
                now = [(row, part[turn]) for row, part in zip(rows, shares, strict=True) if turn < len(part)]
                for size in sorted({window.end - window.start for _, window in now}):  # the last one may be shorter
                    alike = [(row, window) for row, window in now if window.end - window.start == size]
                    inputs = torch.stack([tokens[window.start : window.end] for _, window in alike])
                    for (row, window), losses in zip(alike, _losses(model, inputs), strict=True):
                        self._add(row, window, losses)
        return [{**row, **cost.row()} for row in rows]

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """See the class.

        Raises:
            ValueError: there are rows of the first parts alone, and no window is in these.
        """
        nll, tokens = math.fsum(row["nll"] for row in rows), sum(row["tokens"] for row in rows)
        if not tokens:
            raise ValueError(f"None of the {len(rows)} parts answered has a window: set fewer parts, or answer all.")
        mean = nll / tokens
        scores = {
            "perplexity": math.exp(mean) if mean < _LARGEST else math.inf,
            "nats_per_token": mean,
            "bits_per_byte": nll / math.log(2) / sum(row["bytes"] for row in rows),
        }
        return scores | {f"nats_per_token@{part.first}-{part.last}": part.nats for part in position_losses(rows)}

    def figure(self, rows: Mapping[str, Sequence[Row]]) -> "Figure":
        """Loss by position, a line per run."""
        return plot_positions({name: position_losses(answers) for name, answers in rows.items()})

    def _tokens(self, tokenizer: Any) -> torch.Tensor:
        if self._tokenized is None or self._tokenized[0] is not tokenizer:
            # the text is longer than the model's positions on purpose
            self._tokenized = tokenizer, torch.tensor(tokenizer(self._text, verbose=False)["input_ids"])
        return self._tokenized[1]

    def _sizes(self, model: Any) -> tuple[int, int]:
        """Length and stride of the windows."""
        length = self.settings.max_length or min(positions(model) or _DEFAULT_LENGTH, _DEFAULT_LENGTH)
        stride = self.settings.stride or length // 2
        if stride >= length:
            raise ValueError(f"stride must be below the length of the window, {length}, got {stride}.")
        if self.settings.buckets >= length:
            raise ValueError(f"buckets must be below the length of the window, {length}, got {self.settings.buckets}.")
        return length, stride

    def _row(self, part: Sequence[Window], tokens: int, length: int) -> Row:
        # bytes are shared by tokens, the first token's with the second's: over all parts they add up to the text's
        ends = (0 if part[0].first == 1 else part[0].first, part[-1].end) if part else (0, 0)
        share = self._bytes * ends[1] // tokens - self._bytes * ends[0] // tokens
        zeros = [0] * self.settings.buckets
        sums = {"nll": 0.0, "tokens": 0, "bytes": share, "prompt_tokens": 0}
        return {**sums, "max_length": length, "position_nll": [0.0] * len(zeros), "position_tokens": zeros}

    def _add(self, row: Row, window: Window, losses: torch.Tensor) -> None:
        scored = losses[window.first - window.start - 1 :]
        row["nll"] += float(scored.sum())
        row["tokens"] += len(scored)
        row["prompt_tokens"] += window.end - window.start
        before = torch.arange(1, len(losses) + 1)
        for bucket in range(self.settings.buckets):
            first, last = _bucket(row, bucket)
            chosen = losses[(before >= first) & (before <= last)]
            row["position_nll"][bucket] += float(chosen.sum())
            row["position_tokens"][bucket] += len(chosen)


@dataclass(frozen=True)
class PositionLoss:
    """Loss of tokens by how much of the text the model sees before them.

    Attributes:
        first, last: number of tokens before them in the window.
        nats: mean loss per token.
        tokens: how many.
    """

    first: int
    last: int
    nats: float
    tokens: int


def position_losses(rows: Sequence[Mapping[str, Any]]) -> list[PositionLoss]:
    """The mean loss in every bucket of positions that has tokens, from rows of the task `perplexity`.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("There are no rows of the task perplexity.")
    found = []
    for bucket in range(len(rows[0]["position_nll"])):
        tokens = sum(row["position_tokens"][bucket] for row in rows)
        if tokens:
            nll = math.fsum(row["position_nll"][bucket] for row in rows)
            found.append(PositionLoss(*_bucket(rows[0], bucket), nll / tokens, tokens))
    return found


def wikitext() -> str:
    """The test part of WikiText-2, raw, from the Hub, its lines joined by empty lines.

    Raises:
        ValueError: the Hub cannot be reached.
        ImportError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'Loading WikiText needs {error.name}: pip install "patchattn[eval]"') from error
    try:
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"WikiText cannot be loaded from the Hub ({reason}). Give data, a text file.") from error
    return "\n\n".join(rows["text"])


def _bucket(row: Mapping[str, Any], bucket: int) -> tuple[int, int]:
    """The least and the greatest number of tokens before those of a bucket; no token has none before it."""
    length, count = row["max_length"] - 1, len(row["position_nll"])
    return 1 + length * bucket // count, length * (bucket + 1) // count


def _losses(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood, in nats, of every token but the first of each row `(B, T)`: `(B, T - 1)`, float64."""
    inputs = inputs.to(model.device)
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = inputs[:, 1:].flatten().to(logits.device)
    losses = [
        torch.nn.functional.cross_entropy(
            logits[start : start + _ROWS].float(), targets[start : start + _ROWS], reduction="none"
        )
        for start in range(0, len(targets), _ROWS)
    ]
    return torch.cat(losses).cpu().double().view(len(inputs), -1)
