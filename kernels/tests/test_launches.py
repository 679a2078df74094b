"""Launch settings on devices that cannot run all of them, and in several processes at once. No GPU is needed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from patchattn_kernels import (
    block_sparse_attention_backward_triton,
    block_sparse_attention_triton,
    column_mass_triton,
    routed_pairs_triton,
    split_attention_backward_triton,
    split_attention_keys_triton,
    split_attention_triton,
    tuning,
)
from patchattn_kernels.tuning import Launch

KIB = 1024
DEVICE = torch.device("cuda", 0)
LIMITS = {(8, 0): 163 * KIB, (8, 6): 99 * KIB, (8, 9): 99 * KIB, (9, 0): 227 * KIB}  # of NVIDIA's programming guide
CANDIDATES: dict[str, Callable[[int, torch.dtype], tuple[Launch, ...]]] = {
    **{
        part: lambda dim, dtype, part=part: routed_pairs_triton.launches(part, dim, dtype)  # type: ignore[misc]
        for part in ("prefill", "decode", "queries", "keys")
    },
    "attention": lambda dim, dtype: split_attention_triton.launches(dtype, dim),
    "query gradients": lambda dim, dtype: split_attention_backward_triton.launches(dtype, dim),
    "key gradients": lambda dim, dtype: split_attention_keys_triton.launches(dtype, dim),
    "column mass": lambda dim, dtype: column_mass_triton.launches(dtype, dim),
    "sparse": lambda dim, dtype: block_sparse_attention_triton.launches(dim, dtype, False),
    "sparse decoding": lambda dim, dtype: block_sparse_attention_triton.launches(dim, dtype, True),
    "sparse gradients": block_sparse_attention_backward_triton.launches,
}


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Say what a GPU has: the major number of its compute capability, and bytes of shared memory."""
    monkeypatch.setenv("PATCHATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_chosen", {})

    def has(major: int, limit: int) -> None:
        monkeypatch.setattr(tuning, "_shared_memory", lambda device: (major, limit))

    return has


class Limited:
    """Stands for a kernel: notes what it is launched with, and raises where that asks for more than there is."""

    def __init__(self, limit: int, need: Callable[[Launch], int]) -> None:
        self.limit, self.need = limit, need
        self.tried: list[Launch] = []
        self.ran: list[Launch] = []

    def __call__(self, launch: Launch) -> None:
        self.tried.append(launch)
        if self.need(launch) > self.limit:
            raise OutOfResources(self.need(launch), self.limit, "shared memory")
        self.ran.append(launch)


def launch(kernel: Limited, candidates: Any, shape: int = 0) -> None:
    tuning.run_chosen("kernel", {"rows": shape}, candidates, DEVICE, kernel)


@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_needs_too_much_is_passed_over(device: Any, name: str, capability: Any, dtype: torch.dtype) -> None:
    """The first that is tried needs no more than there is: loads in flight alone are counted, tensor by tensor."""
    device(capability[0], LIMITS[capability])
    for dim in (64, 80, 96, 128, 256):
        kernel = Limited(10**9, lambda launch: 0)
        candidates = CANDIDATES[name](dim, dtype)
        launch(kernel, candidates, dim)
        (first,) = kernel.tried
        rows, columns = first.blocks["BLOCK_M"], first.blocks["BLOCK_N"]
        loaded = {"column mass": rows, "keys": 2 * rows, "key gradients": 2 * rows}.get(name, 2 * columns)
        width = 1 << (dim - 1).bit_length()
        stages = first.num_stages if capability[0] >= 9 else max(1, first.num_stages - 1)
        assert stages * loaded * width * dtype.itemsize <= LIMITS[capability]
        for passed in candidates[: candidates.index(first)] if first in candidates else candidates:
            assert passed.shared_memory(capability[0]) > LIMITS[capability]


def test_a_launch_that_does_not_fit_falls_to_the_next_once(device: Any) -> None:
    device(8, 99 * KIB)
    candidates = [Launch({"BLOCK": size}, num_stages=2) for size in (128, 64, 32)]
    kernel = Limited(100, lambda launch: launch.blocks["BLOCK"] * 2)  # more than was thought
    for _ in range(3):
        launch(kernel, candidates)
    assert kernel.tried == [*candidates, candidates[2], candidates[2]]
    launch(kernel, candidates, shape=1)  # of another shape nothing is known
    assert kernel.tried[5:] == candidates


