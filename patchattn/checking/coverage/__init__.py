"""Which model types of the installed transformers can be patched, found out by building and running all of them."""

from .report import current_versions, patchable_types, to_markdown
from .sweep import Row, sweep

__all__ = ["Row", "current_versions", "patchable_types", "sweep", "to_markdown"]
