"""Which problem each operation of a case is."""

from .act import ACTProblem
from .block_sparse import BlockSparseProblem
from .key_sets import ColumnMassProblem, SplitProblem
from .layers import LayerProblem
from .problem import Problem
from .routed import RoutedProblem
from .selected import SelectedProblem
from .temperature import TemperatureProblem

PROBLEMS: dict[str, type[Problem]] = {
    "routed": RoutedProblem,
    "act": ACTProblem,
    "block_sparse": BlockSparseProblem,
    "selected": SelectedProblem,
    "split": SplitProblem,
    "column_mass": ColumnMassProblem,
    "temperature": TemperatureProblem,
    "moh_attention": LayerProblem,
    "moh_layer": LayerProblem,
    "act_attention": LayerProblem,
    "act_layer": LayerProblem,
}
