"""The published variants, one file each. Importing this package registers them."""

from . import act, damro, flap, logn, moh, prune, shrp, ssa, ssmax, var

__all__ = ["act", "damro", "flap", "logn", "moh", "prune", "shrp", "ssa", "ssmax", "var"]
