"""What the parts share: where models, texts and rows are, and models of the same weights that rotate otherwise."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from paired_rows import Row, append_row, paired, read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchattn
from patchattn.evaluation.report.report import markdown_table


@dataclass
class Setup:
    """What every part is given.

    Attributes:
        model: folder of SmolLM2-135M-Instruct; without it, nothing of it is measured.
        stories: folder of stories260K; likewise.
        text: file of plain text to measure on.
        training: file of plain text to train a small model on.
        longbench: folder with hotpotqa.json and the like, prompts as LongBench writes them; without it no natural ones.
        folder: for rows.
        models: folder for the small model.
        samples: rows and prompts of each kind.
        seeds: of the small model.
        glue: folder with GLUE's SST-2; without it, no demonstrations.
    """

    model: Path | None
    stories: Path | None
    text: Path
    training: Path | None
    longbench: Path | None
    folder: Path
    models: Path
    samples: int
    seeds: tuple[int, ...] = (0, 1)
    glue: Path | None = None
    loaded: dict[str, Any] = field(default_factory=dict)

    def rows(self, part: str) -> dict[str, Row]:
        """The rows of a part that are there, by key."""
        return read_rows(self.folder / f"{part}.jsonl")

    def write(self, part: str, key: str, row: Row) -> None:
        """Append a row."""
        append_row(self.folder / f"{part}.jsonl", key, row)

    @cached_property
    def smol(self) -> tuple[Any, Any]:
        """SmolLM2 in float32, and its tokenizer."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval(), self.tokenizer

    @cached_property
    def tokenizer(self) -> Any:
        """Of SmolLM2."""
        return AutoTokenizer.from_pretrained(self.model)


def rotating(model: Any, **rope: Any) -> Any:
    """A model of the same weights, not copied, whose configuration says another rotary embedding."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = {**config.rope_parameters, **rope}
    with torch.device("meta"):
        other = type(model)(config)
    rotary = type(other.model.rotary_emb)(config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    other.model.rotary_emb = rotary
    return other.eval()


@contextmanager
def patched(model: Any, variants: Mapping[str, Mapping[str, Any]]) -> Iterator[Any]:
    """The model under variants, settings by name, the first one outermost; as it is under none."""
    if not variants:
        yield model
        return
    for name, settings in variants.items():  # each goes inside those that are there
        patchattn.patch_model(model, name, dict(settings))
    try:
        yield model
    finally:
        patchattn.unpatch_model(model)


def scored(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tokens `(n,)` that logits `(n, V)` are of: whether each is the most likely one, and its loss in nats."""
    loss = torch.nn.functional.cross_entropy(logits.double(), tokens, reduction="none")
    return logits.argmax(-1) == tokens, loss


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def signed(found: Sequence[float], other: Sequence[float], digits: int) -> str:
    """Mean difference of pairs, and its standard error where there are two."""
    difference, error = paired(found, other)
    return f"{difference:+.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> list[str]:
    """Lines of a table in Markdown, and an empty one."""
    return [*markdown_table(list(head), [list(row) for row in rows], texts=texts), ""]


def answers_table(settings: Iterable[str], found: Sequence[Row]) -> list[str]:
    """What settings answered, in pairs with `plain`: of each prompt, by setting, whether it was right, and the loss.

    Settings that the prompts were not asked under are left out.
    """
    cells = []
    for setting in settings:
        if setting not in found[0]:
            continue
        right, loss = (
            ([factor * row[setting][n] for row in found], [factor * row["plain"][n] for row in found])
            for n, factor in ((0, 100.0), (1, 1.0))
        )
        changed = ["", ""] if setting == "plain" else [signed(*right, 1), signed(*loss, 2)]
        cells.append([setting, f"{mean(right[0]):.0f}", changed[0], f"{mean(loss[0]):.2f}", changed[1]])
    return table(["", "right, %", "difference", "loss, nats", "difference"], cells)
