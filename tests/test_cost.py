"""Time and memory of a block."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from patchattn.evaluation.tasks import cost as module
from patchattn.evaluation.tasks.cost import cuda_devices, measured, memory_kind

MODEL = nn.Linear(2, 2)


def test_time_and_first_token() -> None:
    began = time.perf_counter()
    with measured(MODEL) as cost:
        time.sleep(0.05)
        stop = [cost(torch.zeros(3, 4, dtype=torch.long), None) for _ in range(2)]
        time.sleep(0.02)
    whole = time.perf_counter() - began
    assert [found.tolist() for found in stop] == 2 * [[False] * 3]
    assert cost.first_token_seconds is not None
    assert cost.seconds is not None
    assert 0.05 <= cost.first_token_seconds <= cost.seconds - 0.02
    assert cost.seconds <= whole
    assert cost.row().keys() == {"first_token_seconds", "seconds", "peak_memory"}


@pytest.mark.skipif(memory_kind(MODEL) != "process_resident", reason="needs a Linux whose peak can be started anew")
def test_peak_of_the_process() -> None:
    """A block of 200 MiB shows in its own peak, also when it is gone at the end, and not in the next one's."""
    peaks = []
    for size in (2**20, 200 * 2**20, 2**20):
        with measured(MODEL) as cost:
            torch.ones(size, dtype=torch.uint8)
        peaks.append(cost.peak_memory)
    assert None not in peaks
    assert 150 * 2**20 < peaks[1] - peaks[0] < 250 * 2**20
    assert peaks[1] - peaks[2] > 150 * 2**20


def test_memory_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert memory_kind(nn.Linear(2, 2, device="meta")) is None
    monkeypatch.setattr(module, "_CLEAR", tmp_path / "no_folder" / "clear_refs")
    with measured(MODEL) as cost:
        pass
    assert cost.peak_memory is None
    assert cost.first_token_seconds is None


@pytest.mark.gpu
def test_peak_of_a_gpu() -> None:
    model = nn.Linear(2, 2).cuda()
    assert (cuda_devices(model), memory_kind(model)) == ([0], "cuda_allocated")
    with measured(model) as cost:
        held = torch.ones(2**20, dtype=torch.uint8, device="cuda")
        before = torch.cuda.memory_allocated()
        torch.ones(2**24, dtype=torch.uint8, device="cuda")
    assert cost.peak_memory == before + 2**24
    assert held.is_cuda
