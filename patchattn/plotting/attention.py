"""Pictures of attention: what keys receive, maps of heads, attention to the parts of a picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .style import COLOURS, ORANGE, OVER_GREY

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..inspection.attention_maps import AttentionMap, ImageAttention, ReceivedAttention

_LABELLED = 40  # tokens up to which each is written at its place
_VEIL = 0.75  # of white over columns of few queries
_GAMMA = 0.4  # of the colours of maps, so that small weights show beside sinks


def plot_attention_received(
    received: "Sequence[ReceivedAttention]",
    *,
    before: "Sequence[ReceivedAttention] | None" = None,
    tokens: Sequence[str] | None = None,
    title: str = "Attention received by keys",
) -> "Figure":
    """Heat map of the attention that each key receives: a row per layer, or per head if there is one layer alone.

    The attention of a key is its sum over the queries that see it, divided by their number. The last keys of a causal
    model are seen by few, which look at what is near: columns that less than a quarter of the queries see are pale, and
    do not count for the range of the colours.

    Attention sinks (`ReceivedAttention.sinks`) are marked; in the picture of several layers, where half of the heads or
    more have one.

    Args:
        received: of `patchattn.inspection.attention_maps.attention_received`.
        before: the same of the model without its patch, drawn above in the same colours.
        tokens: text of each key, from the first that is not padding; written if there are few.
        title: of the picture.

    Returns:
        A figure; save it with `figure.savefig(path)`.

    Raises:
        ValueError: nothing to draw, another number of tokens than of keys, layers of several towers or kinds, or other
            layers or keys before.
    """
    if not received:
        raise ValueError("There is nothing to draw: received must hold at least one layer.")
    length = max(layer.share.shape[1] for layer in received)
    if len({(layer.site.tower, layer.site.is_cross, layer.share.shape[1]) for layer in received}) > 1:
        raise ValueError("The layers are of several towers or kinds of attention: choose one with modules=...")
    shapes = [[(layer.site.name, layer.share.shape) for layer in given] for given in (received, before or received)]
    if shapes[0] != shapes[1]:
        raise ValueError("What was received before is of other layers, heads or keys: draw them apart.")
    if tokens is not None and len(tokens) != length:
        raise ValueError(f"There are {length} keys, but {len(tokens)} tokens to label them with.")

    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator

    from ..inspection.attention_maps import SINK_SEEN

    parts = [received] if before is None else [before, received]
    drawn = [_received_table(part) for part in parts]
    names, label = [str(layer.site.layer_index) for layer in received], "layer"
    if len(received) == 1:
        names, label = [str(head) for head in range(len(drawn[0][0]))], "query head"
    height = min(10.0, max(2.6, 1.6 + 0.26 * len(parts) * len(names) + (0.5 if tokens is not None else 0.0)))
    figure = Figure(figsize=(max(6.4, 0.085 * len(title) + 0.5), height), layout="constrained")
    every = figure.subplots(len(parts), squeeze=False)[:, 0]
    many = np.stack([layer.seen.numpy() for layer in received]).min(0) >= SINK_SEEN
    counted = np.concatenate([table[:, many] for table, _ in drawn])
    low, high = max(counted.min(), counted.max() / 1000), counted.max()
    veil = np.where(many, np.nan, 1.0)[None]
    for axes, (table, marked) in zip(every, drawn, strict=True):
        image = axes.imshow(table, cmap=COLOURS, norm=LogNorm(low, high), aspect="auto")
        axes.imshow(veil, cmap="gray", vmin=0, vmax=1, alpha=_VEIL, aspect="auto", extent=image.get_extent())
        y, x = marked.nonzero()
        axes.plot(x, y, linestyle="none", marker="x", color=ORANGE, markersize=6, markeredgewidth=1.6)
        axes.set_ylabel(label)
        _label_steps(axes, "y", names)
    if before is None:
        axes.set_title(title, fontsize=11)
    else:
        figure.suptitle(title, fontsize=11)
        for axes, name in zip(every, ("without the patch", "with it"), strict=True):
            axes.set_title(name, fontsize=9)
            axes.tick_params(labelbottom=axes is every[-1])
    share = "attention sink" if len(received) == 1 else "attention sink in half of the heads or more"
    axes.plot([], [], linestyle="none", marker="x", color=ORANGE, markersize=6, markeredgewidth=1.6, label=share)
    handles, _ = axes.get_legend_handles_labels()
    if not many.all():
        few = f"pale: seen by less than {100 * SINK_SEEN:.0f} % of the queries"
        handles.append(Patch(facecolor="0.85", edgecolor="0.6", label=few))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    _label_tokens(axes, "x", tokens, range(length), "key, position in tokens")
    bar = figure.colorbar(image, ax=list(every), label="mean attention of the\nqueries that see it, %")
    bar.minorticks_off()
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure


def _received_table(received: "Sequence[ReceivedAttention]") -> "tuple[np.ndarray, np.ndarray]":
    """Percent by head or layer and key, and where sinks are marked."""
    import numpy as np

    if len(received) == 1:
        return 100 * received[0].share.numpy(), received[0].sinks().numpy()
    table = 100 * np.stack([layer.share.mean(0).numpy() for layer in received])
    return table, np.stack([layer.sinks().double().mean(0).numpy() >= 0.5 for layer in received])


def plot_attention_map(
    attention: "AttentionMap", *, tokens: Sequence[str] | None = None, title: str | None = None
) -> "Figure":
    """Attention of one head, queries x keys.

    Args:
        attention: one of `patchattn.inspection.attention_maps.attention_maps`.
        tokens: text of every token of the input, padding included; written if there are few. Not for cross attention,
            whose keys are those of another sequence.
        title: of the picture; layer and head by default.

    Returns:
        A figure; save it with `figure.savefig(path)`. Colours are stretched where weights are small;
        what a mask hides is white.

    Raises:
        ValueError: tokens are given for cross attention, or fewer than there are.
    """
    _check_tokens(attention, tokens)
    title = _name(attention) if title is None else title

    from matplotlib.figure import Figure

    is_labelled = tokens is not None and max(attention.weights.shape) <= _LABELLED
    side = min(9.0, 1.6 + 0.19 * max(attention.weights.shape)) if is_labelled else 4.2
    side = max(side, 3.6)
    figure = Figure(figsize=(max(side + 1.2, 0.085 * len(title) + 0.5), side), layout="constrained")
    axes = figure.subplots()
    image = _draw_map(axes, attention)
    axes.set_title(title, fontsize=11)
    _label_tokens(axes, "x", tokens, attention.keys, "key, position in tokens")
    _label_tokens(axes, "y", tokens, attention.queries, "query, position in tokens")
    figure.colorbar(image, ax=axes, label="share of the query's attention, %", shrink=0.9)
    return figure


def plot_attention_grid(maps: "Sequence[AttentionMap]", *, title: str = "Attention of heads") -> "Figure":
    """Small maps of many heads: a row per layer, a column per head, all in the same colours.

    Args:
        maps: of `patchattn.inspection.attention_maps.attention_maps`, with a `resolution` of 48 or so.
        title: of the picture.

    Returns:
        A figure; save it with `figure.savefig(path)`. Colours are stretched where weights are small;
        what a mask hides is white.

    Raises:
        ValueError: nothing to draw.
    """
    if not maps:
        raise ValueError("There is nothing to draw: maps must hold at least one.")

    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    sites = list(dict.fromkeys(attention.site.name for attention in maps))
    heads = sorted({attention.head for attention in maps})
    cell = min(1.3, max(0.34, 7.0 / len(heads)))
    size = (max(1.5 + cell * len(heads), 0.085 * len(title) + 0.5, 3.6), max(2.2, 1.1 + cell * len(sites)))
    layout = ConstrainedLayoutEngine(wspace=0.02, hspace=0.02, w_pad=0.02, h_pad=0.02)
    figure = Figure(figsize=size, layout=layout)
    figure.suptitle(title, fontsize=11)
    pictures = figure.subplots(len(sites), len(heads), squeeze=False)
    for axes in pictures.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_visible(False)
    for attention in maps:
        row, column = sites.index(attention.site.name), heads.index(attention.head)
        axes = pictures[row, column]
        axes.set_visible(True)
        image = _draw_map(axes, attention)
        if row == 0:
            axes.set_title(str(attention.head), fontsize=8, pad=2)
        if column == 0:
            axes.set_ylabel(str(attention.site.layer_index), fontsize=8, rotation=0, ha="right", va="center")
    figure.supxlabel("query head (columns); inside each map keys go to the right, queries down", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    figure.colorbar(image, ax=pictures.ravel().tolist(), label="share of the query's attention, %", aspect=30)
    return figure


def plot_image_attention(
    picture: Any, attention: "ImageAttention", *, title: str = "Attention to the image"
) -> "Figure":
    """A picture, and beside it the same picture under the attention that each of its parts gets.

    Args:
        picture: as the vision encoder saw it, after its cropping: a PIL image, or an array `(height, width, 3)`.
        attention: of `patchattn.inspection.attention_maps.image_attention`.
        title: of the figure.

    Returns:
        A figure; save it with `figure.savefig(path)`.
    """
    import numpy as np
    from matplotlib.figure import Figure

    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    side = 3.0
    tall = min(max(side * height / width, 1.2), 6.0)
    figure = Figure(figsize=(2 * side + 1.5, tall + 1.0), layout="constrained")
    figure.suptitle(title, fontsize=11)
    plain, covered = figure.subplots(1, 2)
    grid = 100 * attention.grid.numpy()
    for axes in (plain, covered):
        axes.set_xticks([])
        axes.set_yticks([])
    plain.imshow(pixels, cmap="gray")
    plain.set_title("what the encoder sees", fontsize=9)
    place = (-0.5, width - 0.5, height - 0.5, -0.5)
    image = covered.imshow(grid, cmap=OVER_GREY, vmin=0, extent=place, interpolation="nearest")
    grey = pixels[..., :3].mean(-1) if pixels.ndim == 3 else pixels
    covered.imshow(grey, cmap="gray", alpha=0.35)
    covered.set_title(f"{100 * attention.total:.1f} % of attention on the image", fontsize=9)
    figure.colorbar(image, ax=covered, label="attention to an image token, %")
    rows, columns = attention.span.grid or grid.shape
    means = f"mean over {attention.heads} heads of {attention.layers} layers; {rows} x {columns} image tokens"
    figure.supxlabel(means, fontsize=8)
    return figure


def _draw_map(axes: "Axes", attention: "AttentionMap") -> Any:
    import numpy as np
    from matplotlib.colors import PowerNorm

    weights = np.where(attention.visible.numpy(), 100 * attention.weights.numpy(), np.nan)
    return axes.imshow(weights, cmap=COLOURS, norm=PowerNorm(_GAMMA, 0, 100), aspect="auto", interpolation="nearest")


def _name(attention: "AttentionMap") -> str:
    site = attention.site
    return f"Layer {site.layer_index}, head {attention.head} ({site.name})"


def _check_tokens(attention: "AttentionMap", tokens: Sequence[str] | None) -> None:
    if tokens is None:
        return
    if attention.site.is_cross:
        raise ValueError("The keys of cross attention are those of another sequence: leave out tokens.")
    last = max(*attention.queries, *attention.keys)
    if len(tokens) <= last:
        raise ValueError(f"The map goes up to token {last}, but there are {len(tokens)} tokens.")


def _label_tokens(
    axes: "Axes", which: str, tokens: Sequence[str] | None, places: Sequence[int], otherwise: str
) -> None:
    """Tokens at the ticks if there are few, else their positions."""
    if tokens is not None and len(places) <= _LABELLED:
        turned = {"rotation": 90} if which == "x" else {}
        axes.set(**{f"{which}label": otherwise.split(",")[0]})
        texts = [_shown(tokens[place]) for place in places]
        getattr(axes, f"set_{which}ticks")(range(len(places)), texts, fontsize=7, **turned)
    else:
        axes.set(**{f"{which}label": otherwise})
        _label_steps(axes, which, [str(place) for place in places])


def _label_steps(axes: "Axes", which: str, names: Sequence[str]) -> None:
    """A name every few ticks, so that they do not touch."""
    most = 20 if which == "y" else 12
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 20000) if len(names) / step <= most)
    getattr(axes, f"set_{which}ticks")(range(0, len(names), step), names[::step])


def _shown(token: str) -> str:
    """A token as a label: spaces and line breaks visible, `$` no formula."""
    text = token.replace("\n", "\\n").replace(" ", "\u2423").replace("$", r"\$")
    return text or "\u2423" if len(text) <= 12 else f"{text[:11]}\u2026"
