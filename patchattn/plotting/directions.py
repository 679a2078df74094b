"""A picture of what carries a pair's attention: singular directions, and the heads that write along them."""

from typing import TYPE_CHECKING

from .style import BLUE, GREEN, ORANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..inspection.attention_directions import AttentionDirections


def plot_attention_directions(found: "AttentionDirections", *, writers: int = 10, title: str | None = None) -> "Figure":
    """What each singular direction adds to a pair's logit, and which earlier heads add most to those used.

    Args:
        found: of `patchattn.inspection.attention_directions.attention_directions`.
        writers: how many earlier heads, those that add most.
        title: of the picture; the head by default.

    Returns:
        A figure; save it with `figure.savefig(path)`. In the first layer, which has no earlier heads, there is one
        picture.

    Raises:
        ValueError: fewer than one writer.
    """
    if writers < 1:
        raise ValueError(f"writers is a number of heads of at least 1, got {writers}.")

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    strongest = found.strongest(writers)
    title = f"Layer {found.site.layer_index}, head {found.head}" if title is None else title
    figure = Figure(figsize=(max(9.6 if strongest else 5.4, 0.085 * len(title) + 0.5), 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    pictures = figure.subplots(1, 2 if strongest else 1, squeeze=False)[0]
    terms = found.terms.tolist()
    colours = [BLUE if place in found.used else "0.75" for place in range(len(terms))]
    pictures[0].bar(range(len(terms)), terms, color=colours)
    pictures[0].set_title(f"{len(found.used)} of {len(terms)} used (blue); all add up to {found.logit:.2f}", fontsize=9)
    pictures[0].set_xlabel("singular direction")
    pictures[0].set_ylabel("adds to the logit")
    pictures[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if strongest:
        names = [f"{layer}-{head}, at the {side}" for side, layer, head, _ in strongest]
        colours = [ORANGE if side == "query" else GREEN for side, *_ in strongest]
        pictures[1].barh(range(len(names)), [value for *_, value in strongest], color=colours)
        pictures[1].set_yticks(range(len(names)), names, fontsize=8)
        pictures[1].invert_yaxis()
        pictures[1].set_title("earlier heads that add most", fontsize=9)
        pictures[1].set_xlabel("adds to the directions used")
    for axes in pictures:
        axes.spines[["top", "right"]].set_visible(False)
    return figure
