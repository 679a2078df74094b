"""Pictures of what a model's attention does, and of what a variant changes; matplotlib is imported to draw alone."""

from .attention import plot_attention_grid, plot_attention_map, plot_attention_received, plot_image_attention
from .directions import plot_attention_directions
from .entropy import plot_attention_entropy
from .found import plot_lookback_probe, plot_vector_layers
from .grid_masks import plot_grid_masks
from .heads import plot_head_importance, plot_head_usage, plot_pruning_curve
from .massive import plot_massive_activations
from .pareto import ParetoPoint, pareto_front, plot_pareto
from .rollout import plot_rollout
from .temperatures import plot_temperatures

__all__ = [
    "ParetoPoint",
    "pareto_front",
    "plot_attention_directions",
    "plot_attention_entropy",
    "plot_attention_grid",
    "plot_attention_map",
    "plot_attention_received",
    "plot_grid_masks",
    "plot_head_importance",
    "plot_head_usage",
    "plot_image_attention",
    "plot_lookback_probe",
    "plot_massive_activations",
    "plot_pareto",
    "plot_pruning_curve",
    "plot_rollout",
    "plot_temperatures",
    "plot_vector_layers",
]
