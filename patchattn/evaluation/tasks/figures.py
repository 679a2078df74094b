"""Pictures of what long contexts do to a model. matplotlib is imported only when one is drawn."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from ...plotting.style import run_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


class Grid(Protocol):
    """What is drawn of a needle's grid: `evaluation.tasks.needle.NeedleGrid`."""

    @property
    def depths(self) -> Sequence[float]: ...
    @property
    def lengths(self) -> Sequence[int]: ...
    @property
    def scores(self) -> Sequence[Sequence[float]]: ...


class Bucket(Protocol):
    """What is drawn of some positions: `evaluation.tasks.perplexity.PositionLoss`."""

    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...
    @property
    def nats(self) -> float: ...


_WITH_NUMBERS = 200  # cells up to which each shows its number


def plot_needle(grids: Mapping[str, Grid], *, title: str = "Needle in a haystack") -> "Figure":
    """Heat maps of how well a needle is found, by its depth and the length of the prompt.

    Args:
        grids: name of each model to what `evaluation.tasks.needle.needle_grid` returns; one picture beside the
            other, in the same colours.
        title: of the figure.

    Returns:
        A figure; save it with `figure.savefig(path)`. Cells where nothing was asked are white.

    Raises:
        ValueError: nothing to draw.
    """
    if not grids:
        raise ValueError("There is nothing to draw: grids must hold at least one.")

    from matplotlib.figure import Figure

    columns = [max(3, len(grid.lengths)) for grid in grids.values()]
    rows = max(len(grid.depths) for grid in grids.values())
    size = (1.9 + sum(0.7 + 0.55 * count for count in columns), min(12.0, max(3.4, 1.7 + 0.36 * rows)))
    figure = Figure(figsize=(max(min(18.0, size[0]), 0.085 * len(title) + 0.5), size[1]), layout="constrained")
    figure.suptitle(title, fontsize=11)
    pictures = figure.subplots(1, len(grids), squeeze=False, width_ratios=columns)[0]
    for axes, (name, grid) in zip(pictures, grids.items(), strict=True):
        image = _draw_grid(axes, grid)
        axes.set_title(name, fontsize=10)
    pictures[0].set_ylabel("depth of the needle, % of the text")
    figure.colorbar(image, ax=pictures.tolist(), label="needle found, %")
    return figure


def _draw_grid(axes: "Axes", grid: Grid) -> "AxesImage":
    # cividis looks the same with and without colour vision deficiencies, and lightens evenly in print
    image = axes.imshow(grid.scores, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_xlabel("length of the prompt, tokens")
    axes.set_xticks(range(len(grid.lengths)), [str(length) for length in grid.lengths], rotation=45, ha="right")
    step = 1 + len(grid.depths) // 26
    axes.set_yticks(range(0, len(grid.depths), step), [f"{depth:g}" for depth in grid.depths[::step]])
    if len(grid.lengths) * len(grid.depths) <= _WITH_NUMBERS:
        for y, row in enumerate(grid.scores):
            for x, score in enumerate(row):
                if score == score:  # nan: nothing was asked
                    colour = "black" if score > 55 else "white"
                    axes.text(x, y, f"{score:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return image


def plot_positions(losses: Mapping[str, Sequence[Bucket]], *, title: str = "Loss by position") -> "Figure":
    """The loss per token over the number of tokens before it, one line per model.

    Args:
        losses: name of each model to what `patchattn.evaluation.tasks.perplexity.position_losses` returns.
        title: of the figure.

    Returns:
        A figure; save it with `figure.savefig(path)`. A horizontal bar is a bucket of positions, its marker the mean.

    Raises:
        ValueError: nothing to draw, or more models than colours.
    """
    if not losses or not all(losses.values()):
        raise ValueError("There is nothing to draw: losses must hold at least one model, each with a bucket.")
    styles = run_styles(list(losses))

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, buckets in losses.items():
        colour, marker, _ = styles[name]
        x = [(bucket.first + bucket.last) / 2 for bucket in buckets]
        y = [bucket.nats for bucket in buckets]
        axes.hlines(y, [b.first for b in buckets], [b.last for b in buckets], color=colour, linewidth=1.5, alpha=0.5)
        axes.plot(x, y, color=colour, marker=marker, markersize=6, markeredgecolor="white", linewidth=1, label=name)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("tokens of the text that the model sees before")
    axes.set_ylabel("loss, nats per token")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
    return figure
