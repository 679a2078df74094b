"""A picture of the largest activations behind every layer."""

from typing import TYPE_CHECKING

from .style import SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..inspection.massive import MassiveActivations


def plot_massive_activations(found: "MassiveActivations", *, title: str | None = None) -> "Figure":
    """The three largest sizes of entries behind every layer and their median, on a logarithmic scale.

    Args:
        found: of `patchattn.inspection.massive.massive_activations`.
        title: of the picture; the model by default.

    Returns:
        A figure; save it with `figure.savefig(path)`. The dashed line is the threshold.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    layers = [each.layer for each in found.layers]
    lines = {f"{name} largest": [each.largest[i] for each in found.layers] for i, name in enumerate(("", "2nd", "3rd"))}
    lines = {name.strip(): values for name, values in lines.items()}
    lines["median"] = [each.median for each in found.layers]
    for (name, values), (colour, marker) in zip(lines.items(), SERIES, strict=False):
        axes.plot(layers, values, color=colour, marker=marker, markersize=5, markeredgecolor="white", label=name)
    axes.axhline(found.threshold, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
    axes.set_yscale("log")
    axes.set_title(f"Massive activations: {found.base}" if title is None else title, fontsize=11)
    axes.set_xlabel("layer")
    axes.set_ylabel("size of an entry behind the layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
    return figure
