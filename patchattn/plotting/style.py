"""What all pictures share: colours, and from which size on cells hold no numbers."""

from collections.abc import Sequence

WITH_NUMBERS = 400  # cells up to which each shows its number
# Colours of Okabe and Ito, told apart with colour vision deficiencies; markers tell them apart in grey.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
GREY = "#595959"
SERIES = ((BLUE, "o"), (GREEN, "^"), (ORANGE, "s"), ("#CC79A7", "v"), ("#E69F00", "D"), ("#000000", "X"))
# Looks the same with and without colour vision deficiencies, and lightens evenly in print.
COLOURS = "cividis"
OVER_GREY = "viridis"  # nearly as safe, and told apart from a grey picture shining through

Style = tuple[str, str, str]  # colour, marker, and hatch of areas
_UNPATCHED: Style = (GREY, "o", "")
_RUNS: tuple[Style, ...] = (
    (ORANGE, "s", "//"),
    (BLUE, "^", "\\\\"),
    (GREEN, "D", ".."),
    ("#CC79A7", "v", "xx"),
    ("#E69F00", "P", "--"),
)
MOST_RUNS = 1 + len(_RUNS)  # that colours and markers tell apart, the unpatched model among them


def run_styles(names: Sequence[str]) -> dict[str, Style]:
    """Of the runs of one report, by name: the same in each of its pictures. The unpatched model is grey.

    Raises:
        ValueError: more than can be told apart.
    """
    others = [name for name in names if name != "unpatched"]
    if len(others) > len(_RUNS):
        raise ValueError(f"At most {len(_RUNS)} models can be told apart beside the unpatched one, got {len(others)}.")
    styles = dict(zip(others, _RUNS, strict=False))
    return {name: styles.get(name, _UNPATCHED) for name in names}
