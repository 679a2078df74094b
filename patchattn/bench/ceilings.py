"""What a device can do at best, measured in the same run: copying and multiplying matrices; and the floor it sets."""

from dataclasses import dataclass

import torch

from .problem import Work
from .timing import measure, stopwatch


@dataclass(frozen=True)
class Ceilings:
    """Of one device.

    Attributes:
        copy: bytes per second that a copy reads and writes, together.
        products: FLOP/s of a matrix product of random numbers, by dtype.
    """

    copy: float
    products: dict[str, float]

    def floor(self, work: Work, dtype: str) -> float:
        """Seconds that an operation takes at least: by its FLOPs or by its bytes, whichever takes longer."""
        return max(work.flops / self.products[dtype], work.bytes / self.copy)


def measure_ceilings(device: torch.device, dtypes: set[str], *, seconds: float = 0.3) -> Ceilings:
    """Copy bandwidth and products of random matrices; zeros would run faster than any real numbers.

    Args:
        device: which.
        dtypes: of the products.
        seconds: to spend on each.
    """
    gpu = device.type == "cuda"
    copied, side = 2**29 if gpu else 2**22, 8192 if gpu else 512  # 2 GiB or 16 MiB are copied
    products = {name: _product_rate(device, getattr(torch, name), side, seconds) for name in sorted(dtypes)}
    return Ceilings(_copy_rate(device, copied, seconds), products)


def _copy_rate(device: torch.device, numbers: int, seconds: float) -> float:
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / measure(lambda: target.copy_(source), stopwatch(device), seconds=seconds).median


def _product_rate(device: torch.device, dtype: torch.dtype, side: int, seconds: float) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2.0 * side**3 / measure(lambda: left @ right, stopwatch(device), seconds=seconds).median
