"""Files that a calibration writes, and what tells one model's from another's."""

import hashlib
import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from .writing import taking_place


def fingerprint(model: nn.Module) -> str:
    """Of the weights: a sum and a shape of each, so that another checkpoint of the same shape is told apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.detach().double().sum().item():.6e}".encode())
    return digest.hexdigest()


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all, as `writing.taking_place` says.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    try:
        with taking_place(path) as place:
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, place, metadata=dict(about))
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}.") from error
