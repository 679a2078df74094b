"""A picture under the attention flow to its parts, with boxes."""

from typing import TYPE_CHECKING, Any

from .style import OVER_GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..inspection.vl_sam import ImageFlow


def plot_image_flow(picture: Any, flow: "ImageFlow", *, title: str = "Attention flow to the image") -> "Figure":
    """A picture under the flow to each of its parts, with the boxes and points that were found.

    Args:
        picture: as the vision encoder saw it, after its cropping: a PIL image, or an array `(height, width, 3)`.
        flow: of `patchattn.inspection.vl_sam.image_flow`.
        title: of the figure.

    Returns:
        A figure; save it with `figure.savefig(path)`.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    tall = min(max(4.0 * height / width, 1.5), 7.0)
    figure = Figure(figsize=(5.5, tall + 1.0), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])
    place = (-0.5, width - 0.5, height - 0.5, -0.5)
    shown = axes.imshow(flow.grid.numpy(), cmap=OVER_GREY, vmin=0, vmax=1, extent=place, interpolation="nearest")
    grey = pixels[..., :3].mean(-1) if pixels.ndim == 3 else pixels
    axes.imshow(grey, cmap="gray", alpha=0.35)
    for box in flow.boxes:
        corner = (box.left * width - 0.5, box.top * height - 0.5)
        sides = ((box.right - box.left) * width, (box.bottom - box.top) * height)
        axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor="black", linewidth=1.5))
        axes.plot(box.point[0] * width - 0.5, box.point[1] * height - 0.5, "k+")
    rows, columns = flow.grid.shape
    axes.set_xlabel(f"{flow.layers} layers, {rows} x {columns} image tokens", fontsize=8)
    figure.colorbar(shown, ax=axes, label="flow, the largest is 1")
    return figure
