"""Files that a calibration writes, and what tells one model's from another's."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """Of the weights: a sum and a shape of each, so that another checkpoint of the same shape is told apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.detach().double().sum().item():.6e}".encode())
    return digest.hexdigest()


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all: a killed process leaves the file of before.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    part = Path(path).with_name(f"{Path(path).name}.part")
    try:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, part, metadata=dict(about))
    except SafetensorError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}.") from error
    os.replace(part, path)
