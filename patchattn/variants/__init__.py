"""The published variants, one file each. Importing this package registers them."""

from . import moh, ssa

__all__ = ["moh", "ssa"]
