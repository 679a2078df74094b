"""Pictures of what a variant does. matplotlib is imported only when one is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WITH_NUMBERS = 400  # cells up to which each shows its number


def plot_head_usage(usage: Sequence[Sequence[float]], *, title: str = "Use of heads") -> "Figure":
    """Heat map of how often each head of each layer is used.

    Args:
        usage: per layer, from the first to the last, the share of tokens from 0 to 1 that use each head. Layers may
            differ in their number of heads.
        title: of the picture.

    Returns:
        A figure; save it with `figure.savefig(path)`.

    Raises:
        ValueError: nothing to draw, or a share outside 0 to 1.
    """
    shares = [[float(share) for share in layer] for layer in usage]
    if not shares or not all(shares):
        raise ValueError("usage must hold at least one layer, and every layer at least one head.")
    if wrong := [share for layer in shares for share in layer if not 0 <= share <= 1]:
        raise ValueError(f"usage holds shares of tokens between 0 and 1, got {wrong[0]}.")

    from matplotlib.figure import Figure

    layers, heads = len(shares), max(map(len, shares))
    percent = [[100 * share for share in layer] + [float("nan")] * (heads - len(layer)) for layer in shares]
    size = (min(16.0, 2.6 + 0.5 * heads), min(16.0, max(3.0, 1.7 + 0.4 * layers)))
    figure = Figure(figsize=(max(size[0], 0.085 * len(title) + 0.5), size[1]), layout="constrained")
    axes = figure.subplots()
    # cividis looks the same with and without colour vision deficiencies, and darkens evenly in print
    image = axes.imshow(percent, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="tokens using the head, %")
    if layers * heads <= _WITH_NUMBERS:
        axes.set_xticks(range(heads))
        axes.set_yticks(range(layers))
        for y, layer in enumerate(shares):
            for x, share in enumerate(layer):
                colour = "black" if share > 0.55 else "white"
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return figure
