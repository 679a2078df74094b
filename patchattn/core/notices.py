"""What patchattn tells beside its errors, through `logging` and `warnings`. It sets no handler and no level.

The logger is `patchattn`; `logging.basicConfig(level=logging.INFO)` shows what was patched where.
"""

import logging
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

from .plan import Patch
from .tested_releases import releases

logger = logging.getLogger("patchattn")


def note_patched(base: Any, patches: Sequence[Patch]) -> None:
    """Info: what was attached, to how many attention modules."""
    for patch in patches:
        logger.info("Patched %s with %s on %d attention modules", type(base).__name__, patch.variant, len(patch.sites))
        logger.debug("%s: %s, on %s", patch.variant, patch.config, ", ".join(patch.sites))


def note_unpatched(base: Any) -> None:
    """Info: that a model is as before."""
    logger.info("Unpatched %s", type(base).__name__)


@cache
def note_releases() -> None:
    """Once: a warning of releases that patchattn is not made for, an info of those that no test has seen yet."""
    for release in releases():
        if release.verdict in ("too old", "too new"):
            warnings.warn(
                f"{release.name} {release.installed} is {release.verdict} for patchattn, which is tested on "
                f"{release.oldest} to {release.newest}. `patchattn doctor` shows what still works.",
                stacklevel=4,
            )
        elif release.verdict == "newer than tested":
            newest = f"patchattn was tested up to {release.newest}; `patchattn doctor` checks this installation"
            logger.info("%s is %s, and %s", release.name, release.installed, newest)
