"""Picture of what quality costs: accuracy over speed of several variants."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from .style import BLUE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
        score: label of the upward axis, with its unit.
        cost: label of the other axis, with its unit.
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
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(f"{cost} ({'lower' if lower_cost_is_better else 'higher'} is better)")
    axes.set_ylabel(f"{score} ({'higher' if higher_is_better else 'lower'} is better)")
    axes.spines[["top", "right"]].set_visible(False)
    if beaten:
        figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    _name_points(figure, axes, points)
    return figure


def _name_points(figure: "Figure", axes: "Axes", points: Sequence[ParetoPoint]) -> None:
    """A name near every point, where it covers no point and no other name, with a line to its point."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # only now it is known where points lie
    places = axes.transData.transform([(point.cost, point.score) for point in points])
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in places]
    inside, pixels = axes.get_window_extent(), figure.dpi / 72
    for point, (x, y) in zip(points, places, strict=True):
        sample = axes.text(0, 0, point.name, fontsize=9)
        width, height = sample.get_window_extent().size
        sample.remove()
        for distance, angle, side in product(range(12, 140, 8), sorted(range(-75, 90, 15), key=abs), (1, -1)):
            right, up = side * distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
            left = x + right * pixels - (0 if side > 0 else width)
            box = Bbox.from_bounds(left, y + up * pixels - height / 2, width, height)
            is_inside = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if is_inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        axes.annotate(
            point.name,
            (point.cost, point.score),
            xytext=(right, up),
            textcoords="offset points",
            fontsize=9,
            verticalalignment="center",
            horizontalalignment="left" if side > 0 else "right",
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        ).set_in_layout(False)
