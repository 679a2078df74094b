"""What a patch of an image sees under a variant."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .style import BLUE, ORANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..inspection.grid_masks import GridMask


def plot_grid_masks(masks: "Sequence[GridMask]", *, title: str | None = None) -> "Figure":
    """The patches of an image: filled where one of them, marked by a square, sees them.

    Args:
        masks: of `patchattn.inspection.grid_masks.grid_masks`.
        title: of the picture.

    Returns:
        A figure; save it with `figure.savefig(path)`.

    Raises:
        ValueError: nothing to draw.
    """
    if not masks:
        raise ValueError("There is nothing to draw: masks must hold at least one.")

    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.6 + 2.8 * len(masks), 3.4), layout="constrained")
    for mask, axes in zip(masks, figure.subplots(1, len(masks), squeeze=False)[0], strict=True):
        rows, columns = mask.seen.shape
        axes.pcolormesh(
            range(columns + 1),
            range(rows + 1),
            mask.seen.numpy(),
            cmap=ListedColormap(["#ececec", BLUE]),
            vmin=0,
            vmax=1,
            edgecolors="white",
            linewidth=0.5,
        )
        row, column = mask.query
        axes.plot(column + 0.5, row + 0.5, marker="s", markersize=5, color=ORANGE, markeredgecolor="black")
        axes.set(
            aspect="equal", xlim=(0, columns), ylim=(rows, 0), title=f"{mask.name}: {int(mask.seen.sum())} patches"
        )
        axes.set(xticks=[0, columns], yticks=[0, rows])
    if title:
        figure.suptitle(title)
    return figure
