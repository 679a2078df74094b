"""Pictures of what a model's attention does, and of what a variant changes; matplotlib is imported to draw alone."""

from .heads import plot_head_importance, plot_head_usage, plot_pruning_curve
from .temperatures import plot_temperatures

__all__ = ["plot_head_importance", "plot_head_usage", "plot_pruning_curve", "plot_temperatures"]
