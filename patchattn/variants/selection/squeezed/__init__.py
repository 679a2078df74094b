"""Squeezed Attention: Accelerating Long Context Length LLM Inference."""

from .clusters import PrefixClusters, prefix_clusters
from .settings import SqueezedConfig
from .variant import Squeezed

__all__ = ["PrefixClusters", "Squeezed", "SqueezedConfig", "prefix_clusters"]
