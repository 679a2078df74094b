"""Pictures of what a variant does. matplotlib is imported only when one is drawn."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .calibration.importance import HeadImportance
    from .calibration.pruning_curve import CurvePoint
    from .statistics import LayerTemperatures

_WITH_NUMBERS = 400  # cells up to which each shows its number
# Colours of Okabe and Ito, told apart with colour vision deficiencies; markers tell them apart in grey.
_STREAM_STYLES = {"query": ("#0072B2", "o"), "key": ("#009E73", "^"), "value": ("#D55E00", "s")}
_LINE_STYLES = [*_STREAM_STYLES.values(), ("#CC79A7", "v"), ("#E69F00", "D"), ("#000000", "x")]


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


def plot_head_importance(importance: "HeadImportance", *, title: str | None = None) -> "Figure":
    """Heat map of the importance of every query head: a picture per tower and kind of attention, a row per layer.

    Args:
        importance: of `patchattn.head_importance`.
        title: of the picture; the method and the model by default.

    Returns:
        A figure; save it with `figure.savefig(path)`. Heads that a layer does not have are white.
    """
    import re

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    groups: dict[str, dict[int, tuple[float, ...]]] = {}
    for name, site in importance.sites.items():
        groups.setdefault(re.sub(r"\d+", "*", name), {})[site.layer] = site.scores
    title = f"Importance of heads ({importance.method}): {importance.base}" if title is None else title
    heads = max(len(scores) for rows in groups.values() for scores in rows.values())
    heights = [min(12.0, max(2.2, 1.2 + 0.4 * len(rows))) for rows in groups.values()]
    width = max(min(16.0, 3.0 + 0.5 * heads), 0.075 * len(title) + 0.5)
    figure = Figure(figsize=(width, sum(heights) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    values = [score for site in importance.sites.values() for score in site.scores]
    low, high = min(values), max(values)
    pictures = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (group, rows) in zip(pictures, groups.items(), strict=True):
        layers = sorted(rows)
        table = [[*rows[layer], *[float("nan")] * (heads - len(rows[layer]))] for layer in layers]
        # cividis looks the same with and without colour vision deficiencies, and darkens evenly in print
        image = axes.imshow(table, cmap="cividis", vmin=low, vmax=high, aspect="auto")
        axes.set_title(group, fontsize=9)
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        step = 1 + len(layers) // 33
        axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        if heads * len(layers) <= _WITH_NUMBERS:
            for y, layer in enumerate(layers):
                for x, score in enumerate(rows[layer]):
                    colour = "black" if score > low + 0.55 * (high - low) else "white"
                    axes.text(x, y, f"{score:.2g}", ha="center", va="center", fontsize=7, color=colour)
    pictures[-1].set_xlabel("query head")
    figure.colorbar(image, ax=pictures.tolist(), label="importance (higher: keep)")
    return figure


def plot_pruning_curve(
    curves: "Mapping[str, Sequence[CurvePoint]]", *, metric: str = "value", title: str = "Pruning of heads"
) -> "Figure":
    """A metric over the share of heads removed, one line per curve.

    Args:
        curves: name to what `pruning_curve` returns, such as one per method; the unpruned model is a dashed line.
        metric: name of the metric, with its unit.
        title: of the picture.

    Returns:
        A figure; save it with `figure.savefig(path)`.

    Raises:
        ValueError: nothing to draw, or more curves than colours.
    """
    if not curves or not all(curves.values()):
        raise ValueError("curves must hold at least one curve, and every curve at least one point.")
    if len(curves) > len(_LINE_STYLES):
        raise ValueError(f"At most {len(_LINE_STYLES)} curves can be told apart, got {len(curves)}.")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, points), (colour, marker) in zip(curves.items(), _LINE_STYLES, strict=False):
        x, y = [100 * point.sparsity for point in points], [point.value for point in points]
        axes.plot(x, y, color=colour, marker=marker, markersize=5, markeredgecolor="white", label=name)
    first = next(iter(curves.values()))[0]
    axes.axhline(first.value, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("query heads removed, %")
    axes.set_ylabel(metric)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
    return figure


def plot_temperatures(statistics: "Sequence[LayerTemperatures]", *, title: str = "Temperatures") -> "Figure":
    """Inverse temperatures of every layer, and how spiky attention is without and with them.

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
        _draw_spikiness(row[1], [layer for layer in layers if layer.spikiness_after is not None])
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


def _draw_spikiness(axes: "Axes", layers: "Sequence[LayerTemperatures]") -> None:
    x = [layer.site.layer_index for layer in layers]
    before, after = ([getattr(layer, f"spikiness_{when}") for layer in layers] for when in ("before", "after"))
    if layers:
        axes.plot(x, before, color="0.45", linestyle="--", marker="o", markersize=4, label="without temperatures")
        axes.plot(x, after, color="#0072B2", marker="s", markersize=4, label="with temperatures")
        axes.set_ylim(0.0, 1.08 * max(*before, *after))
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="0.4")
    axes.set_ylabel("spikiness of attention\n(1: uniform, lower: spikier)")
