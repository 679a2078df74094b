"""Models that write text, with inputs for each: every decoder of the families, and the vision-language models."""

from typing import Any

import torch
from torch import nn

from . import vlms
from .families import FAMILIES, of_kind

NAMES = [*of_kind("decoder"), *vlms.VLMS]


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in evaluation mode that goes on whatever it says."""
    if name in vlms.VLMS:
        return vlms.make(name, dtype=dtype)
    model: Any = FAMILIES[name].make()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = vlms.PAD
    return model.to(dtype)


def inputs(name: str, rows: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Rows of different length, padded on the left."""
    if name in vlms.VLMS:
        return vlms.inputs(name, rows=rows, dtype=dtype)
    width = 5 + 2 * rows
    ids = torch.randint(3, 60, (rows, width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width) >= 2 * torch.arange(rows).flip(0)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def single(given: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of `inputs`, without its padding."""
    return vlms.single(given, row)


def exact(name: str) -> torch.dtype:
    """In which padding and caching may change no more than the order of sums."""
    return FAMILIES[name].options.get("dtype", torch.float64) if name in FAMILIES else torch.float64
