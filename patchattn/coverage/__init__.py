"""Which model types of the installed transformers can be patched, found out by building and running all of them."""

from .sweep import Row, sweep

__all__ = ["Row", "sweep"]
