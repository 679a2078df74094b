"""The published variants, one file each. Importing this package registers them."""

from . import damro, logn, moh, ssa, ssmax

__all__ = ["damro", "logn", "moh", "ssa", "ssmax"]
