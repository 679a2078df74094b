"""Numbers of heads as tensors, by which some of what is of all heads is taken: made once, not in every call."""

import functools

import torch


@functools.lru_cache(maxsize=1024)
def indices(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """`(h,)` int64 on a device; nobody writes to it."""
    with torch.inference_mode(False):  # a graph may keep it
        return torch.tensor(numbers, dtype=torch.long, device=device)
