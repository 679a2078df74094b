"""Results as pictures: time over length, or bars where there is one length only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..plotting.style import GREY, SERIES
from .report import OPERATIONS
from .result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_operation(results: Sequence[Result], op: str) -> "Figure | None":
    """One panel per shape, mode and share of active heads; `None` if nothing of the operation was measured.

    Args:
        results: of any operations.
        op: which one to draw.
    """
    rows = [row for row in results if row.case.op == op and row.seconds is not None]
    if not rows:
        return None
    from matplotlib.figure import Figure

    panels: dict[str, list[Result]] = {}
    for row in rows:
        panels.setdefault(_panel(row), []).append(row)
    names = list(dict.fromkeys(row.implementation for row in rows))
    styles = {name: SERIES[place % len(SERIES)] for place, name in enumerate(names)}
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(max(5.5, 4.6 * columns), 0.6 + 3.1 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (title, own) in zip(grid, panels.items(), strict=False):
        draw = _lines if len({row.case.tokens for row in own}) > 1 else _bars
        draw(axes, own, styles)
        axes.set_title(title, fontsize=9)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(OPERATIONS[op], fontsize=11)
    return figure


def _panel(row: Result) -> str:
    case = row.case
    active = f", {case.active:.0%} active" if case.active < 1.0 else ""
    return f"{case.shape}, {case.mode}{active}{'' if case.pattern == 'uniform' else ', ' + case.pattern}"


def _lines(axes: "Axes", rows: Sequence[Result], styles: dict[str, tuple[str, str]]) -> None:
    for name, (colour, marker) in styles.items():
        own = sorted((r.case.tokens, 1e3 * r.seconds) for r in rows if r.implementation == name and r.seconds)
        if own:
            axes.plot(*zip(*own, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens", fontsize=8)
    axes.set_ylabel("ms (log)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _bars(axes: "Axes", rows: Sequence[Result], styles: dict[str, tuple[str, str]]) -> None:
    """Bars from the fastest down, each with its quartiles and its floor."""
    rows = sorted(rows, key=lambda row: row.seconds or 0.0, reverse=True)
    times = [1e3 * (row.seconds or 0.0) for row in rows]
    spread = [
        [time - 1e3 * (row.low or 0.0) for time, row in zip(times, rows, strict=True)],
        [1e3 * (row.high or 0.0) - time for time, row in zip(times, rows, strict=True)],
    ]
    colours = [styles[row.implementation][0] for row in rows]
    axes.barh(range(len(rows)), times, xerr=spread, color=colours, height=0.65, ecolor=GREY, capsize=2)
    for place, (time, row) in enumerate(zip(times, rows, strict=True)):
        axes.annotate(f"{time:.3g}", (1e3 * (row.high or 0.0), place), (4, 0), textcoords="offset points",
                      va="center", fontsize=7)  # fmt: skip
    if rows[0].floor is not None:
        axes.axvline(1e3 * rows[0].floor, color=GREY, linestyle=":", linewidth=1.2, label="floor")
        axes.legend(fontsize=7, loc="upper right")
    axes.set_yticks(range(len(rows)), [row.implementation for row in rows], fontsize=8)
    axes.set_xlim(0, 1.2 * max(1e3 * (row.high or 0.0) for row in rows))
    axes.set_xlabel(f"ms, {rows[0].case.tokens} tokens x {rows[0].case.batch}", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
