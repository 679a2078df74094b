"""Picture of temperatures: their spread in every layer, and how even attention is without and with them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .style import BLUE, GREEN, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..inspection.temperatures import LayerTemperatures

_STREAM_STYLES = {"query": (BLUE, "o"), "key": (GREEN, "^"), "value": (ORANGE, "s")}


def plot_temperatures(statistics: "Sequence[LayerTemperatures]", *, title: str = "Temperatures") -> "Figure":
    """Inverse temperatures of every layer, and how even attention is without and with them.

    Evenness is SSA's measure of spikiness by what it grows with: 1 is uniform attention, and spikier is lower.

    Args:
        statistics: what `TemperatureStatistics.layers()` returns. Each variant, tower, and kind of
            attention gets a row.
        title: of the picture.

    Returns:
        A figure; save it with `figure.savefig(path)`.

    Raises:
        ValueError: nothing to draw.
    """
    if not statistics:
        raise ValueError("statistics must hold at least one layer.")

    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    groups: dict[str, list[LayerTemperatures]] = {}
    for layer in statistics:
        kind = "cross attention" if layer.site.is_cross else "self attention"
        groups.setdefault(f"{layer.variant}, {layer.site.tower or 'model'}, {kind}", []).append(layer)
    width = min(16.0, max(9.5, 4.0 + 0.4 * max(map(len, groups.values()))))
    layout = ConstrainedLayoutEngine(wspace=0.06)
    figure = Figure(figsize=(width, 0.4 + 3.6 * len(groups)), layout=layout)
    figure.suptitle(title, fontsize=11)
    for row, (group, layers) in zip(figure.subplots(len(groups), 2, squeeze=False), groups.items(), strict=True):
        _draw_streams(row[0], layers)
        _draw_evenness(row[1], [layer for layer in layers if layer.spikiness_after is not None])
        indices = [layer.site.layer_index for layer in layers]
        for axes in row:
            axes.set_title(group, fontsize=9, pad=22)
            axes.set_xlabel("layer")
            axes.set_xlim(min(indices) - 0.5, max(indices) + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def _draw_streams(axes: "Axes", layers: "Sequence[LayerTemperatures]") -> None:
    streams = [stream for stream in _STREAM_STYLES if any(stream in layer.streams for layer in layers)]
    for place, stream in enumerate(streams):
        chosen = [layer for layer in layers if stream in layer.streams]
        x = [layer.site.layer_index + 0.24 * (place - (len(streams) - 1) / 2) for layer in chosen]
        spreads = [layer.streams[stream] for layer in chosen]
        colour, marker = _STREAM_STYLES[stream]
        axes.vlines(x, [s.minimum for s in spreads], [s.maximum for s in spreads], color=colour, linewidth=0.9)
        axes.errorbar(
            x,
            [spread.mean for spread in spreads],
            yerr=[spread.std for spread in spreads],
            color=colour,
            marker=marker,
            markersize=6,
            markeredgecolor="white",
            linestyle="none",
            elinewidth=2.5,
            label=stream,
        )
    axes.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
    axes.set_ylabel("inverse temperature\n(mean and std, min to max)")


def _draw_evenness(axes: "Axes", layers: "Sequence[LayerTemperatures]") -> None:
    x = [layer.site.layer_index for layer in layers]
    before, after = ([getattr(layer, f"spikiness_{when}") for layer in layers] for when in ("before", "after"))
    if layers:
        axes.plot(x, before, color="0.45", linestyle="--", marker="o", markersize=4, label="without temperatures")
        axes.plot(x, after, color=BLUE, marker="s", markersize=4, label="with temperatures")
        axes.set_ylim(0.0, 1.08 * max(*before, *after))
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="0.4")
    axes.set_ylabel("evenness of attention\n(1: uniform, towards 0: on one key)")
