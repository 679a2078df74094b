"""Launch settings of Triton's kernels: a sensible one for every shape, the best of a few where tuning is asked for."""

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

FOLDER = "PATCHATTN_CACHE"
SMALLEST = 16  # tile, that products take
SPILLS = 64  # bytes of registers that a thread may spill
_chosen: dict[tuple[Any, ...], "Launch"] = {}  # what runs on a shape
_known: dict[Path, dict[str, Any]] = {}  # what files said when they were read, and what was found since
_asked = False


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        blocks: sizes of its tiles, by the names of its constexpr arguments.
        num_warps: warps per program.
        num_stages: loads in flight.
        streamed: bytes of the tiles that one step of its loop loads.
        held: bytes of the tiles that it keeps through the loop.
    """

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    streamed: int = 0
    held: int = 0

    def arguments(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def shared_memory(self, major: int) -> int:
        """About how many bytes of it a program takes on a compute capability of that major number."""
        if major >= 9:
            return self.num_stages * self.streamed + self.held
        # one stage less, since what is used goes to registers; weights go through it into the next product
        return max(1, self.num_stages - 1) * self.streamed + self.held + 2 * prod(self.blocks.values())


def settings(
    sizes: Iterable[tuple[int, int, int, int]],
    dim: int,
    dtype: torch.dtype,
    *,
    streamed: tuple[str, int],
    held: tuple[str, int],
    in_two: bool = False,
) -> tuple[Launch, ...]:
    """Launch settings from BLOCK_M, BLOCK_N, warps and stages.

    Args:
        sizes: of each.
        dim: the larger head dim.
        dtype: of the operands.
        streamed: which block's vectors a loop's step loads, and how many tensors of them.
        held: which block's vectors stay, and how many tensors of them.
        in_two: whether vectors are held by tiles of `tile_widths`.
    """
    width, launches = (sum(tile_widths(dim)) if in_two else tile_width(dim)) * dtype.itemsize, []
    for rows, columns, warps, stages in sizes:
        blocks = {"BLOCK_M": rows, "BLOCK_N": columns}
        bytes_of = [blocks[name] * count * width for name, count in (streamed, held)]
        launches.append(Launch(blocks, warps, stages, *bytes_of))
    return tuple(launches)


@contextmanager
def tuning() -> Iterator[None]:
    """Within this block, shapes that no launch settings are known for are tuned on GPUs, and the best ones kept.

    Nowhere else is anything tuned: in the middle of a training step it would cost seconds. What was found lies in
    `~/.cache/patchattn/kernels` (or in the folder that PATCHATTN_CACHE names), a file per GPU and version of Triton, a
    line of JSON per choice. Processes that tune at the same time add to one file.
    """
    global _asked
    before, _asked = _asked, True
    _chosen.clear()
    try:
        yield
    finally:
        _asked = before


def bucket(length: int) -> int:
    """The power of two at or above a length: shapes of one bucket share their launch settings."""
    return 1 << max(0, length - 1).bit_length()


def tile_width(dim: int) -> int:
    """The width of a tile that holds vectors of a head dim: a power of two that tensor cores take."""
    return max(SMALLEST, bucket(dim))


def tile_widths(dim: int) -> tuple[int, int]:
    """Widths of the one or two tiles that hold vectors of a head dim with the least padding; the second may be 0.

    Such as 64 and 16 for 80, in place of 128: the products, the registers and the shared memory are those of 80.
    """
    half = tile_width(dim) // 2
    rest = tile_width(dim - half)
    return (half, rest) if rest < half else (2 * half, 0)


def padded_splits(splits: int) -> int:
    """How many parts a kernel that merges them has room for: one of two numbers, so that two versions serve all."""
    return 8 if splits <= 8 else 64


@functools.cache
def processors(device: torch.device, otherwise: int) -> int:
    """How many multiprocessors a GPU has; `otherwise` where it is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else otherwise


