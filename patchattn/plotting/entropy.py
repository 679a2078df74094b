"""A picture of how spread out attention is in every layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .style import BLUE, ORANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..inspection.rollout import AttentionEntropy


def plot_attention_entropy(layers: "Sequence[AttentionEntropy]", *, title: str = "Entropy of attention") -> "Figure":
    """Entropy of attention layer by layer, as a share of that of even attention: every head, and the mean of a layer.

    Args:
        layers: of `patchattn.inspection.rollout.attention_entropy`. Each tower and kind of attention gets a row.
        title: of the picture.

    Returns:
        A figure; save it with `figure.savefig(path)`. 1 is even attention, 0 one key.

    Raises:
        ValueError: nothing to draw.
    """
    if not layers:
        raise ValueError("There is nothing to draw: layers must hold at least one.")

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    groups: dict[str, list[AttentionEntropy]] = {}
    for layer in layers:
        kind = "cross attention" if layer.site.is_cross else "self attention"
        groups.setdefault(f"{layer.site.tower or 'model'}, {kind}", []).append(layer)
    width = max(6.4, min(14.0, 2.4 + 0.22 * max(map(len, groups.values()))), 0.085 * len(title) + 0.5)
    figure = Figure(figsize=(width, 0.5 + 3.2 * len(groups)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, (group, some) in zip(figure.subplots(len(groups), 1, squeeze=False)[:, 0], groups.items(), strict=True):
        places = [layer.site.layer_index for layer in some]
        dots = [(place, float(share)) for place, layer in zip(places, some, strict=True) for share in layer.share]
        axes.plot(*zip(*dots, strict=True), linestyle="none", marker="o", color=BLUE, alpha=0.45, label="a head")
        means = [float(layer.share.mean()) for layer in some]
        axes.plot(places, means, color=ORANGE, marker="s", markeredgecolor="white", label="mean of the layer")
        axes.set_title(group, fontsize=9)
        axes.set_xlabel("layer")
        axes.set_ylabel("entropy over that of even attention")
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    return figure
