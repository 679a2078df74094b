"""Pictures of heads: how often each is used, how much it matters, what is left without some."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from .style import COLOURS, SERIES, WITH_NUMBERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..core.importance import HeadImportance


class Point(Protocol):
    """What is drawn of a point of a pruning curve: `calibration.pruning_curve.CurvePoint`."""

    @property
    def sparsity(self) -> float: ...
    @property
    def value(self) -> float: ...


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
    image = axes.imshow(percent, cmap=COLOURS, vmin=0, vmax=100, aspect="auto")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="tokens using the head, %")
    if layers * heads <= WITH_NUMBERS:
        axes.set_xticks(range(heads))
        axes.set_yticks(range(layers))
        for y, layer in enumerate(shares):
            for x, share in enumerate(layer):
                colour = "black" if share > 0.55 else "white"
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return figure


def plot_head_importance(
    importance: "HeadImportance",
    *,
    title: str | None = None,
    label: str = "importance (higher: keep)",
    heads: str = "query head",
) -> "Figure":
    """Heat map of the importance of every head: a picture per tower and kind of attention, a row per layer.

    Args:
        importance: of `patchattn.head_importance`.
        title: of the picture; the method and the model by default.
        label: of the scale.
        heads: what the heads are, below the picture.

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
    count = max(len(scores) for rows in groups.values() for scores in rows.values())
    heights = [min(12.0, max(2.2, 1.2 + 0.4 * len(rows))) for rows in groups.values()]
    width = max(min(16.0, 3.0 + 0.5 * count), 0.075 * len(title) + 0.5)
    figure = Figure(figsize=(width, sum(heights) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    values = [score for site in importance.sites.values() for score in site.scores]
    low, high = min(values), max(values)
    pictures = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (group, rows) in zip(pictures, groups.items(), strict=True):
        layers = sorted(rows)
        table = [[*rows[layer], *[float("nan")] * (count - len(rows[layer]))] for layer in layers]
        image = axes.imshow(table, cmap=COLOURS, vmin=low, vmax=high, aspect="auto")
        axes.set_title(group, fontsize=9)
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        step = 1 + len(layers) // 33
        axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        if count * len(layers) <= WITH_NUMBERS:
            for y, layer in enumerate(layers):
                for x, score in enumerate(rows[layer]):
                    colour = "black" if score > low + 0.55 * (high - low) else "white"
                    axes.text(x, y, f"{score:.2g}", ha="center", va="center", fontsize=7, color=colour)
    pictures[-1].set_xlabel(heads)
    figure.colorbar(image, ax=pictures.tolist(), label=label)
    return figure


def plot_pruning_curve(
    curves: Mapping[str, Sequence[Point]], *, metric: str = "value", title: str = "Pruning of heads"
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
    if len(curves) > len(SERIES):
        raise ValueError(f"At most {len(SERIES)} curves can be told apart, got {len(curves)}.")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, points), (colour, marker) in zip(curves.items(), SERIES, strict=False):
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