def test_where_no_candidate_fits_smaller_tiles_do(device: Any) -> None:
    device(8, 99 * KIB)
    kernel = Limited(8, lambda launch: launch.num_stages * launch.blocks["M"] * launch.blocks["N"] // 64)
    launch(kernel, [Launch({"M": 128, "N": 64}, num_stages=3), Launch({"M": 64, "N": 64}, num_stages=3)])
    (ran,) = kernel.ran
    assert ran.blocks == {"M": 16, "N": 32}  # the largest that halving finds
    assert ran.num_stages == 1
    small = Limited(-1, lambda launch: 0)
    with pytest.raises(OutOfResources):
        launch(small, [Launch({"M": 32, "N": 32})], shape=1)
    assert small.tried[-1].blocks == {"M": 16, "N": 16}


class Spilling(Limited):
    """Spills so many bytes a thread; Triton counts them in registers of 4."""

    def __init__(self, spills: dict[int, int]) -> None:
        super().__init__(100, lambda launch: launch.blocks["BLOCK"])
        self.spills = spills

    def __call__(self, launch: Launch) -> Any:
        super().__call__(launch)
        return SimpleNamespace(n_spills=self.spills[launch.blocks["BLOCK"]] // 4)


@pytest.mark.parametrize(
    ("spills", "tried", "settles"),
    [
        ({64: 64, 32: 0, 16: 0}, [64], 64),
        ({64: 68, 32: 64, 16: 0}, [64, 32], 32),
        ({64: 1000, 32: 72, 16: 68}, [64, 32, 16], 16),
        ({64: 100, 32: 1000, 16: 200}, [64, 32, 16], 64),
    ],
)
def test_what_spills_gives_way_once(device: Any, spills: dict[int, int], tried: list[int], settles: int) -> None:
    """128 does not fit; what fits and spills gives way to what does not, or the least is taken, and remembered."""
    device(8, 99 * KIB)
    kernel = Spilling(spills)
    for _ in range(3):
        launch(kernel, [Launch({"BLOCK": size}) for size in (128, 64, 32, 16)])
    assert [one.blocks["BLOCK"] for one in kernel.ran] == [*tried, settles, settles]


def test_what_was_found_to_be_fastest_may_spill(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device(8, 99 * KIB)
    times = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr("triton.testing.do_bench", lambda run, **_: (run(), next(times))[1])
    kernel = Spilling({64: 0, 32: 1000, 16: 0})
    with tuning.tuning():
        launch(kernel, [Launch({"BLOCK": size}) for size in (64, 32, 16)])
    assert kernel.ran[-1].blocks["BLOCK"] == 32


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_kernel_has_settings_for_a_small_device(device: Any, name: str) -> None:
    """64 KiB, which the smallest devices have, were both blocks of two tensors each held and loaded in every stage."""
    device(9, 64 * KIB)
    for dim in (64, 80, 96, 128, 256):
        for dtype in (torch.bfloat16, torch.float32):
            width = (1 << (dim - 1).bit_length()) * dtype.itemsize
            kernel = Limited(64 * KIB, lambda launch: launch.num_stages * sum(launch.blocks.values()) * 2 * width)  # noqa: B023
            launch(kernel, CANDIDATES[name](dim, dtype), shape=dim * dtype.itemsize)
            assert kernel.ran


def test_tuning_passes_over_what_does_not_fit(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device(8, 99 * KIB)
    monkeypatch.setattr("triton.testing.do_bench", lambda run, **_: run() or 1.0)
    kernel = Limited(100, lambda launch: launch.blocks["BLOCK"] * 2)
    candidates = [Launch({"BLOCK": size}) for size in (128, 64, 32)]
    with tuning.tuning():
        launch(kernel, candidates)
    assert kernel.ran[-1] == candidates[2]


# as much as the choice of any kernel depends on
SHAPE = dict.fromkeys(("CAUSAL", "WINDOWED", "MASKED", "PER_ROW", "paged", "output"), False) | dict[str, Any](
    rows=16, keys=8192, lines=64, dim=128, dim_v=128, dtype=torch.bfloat16
)


def test_a_known_launch_is_looked_up(device: Any) -> None:
    """No file, no JSON, no question to the device: a look into a dictionary."""
    device(9, 227 * KIB)
    candidates = [Launch({"BLOCK": 64})]
    tuning.run_chosen("kernel", SHAPE, candidates, DEVICE, lambda launch: None)
    python, built_in, ran = list[str](), list[str](), list[Launch]()

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            python.append(frame.f_code.co_name)
        elif event == "c_call":
            built_in.append(argument.__name__)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        tuning.run_chosen("kernel", SHAPE, candidates, DEVICE, ran.append)
    finally:
        sys.setprofile(before)
    assert ran == candidates
    assert python == ["run_chosen"]
    assert {*built_in} <= {"values", "get", "append", "setprofile"}, built_in


PROGRAM = """
import json, sys, torch, triton.testing
from patchattn_kernels import tuning
from patchattn_kernels.tuning import Launch

torch.cuda.get_device_name = lambda device: "Some GPU"
tuning._shared_memory = lambda device: (9, 10**6)
triton.testing.do_bench = lambda run, **_: run() or 1.0
first, count = json.loads(sys.argv[1])
candidates = [Launch({"BLOCK": 64}), Launch({"BLOCK": 128})]
device = torch.device("cuda", 0)
tuning.run_chosen("kernel", {"rows": -1}, candidates, device, lambda launch: None)  # the file is read
print("ready", flush=True)
sys.stdin.readline()
with tuning.tuning():
    for shape in range(first, first + count):
        tuning.run_chosen("kernel", {"rows": shape}, candidates, device, lambda launch: None)
"""


def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    """Both have read the file before either writes, and write at the same time."""
    count = 100
    environment = os.environ | {"PATCHATTN_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps([first, count])],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in (0, count)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(300) for process in processes] == [0, 0]
    (path,) = (tmp_path / "kernels").iterdir()
    shapes = {json.loads(name.removeprefix("kernel "))["rows"] for name in tuning._read(path)}
    assert shapes == set(range(2 * count))
