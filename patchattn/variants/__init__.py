"""The published variants, one file each. Importing this package registers them."""

from . import logn, moh, ssa, ssmax

__all__ = ["logn", "moh", "ssa", "ssmax"]
