"""What an attention module calls its function with, before anything is read off it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(eq=False)
class ModuleCall:
    """What an attention module calls its function with.

    One opaque object: accelerate moves whatever can be moved among the arguments of a module that it dispatches, and
    would move the attention module itself, whose weights may lie on disk.
    """

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    kwargs: dict[str, Any]

    def __len__(self) -> int:
        """Rows of the batch: PEFT, asked for another adapter per row, counts them before it refuses."""
        return len(self.query)
