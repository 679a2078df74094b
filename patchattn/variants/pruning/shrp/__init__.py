"""SHRP: Specialized Head Routing and Pruning for Efficient Encoder Compression."""

from .compression import compress, reset_usage
from .variant import SHRP, SHRPConfig

__all__ = ["SHRP", "SHRPConfig", "compress", "reset_usage"]
