"""The pictures of a report: scores of every task side by side, and what they cost."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...plotting.style import run_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# name of a cost, its heading, unit and divisor
COSTS = (
    ("first_token_seconds", "first token", "s", 1.0),
    ("tokens_per_second", "decoding", "tokens/s", 1.0),
    ("samples_per_second", "throughput", "samples/s", 1.0),
    ("peak_memory", "peak memory", "GiB", 2.0**30),
    ("cache_ratio", "kv cache", "of all keys", 1.0),
)
_WIDTH = 7.2


def plot_scores(report: Mapping[str, Any]) -> "Figure":
    """Main score of every task: a line per task with a marker per run; scores that are not percentages have axes alone.

    Args:
        report: of `patchattn.evaluation.run.compare.compare`.

    Returns:
        A figure; save it with `figure.savefig(path)`.
    """
    from matplotlib.figure import Figure

    shares = [name for name, task in report["tasks"].items() if task["unit"] == "%"]
    others = [[name] for name in report["tasks"] if name not in shares]
    groups = ([shares] if shares else []) + others
    heights = [0.75 + 0.42 * len(group) for group in groups]
    figure = Figure(figsize=(_WIDTH, 0.55 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        _draw_scores(axes, report, group)
    _legend(figure, panels[0])
    return figure


def plot_costs(report: Mapping[str, Any]) -> "Figure | None":
    """What every task cost: bars per task and run, a panel per kind of cost.

    Args:
        report: of `patchattn.evaluation.run.compare.compare`.

    Returns:
        A figure, or None if nothing was measured.
    """
    from matplotlib.figure import Figure

    runs, tasks = list(report["runs"]), report["tasks"]
    panels = [
        cost for cost in COSTS if any(cost[0] in run["costs"] for t in tasks.values() for run in t["runs"].values())
    ]
    if not panels:
        return None
    height = 1.3 + (0.12 + 0.16 * len(runs)) * len(tasks)
    figure = Figure(figsize=(2.0 + 2.0 * len(panels), height), layout="constrained")
    columns = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (key, title, unit, divisor) in zip(columns, panels, strict=True):
        for place, (run, (colour, _, hatch)) in enumerate(run_styles(runs).items()):
            values = [task["runs"][run]["costs"].get(key) for task in tasks.values()]
            y = [row + 0.8 * ((place + 0.5) / len(runs) - 0.5) for row in range(len(values))]
            found = [(at, value / divisor) for at, value in zip(y, values, strict=True) if value is not None]
            axes.barh(
                [at for at, _ in found],
                [value for _, value in found],
                height=0.72 / len(runs),
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.5,
                label=run,
            )
            for at, value in found:
                axes.annotate(f" {value:.3g}", (value, at), va="center", fontsize=7)
        axes.margins(x=0.2)
        axes.set_xlabel(f"{title}, {unit}", fontsize=9)
        _label_tasks(axes, list(tasks))
    _legend(figure, columns[0])
    return figure


def _draw_scores(axes: "Axes", report: Mapping[str, Any], names: Sequence[str]) -> None:
    for place, (run, (colour, marker, _)) in enumerate(run_styles(list(report["runs"])).items()):
        tasks = [report["tasks"][name] for name in names]
        values = [task["runs"][run]["scores"][task["main_score"]] for task in tasks]
        found = [(value, row) for row, value in enumerate(values) if value is not None]
        shift = 0.22 * (place - (len(report["runs"]) - 1) / 2)  # equal scores must not hide each other
        axes.plot(
            [value for value, _ in found],
            [row + shift for _, row in found],
            color=colour,
            marker=marker,
            markersize=7,
            markeredgecolor="white",
            linestyle="none",
            label=run,
            zorder=3 + place,
        )
    for row, name in enumerate(names):
        task = report["tasks"][name]
        known = [run["scores"][task["main_score"]] for run in task["runs"].values()]
        ends = [value for value in known if value is not None]
        if ends:
            axes.hlines(row, min(ends), max(ends), color="0.7", linewidth=2.5, zorder=1)
    task = report["tasks"][names[0]]
    if task["unit"] == "%":
        label = "main score, %"
        axes.set_xlim(*_limits(axes.get_xlim()))
    else:
        label = f"{task['main_score'].replace('_', ' ')}{', ' if task['unit'] else ''}{task['unit']}"
        axes.margins(x=0.15)
    axes.set_xlabel(label + ("" if task["higher_is_better"] else " (lower is better)"), fontsize=9)
    axes.grid(axis="x", color="0.92", zorder=0)
    axes.set_axisbelow(True)
    _label_tasks(axes, names)


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3), frameon=False, fontsize=9)


def _limits(found: tuple[float, float]) -> tuple[float, float]:
    """From 0 to 100, further down where a correlation is negative."""
    return min(-2.0, found[0]), max(102.0, found[1])


def _label_tasks(axes: "Axes", names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
