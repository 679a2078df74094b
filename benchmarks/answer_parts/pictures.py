"""Pictures: what answers lose over the share of the keys."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from patchattn.plotting.style import SERIES

from .rows import differences
from .tables import NATS, SHARE, Rows, Setting, mean

_BASELINE = ("0.45", "P", "--")  # colour, marker and line


def plot(
    path: Path,
    panels: Mapping[str, tuple[Rows, Sequence[Setting]]],
    *,
    share: str,
    baselines: Collection[str],
    columns: int = 3,
    lost: str = "nats a token lost",
) -> None:
    """A panel per group: mean difference to dense with its standard error over the mean share of the keys.

    Args:
        path: of the picture.
        panels: title to rows of prompts and the settings that are drawn, at most six methods beside a baseline.
        share: label of the axis.
        baselines: the methods that are drawn in grey.
        columns: panels beside each other.
        lost: label of the upward axis.
    """
    from matplotlib.figure import Figure

    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 3.7 * columns, 0.6 + 3.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes, (title, (rows, settings)) in zip(grid, panels.items(), strict=False):
        methods = list(dict.fromkeys(setting.method for setting in settings))
        others = iter(SERIES)
        for method in methods:
            style = _BASELINE if method in baselines else (*next(others), "-")
            points = []
            for setting in settings:
                if setting.method == method:
                    count, _, difference, error = differences(rows, setting.name, "dense", NATS)
                    if count:
                        where = 100 * mean(rows, setting.name, SHARE)
                        points.append((where, difference, 0.0 if math.isnan(error) else error))
            if points:
                x, y, error = zip(*sorted(points), strict=True)
                colour, marker, line = style
                axes.errorbar(
                    x, y, error, color=colour, marker=marker, linestyle=line, markersize=5, linewidth=1.2, label=method
                )
        axes.axhline(0, color="0.6", linestyle=":", linewidth=0.8, zorder=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(share)
        axes.set_xlim(0, 102)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    for axes in list(grid):
        axes.set_visible(False)
    figure.axes[0].set_ylabel(lost)
    figure.savefig(path, dpi=110)
