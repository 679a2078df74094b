"""What work with a model costs: seconds, the time until the first token, and the peak of memory."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import StoppingCriteria

MemoryKind = Literal["cuda_allocated", "process_resident"]

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Cost(StoppingCriteria):
    """What a block under `measured` cost; as a stopping criterion of `generate` it notes the first token, no more.

    Attributes:
        seconds: of the whole block.
        first_token_seconds: from the block's start until the first token was there; None if this was never noted.
        peak_memory: bytes, of the kind that `memory_kind` says; None where it cannot be measured.
    """

    def __init__(self, devices: list[int]) -> None:
        self.seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.peak_memory: int | None = None
        self._devices = devices
        self._began = now(devices)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.first_token_seconds is None:  # at later tokens it would only make the GPU wait
            self.first_token_seconds = now(self._devices) - self._began
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def row(self) -> dict[str, float | int | None]:
        """The three figures, as they stand in the rows of a task."""
        return {
            "first_token_seconds": self.first_token_seconds,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
        }

    def end(self) -> None:
        """Take the time, which `measured` does at the end of its block."""
        self.seconds = now(self._devices) - self._began


@contextmanager
def measured(model: Any) -> Iterator[Cost]:
    """Measure time and memory of a block; blocks must not be nested, since each starts the peak anew.

    On GPUs the peak is that of the tensors allocated on all devices of the model, weights included, each device's own
    peak added. On a Linux CPU it is the peak of the resident size of the whole process, with everything that it holds.

    Args:
        model: whose devices are waited for.

    Yields:
        What it cost, complete when the block has ended without an error.
    """
    devices = cuda_devices(model)
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    kind = memory_kind(model)
    if kind == "process_resident":
        _CLEAR.write_text("5")
    cost = Cost(devices)
    yield cost
    cost.end()
    if kind == "cuda_allocated":
        cost.peak_memory = sum(map(torch.cuda.max_memory_allocated, devices))
    elif kind == "process_resident":
        cost.peak_memory = _resident("VmHWM")


def memory_kind(model: Any) -> MemoryKind | None:
    """What `measured` takes as the memory of this model: allocated on its GPUs, or resident in the process (Linux)."""
    if cuda_devices(model):
        return "cuda_allocated"
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return None
    try:
        with _CLEAR.open("w"):  # some containers have the file and do not let it be written
            return "process_resident" if "VmHWM" in _STATUS.read_text() else None
    except OSError:
        return None


def cuda_devices(model: Any) -> list[int]:
    """Indices of the GPUs that the model's parameters are on."""
    return sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})


def now(devices: list[int]) -> float:
    """Seconds on a clock that only goes forward, when all that was asked of these GPUs is done."""
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _resident(field: str) -> int:
    """A size in bytes from the process's status, which states it in KiB under the name of kB."""
    (kib,) = re.findall(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.M)
    return 1024 * int(kib)
