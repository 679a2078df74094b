"""FLAP: Fluctuation-based Adaptive Structured Pruning for Large Language Models."""

from .statistics import FlapStatistics, flap_statistics
from .variant import Flap, FlapConfig

__all__ = ["Flap", "FlapConfig", "FlapStatistics", "flap_statistics"]
