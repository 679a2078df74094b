"""Whether the host may ask for values."""

import torch


def waits(tensor: torch.Tensor) -> bool:
    """Whether to be told a value of this tensor would hold up what is queued on its device."""
    return tensor.device.type != "cpu"
