"""What the demo found: a table for the eye, the same in Markdown, and all numbers in JSON."""

import json
import platform
import statistics
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

COLUMNS = (
    "variant",
    "accuracy, %",
    "active heads, %",
    "LoRA adds",
    "variant adds",
    "tokens/s",
    "exact undo",
)


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: what was trained.
        accuracy: share of right answers, one per seed.
        lora_parameters, variant_parameters: number of added values.
        tokens_per_second: inference speed.
        restored: whether the base model's outputs came back to the last bit, for every seed; `None` for the base.
        head_usage: per seed and layer, the share of tokens that use each head; empty where all heads are on.
    """

    name: str
    accuracy: list[float] = field(default_factory=list)
    lora_parameters: int = 0
    variant_parameters: int = 0
    tokens_per_second: float = 0.0
    restored: bool | None = None
    head_usage: list[list[list[float]]] = field(default_factory=list)

    @property
    def active_heads(self) -> float:
        """Mean share of the heads that are on for a token."""
        shares = [share for seed in self.head_usage for layer in seed for share in layer]
        return statistics.fmean(shares) if shares else 1.0

    def mean_usage(self) -> list[list[float]]:
        """Per layer, the share of tokens that use each head, averaged over seeds."""
        layers = zip(*self.head_usage, strict=True)
        return [[statistics.fmean(head) for head in zip(*seeds, strict=True)] for seeds in layers]

    def cells(self) -> list[str]:
        """The line as text."""
        accuracy = f"{100 * statistics.fmean(self.accuracy):.1f}"
        if len(self.accuracy) > 1:
            accuracy += f" ± {100 * statistics.stdev(self.accuracy):.1f}"
        return [
            self.name,
            accuracy,
            f"{100 * self.active_heads:.1f}",
            f"{self.lora_parameters:,}",
            f"{self.variant_parameters:,}",
            f"{self.tokens_per_second:,.0f}",
            {None: "-", True: "yes", False: "NO"}[self.restored],
        ]


@dataclass
class Report:
    """Everything the demo found.

    Attributes:
        task, model: what it ran on.
        seeds: one training per seed and variant.
        settings: steps, batch size, learning rates and LoRA rank, the same for all.
        rows: the table.
        seconds: wall time of everything.
        versions: of the packages that matter.
    """

    task: str
    model: str
    seeds: list[int]
    settings: dict[str, Any]
    rows: list[Row]
    seconds: float
    versions: dict[str, str]

    def title(self) -> str:
        """What the table shows."""
        seeds = f"mean ± standard deviation of {len(self.seeds)} seeds" if len(self.seeds) > 1 else "one seed"
        return f"{self.task} on {self.model}, {self.settings['steps']} steps, {seeds}"

    def table(self) -> Table:
        """The table for a terminal."""
        table = Table(title=self.title(), padding=(0, 0))
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == COLUMNS[0] else "right", min_width=6)
        table.columns[0].no_wrap = True
        for row in self.rows:
            table.add_row(*row.cells())
        return table

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON types."""
        rows = [{**asdict(row), "active_heads": row.active_heads} for row in self.rows]
        return {**asdict(self), "rows": rows}

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *(row.cells() for row in self.rows)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"

    def write(self, folder: Path) -> None:
        """Write `results.json` and `table.md`."""
        (folder / "results.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        (folder / "table.md").write_text(self.markdown(), encoding="utf-8")


def installed_versions() -> dict[str, str]:
    """Python and the packages that the numbers depend on."""
    packages = ("patchattn", "torch", "transformers", "peft")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
