"""The published variants, one file each. Importing this package registers them."""

from .decoding import damro
from .pruning import prune
from .pruning.flap import variant as flap
from .pruning.shrp import variant as shrp
from .routing import moh
from .sinks import act, var
from .temperature import logn, ssa, ssmax

__all__ = ["act", "damro", "flap", "logn", "moh", "prune", "shrp", "ssa", "ssmax", "var"]