def run_chosen(
    kernel: str,
    shape: Mapping[str, Any],
    candidates: Sequence[Launch],
    device: torch.device,
    run: Callable[[Launch], Any],
) -> None:
    """Run a kernel with the launch settings for a shape: those found by tuning, else the first that the device takes.

    Candidates that spill more than `SPILLS` give way to a later one that does not, or to the one that spills least:
    how much they do depends on the mask, the device and the version of Triton. What is found out is kept: the next
    launch looks it up.

    Args:
        kernel: its name.
        shape: what the choice depends on, lengths in buckets, and the dtype; always the same names for a kernel.
        candidates: the first one is the default. Where the device takes none, smaller tiles than the last one's do.
        device: of the tensors.
        run: launches the kernel, and returns what Triton's launch does; must not change what it reads.

    Raises:
        OutOfResources: of Triton: not even the smallest tiles fit.
    """
    if device.type != "cuda":
        run(candidates[0])
        return
    key = (kernel, device, *shape.values())
    launch = _chosen.get(key)
    if launch is None:
        _chosen[key] = _settle(kernel, shape, candidates, device, run)
    else:
        run(launch)


def _settle(
    kernel: str, shape: Mapping[str, Any], candidates: Sequence[Launch], device: torch.device, run: Callable[..., Any]
) -> Launch:
    """Run a kernel on a shape for the first time; with which settings."""
    from triton.runtime.errors import OutOfResources

    path = _file(device)
    name = f"{kernel} {json.dumps(dict(shape), sort_keys=True, default=str)}"
    found = _read(path).get(name)
    options = fitting(candidates, *_shared_memory(device))
    best = next((option for option in candidates if option.arguments() == found), None)
    if best is None and _asked:
        best = _fastest(options, run)
        _add(path, name, best)
    if best is not None:
        options = [best, *(option for option in options if option is not best)]
    least: tuple[int, Launch] | None = None
    for option in options:
        try:
            spilled = 4 * getattr(run(option), "n_spills", 0)
        except OutOfResources:
            continue
        if spilled <= SPILLS or option is best:
            return option
        if least is None or spilled < least[0]:
            least = spilled, option
    if least is not None:
        return least[1]
    for option in _smaller(options[-1]):
        try:
            run(option)
        except OutOfResources as error:
            failure = error
            continue
        return option
    raise failure


def fitting(candidates: Sequence[Launch], major: int, limit: int) -> list[Launch]:
    """Those that need no more bytes of shared memory than `limit`; without any, one with no loads in flight.

    Args:
        candidates: one at least.
        major: number of the compute capability.
        limit: that a program may have.
    """
    small = [option for option in candidates if option.shared_memory(major) <= limit]
    return small or [replace(min(candidates, key=lambda option: option.shared_memory(major)), num_stages=1)]


def _smaller(launch: Launch) -> Iterator[Launch]:
    """Settings that take less and less: without loads in flight, then with tiles of half the size."""
    launch = replace(launch, num_stages=1)
    yield launch
    while max(launch.blocks.values(), default=0) > SMALLEST:
        largest = max(launch.blocks, key=lambda name: launch.blocks[name])
        launch = replace(launch, blocks={**launch.blocks, largest: launch.blocks[largest] // 2})
        yield launch


@functools.cache
def _shared_memory(device: torch.device) -> tuple[int, int]:
    """The major number of a GPU's compute capability, and bytes of shared memory that a program may have."""
    import triton

    with torch.cuda.device(device):
        limit = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
    return torch.cuda.get_device_capability(device)[0], int(limit)


def _fastest(candidates: Sequence[Launch], run: Callable[[Launch], Any]) -> Launch:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: list[tuple[float, int]] = []
    for number, launch in enumerate(candidates):
        try:
            times.append((float(do_bench(partial(run, launch), return_mode="median")), number))
        except (OutOfResources, CompilationError):
            continue
    return candidates[min(times)[1]] if times else candidates[0]


def _file(device: torch.device) -> Path:
    import triton

    folder = Path(os.environ.get(FOLDER, Path.home() / ".cache" / "patchattn")) / "kernels"
    gpu = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return folder / f"{gpu}-triton{triton.__version__}.jsonl"


def _read(path: Path) -> dict[str, Any]:
    if path not in _known:
        _known[path] = {}
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # none yet
            lines = []
        for line in lines:
            try:
                _known[path].update(json.loads(line))
            except (ValueError, TypeError):  # cut off: it is only a cache
                continue
    return _known[path]


def _add(path: Path, name: str, launch: Launch) -> None:
    """One line at the end, in one write: those of other processes stay."""
    _read(path)[name] = launch.arguments()
    path.parent.mkdir(parents=True, exist_ok=True)
    line = f"\n{json.dumps({name: launch.arguments()})}\n"  # begins anew, should the last one have been cut off
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
