"""Pictures of what a calibration has found: the weights of a lookback probe, and how well a vector does by layer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .style import BLUE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..inspection.lookback import LookbackProbe


def plot_lookback_probe(probe: "LookbackProbe", *, title: str | None = None) -> "Figure":
    """Heat map of the weight of every head's lookback ratio.

    Args:
        probe: of `patchattn.inspection.lookback.LookbackProbe.fit` or `load`.
        title: of the picture; the model by default.

    Returns:
        A figure; save it with `figure.savefig(path)`. Where a head with a weight above 0 looks back, the answer more
        likely keeps to its context.
    """
    from ..core.importance import HeadImportance, SiteScores
    from .heads import plot_head_importance

    sites = {f"layer {number}": SiteScores(number, len(each), each) for number, each in enumerate(probe.weights)}
    title = f"Lookback Lens: {probe.base}" if title is None else title
    importance = HeadImportance(sites, "lookback", probe.base)
    return plot_head_importance(importance, title=title, label="weight of the head's ratio")


def plot_vector_layers(accuracy: Mapping[int, float], without: float, *, title: str = "Vectors") -> "Figure":
    """How often the first token of an answer is right, by the layer behind which a vector is put.

    Args:
        accuracy: by layer, from 0 to 1, as `patchattn.calibration.vectors.find_vectors` finds it.
        without: the same without a vector.
        title: of the picture.

    Returns:
        A figure; save it with `figure.savefig(path)`. The dashed line is the model without a vector.

    Raises:
        ValueError: no layer.
    """
    if not accuracy:
        raise ValueError("There is nothing to draw: accuracy must hold at least one layer.")

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    layers = sorted(accuracy)
    axes.plot(layers, [100 * accuracy[layer] for layer in layers], color=BLUE, marker="o", label="with the vector")
    axes.axhline(100 * without, color="0.45", linestyle="--", linewidth=1.0, label="without a vector")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("behind layer")
    axes.set_ylabel("first answer tokens that are right, %")
    axes.set_ylim(-3, 103)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
    return figure
