"""What all pictures share: colours, and from which size on cells hold no numbers."""

WITH_NUMBERS = 400  # cells up to which each shows its number
# Colours of Okabe and Ito, told apart with colour vision deficiencies; markers tell them apart in grey.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
SERIES = ((BLUE, "o"), (GREEN, "^"), (ORANGE, "s"), ("#CC79A7", "v"), ("#E69F00", "D"), ("#000000", "X"))
# Looks the same with and without colour vision deficiencies, and lightens evenly in print.
COLOURS = "cividis"
OVER_GREY = "viridis"  # nearly as safe, and told apart from a grey picture shining through
