"""A picture of attention through all layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..inspection.rollout import Rollout


def plot_rollout(
    rollout: "Rollout", *, tokens: Sequence[str] | None = None, layer: int = -1, title: str = "Attention rollout"
) -> "Figure":
    """What of each input token reaches each token behind a layer.

    Args:
        rollout: of `patchattn.inspection.rollout.attention_rollout` or `attention_flow`.
        tokens: text of every token of the input, padding included; written if there are few.
        layer: behind which layer; the last one by default.
        title: of the picture.

    Returns:
        A figure; save it with `figure.savefig(path)`.

    Raises:
        ValueError: no such layer, or fewer tokens than there are.
    """
    from ..inspection.attention_maps import AttentionMap
    from .attention import plot_attention_map

    count = len(rollout.sites)
    if not -count <= layer < count:
        raise ValueError(f"There are the layers 0 to {count - 1}, got {layer}.")
    weights, places = rollout.weights[layer], rollout.tokens
    drawn = AttentionMap(rollout.sites[layer], 0, weights, weights > 0, places, places)
    return plot_attention_map(drawn, tokens=tokens, title=title)
