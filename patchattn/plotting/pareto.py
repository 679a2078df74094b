"""Picture of what quality costs: accuracy over speed of several variants."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .style import BLUE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ParetoPoint:
    """One variant.

    Attributes:
        name: how it is called in the picture.
        score: quality, such as accuracy in percent.
        cost: such as seconds per text, or tokens per second where more is better.
    """

    name: str
    score: float
    cost: float


def pareto_front(
    points: Sequence[ParetoPoint], *, higher_is_better: bool = True, lower_cost_is_better: bool = True
) -> list[ParetoPoint]:
    """Those that no other point beats: none is as good in both and better in one. In the order of their cost."""

    def merits(point: ParetoPoint) -> tuple[float, float]:
        return (point.score if higher_is_better else -point.score, -point.cost if lower_cost_is_better else point.cost)

    def beats(one: ParetoPoint, other: ParetoPoint) -> bool:
        (a, b), (c, d) = merits(one), merits(other)
        return a >= c and b >= d and (a, b) != (c, d)

    return sorted((p for p in points if not any(beats(q, p) for q in points)), key=lambda p: (p.cost, p.score))


def plot_pareto(
    points: Sequence[ParetoPoint],
    *,
    score: str = "score",
    cost: str = "cost",
    higher_is_better: bool = True,
    lower_cost_is_better: bool = True,
    title: str = "Quality and cost",
) -> "Figure":
    """Score over cost, a point per variant; those that no other one beats in both are filled and joined.

    Args:
        points: the variants.
        score, cost: labels of the axes, with their units.
        higher_is_better: of the score.
        lower_cost_is_better: of the cost; false for speeds.
        title: of the picture.

    Returns:
        A figure; save it with `figure.savefig(path)`.

    Raises:
        ValueError: nothing to draw.
    """
    if not points:
        raise ValueError("There is nothing to draw: points must hold at least one.")

    from matplotlib.figure import Figure

    front = pareto_front(points, higher_is_better=higher_is_better, lower_cost_is_better=lower_cost_is_better)
    beaten = [point for point in points if point not in front]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [p.cost for p in front],
        [p.score for p in front],
        color=BLUE,
        marker="o",
        markersize=8,
        linewidth=1.2,
        label="not beaten in both",
    )
    axes.plot(
        [p.cost for p in beaten],
        [p.score for p in beaten],
        linestyle="none",
        marker="o",
        markersize=8,
        markerfacecolor="white",
        markeredgecolor="0.35",
        label="beaten",
    )
    axes.margins(0.14)
    for point in points:
        axes.annotate(
            point.name,
            (point.cost, point.score),
            textcoords="offset points",
            xytext=(8, 8),
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(f"{cost} ({'lower' if lower_cost_is_better else 'higher'} is better)")
    axes.set_ylabel(f"{score} ({'higher' if higher_is_better else 'lower'} is better)")
    axes.spines[["top", "right"]].set_visible(False)
    if beaten:
        axes.legend(fontsize=9, frameon=False)
    return figure
