"""Squeezed Attention: Accelerating Long Context Length LLM Inference."""

from .clusters import PrefixClusters, prefix_clusters
from .variant import Squeezed, SqueezedConfig

__all__ = ["PrefixClusters", "Squeezed", "SqueezedConfig", "prefix_clusters"]
