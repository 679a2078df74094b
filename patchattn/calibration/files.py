"""Files that a calibration writes, and what tells one model's from another's."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import nn


def fingerprint(model: nn.Module) -> str:
    """Of the weights: a sum and a shape of each, so that another checkpoint of the same shape is told apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.detach().double().sum().item():.6e}".encode())
    return digest.hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a killed process leaves the file of before."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
