"""Published models that benchmarks measure: plain folders, named as on the Hub, in the one that PATCHATTN_MODELS names.

Tests and notebooks look there too. A folder that is given stands for it.
"""

import os
from collections.abc import Callable
from pathlib import Path

import typer

SMOL, WHISPER, DINO = "SmolLM2-135M-Instruct", "whisper-tiny.en", "dinov2-small"


def if_there(name: str) -> Callable[[], Path | None]:
    """Finds the folder of a model; None where it is not."""

    def find() -> Path | None:
        folder = Path(os.environ.get("PATCHATTN_MODELS", "")) / name
        return folder if "PATCHATTN_MODELS" in os.environ and folder.is_dir() else None

    return find


def needed(name: str) -> Callable[[], Path]:
    """Finds the folder of a model, and asks for one where it is not."""

    def find() -> Path:
        folder = if_there(name)()
        if folder is None:
            raise typer.BadParameter(f"Give a folder of {name}, or in PATCHATTN_MODELS one that holds {name}.")
        return folder

    return find
