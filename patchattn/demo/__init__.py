"""`patchattn demo`: what patching, fine-tuning and undoing a patch looks like, measured."""

from .run import run_demo
from .tasks import make_task

__all__ = ["make_task", "run_demo"]
