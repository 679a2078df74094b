"""What the parts share: where models and texts are, losses, and what may be said of differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from paired_rows import Row, append_row, paired, read_rows
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCK, ROWS = 256, 2  # tokens of a row that is trained on, and rows of a step


@dataclass
class Setup:
    """What every part is given.

    Attributes:
        model: folder of SmolLM2-135M-Instruct; without it, nothing of it is measured.
        stories: folder of stories260K; likewise.
        text: file of plain text to measure SmolLM2 on.
        training: file of plain text to train it on.
        folder: for rows.
        seeds: how many, of everything that is trained.
        steps: of training SmolLM2 with LoRA.
        windows: texts of 512 tokens that are measured on.
        needles: prompts of 1024 tokens that hide a number.
    """

    model: Path | None
    stories: Path | None
    text: Path | None
    training: Path | None
    folder: Path
    seeds: int = 3
    steps: int = 200
    windows: int = 12
    needles: int = 4

    def rows(self, part: str) -> dict[str, Row]:
        """The rows of a part that are there, by key."""
        return read_rows(self.folder / f"{part}.jsonl")

    def write(self, part: str, key: str, row: Row) -> None:
        """Append a row."""
        append_row(self.folder / f"{part}.jsonl", key, row)

    @property
    def has_smol(self) -> bool:
        """Whether SmolLM2 can be trained and measured."""
        return None not in (self.model, self.text, self.training)

    @cached_property
    def tokenizer(self) -> Any:
        """Of SmolLM2."""
        return AutoTokenizer.from_pretrained(self.model)

    def smol(self) -> Any:
        """SmolLM2 in float32, loaded anew: training changes it."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    @cached_property
    def texts(self) -> torch.Tensor:
        """`(windows, 512)` tokens to measure on, spread over the text."""
        return windows(self._ids(self.text), 512, self.windows)

    @cached_property
    def train_ids(self) -> torch.Tensor:
        """`(n,)` tokens to train on."""
        return self._ids(self.training)

    def _ids(self, path: Path | None) -> torch.Tensor:
        if path is None:
            raise ValueError("SmolLM2 needs a text to measure on, and one to train on.")
        found = self.tokenizer(path.read_text("utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(found)


def windows(ids: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """`(count, length)`: pieces that lie evenly in a text."""
    whole = ids[: len(ids) // length * length].view(-1, length)
    if len(whole) < count:
        raise ValueError(f"The text has {len(whole)} pieces of {length} tokens, {count} are asked for.")
    return whole[torch.arange(count) * len(whole) // count]


def drawn(ids: torch.Tensor, steps: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Batches `(ROWS, BLOCK)` at places of a text that the seed draws, the same ones for each method."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - BLOCK + 1, (steps, ROWS), generator=generator)
    rows = [torch.stack([ids[start : start + BLOCK] for start in pair]) for pair in starts.tolist()]
    return [{"input_ids": row, "labels": row} for row in rows]


@torch.inference_mode()
def losses(model: Any, texts: torch.Tensor) -> list[float]:
    """Mean loss of every text `(n, T)`, in nats a token."""
    found = []
    for row in texts:
        logits = model(row[None], use_cache=False).logits[0, :-1].double()
        found.append(round(torch.nn.functional.cross_entropy(logits, row[1:]).item(), 5))
    return found


def perplexity(each: Sequence[float]) -> float:
    return math.exp(sum(each) / len(each))


class Claim(NamedTuple):
    """What is claimed, whether it is shown, and the size."""

    said: str
    shown: str
    size: str


def claim(said: str, found: Sequence[float], other: Sequence[float], unit: str, *, wants: int, of: str) -> Claim:
    """A difference of pairs: shown if its 95 % interval, by Student's t, lies on the right side of zero.

    Args:
        said: what is claimed.
        found: of each pair what the claim is about.
        other: what it is compared to.
        unit: of both.
        wants: 1 if the first is to be the larger one, -1 if the smaller.
        of: what the pairs are, as `seeds`.
    """
    if len(found) < 3:
        return Claim(said, "not measured", f"{len(found)} {of}, 3 are needed")
    difference, error = paired(found, other)
    around = float(stats.t.ppf(0.975, len(found) - 1)) * error
    opposite = "not shown; the opposite is" if -wants * difference > around else "not shown"
    shown = "**shown**" if wants * difference > around else opposite
    return Claim(said, shown, f"{difference:+.3g} ± {error:.2g} {unit}, {len(found)} {of}")
