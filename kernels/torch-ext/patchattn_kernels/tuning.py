"""Launch settings of Triton's kernels: a sensible one for every shape, the best of a few where tuning is asked for."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

FOLDER = "PATCHATTN_CACHE"
_known: dict[Path, dict[str, Any]] = {}
_asked = False


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        blocks: sizes of its tiles, by the names of its constexpr arguments.
        num_warps: warps per program.
        num_stages: loads in flight.
    """

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def arguments(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@contextmanager
def tuning() -> Iterator[None]:
    """Within this block, shapes that no launch settings are known for are tuned on GPUs, and the best ones kept.

    Nowhere else is anything tuned: in the middle of a training step it would cost seconds. What was found lies in
    `~/.cache/patchattn/kernels` (or in the folder that PATCHATTN_CACHE names), a JSON file per GPU and version of
    Triton.
    """
    global _asked
    before, _asked = _asked, True
    try:
        yield
    finally:
        _asked = before


def bucket(length: int) -> int:
    """The power of two at or above a length: shapes of one bucket share their launch settings."""
    return 1 << max(0, length - 1).bit_length()


def tile_width(dim: int) -> int:
    """The width of a tile that holds vectors of a head dim: a power of two that tensor cores take."""
    return max(16, bucket(dim))


def choose(
    kernel: str,
    shape: Mapping[str, Any],
    candidates: Sequence[Launch],
    device: torch.device,
    run: Callable[[Launch], Any],
) -> Launch:
    """The launch settings for a kernel on a shape: those found before, else the first candidate.

    Args:
        kernel: its name.
        shape: what the choice depends on, lengths in buckets, and the dtype.
        candidates: the first one is the default; those that the device cannot run are passed over in tuning.
        device: of the tensors.
        run: launches the kernel, for tuning; must not change what it reads.
    """
    if device.type != "cuda":
        return candidates[0]
    path = _file(device)
    name = f"{kernel} {json.dumps(dict(shape), sort_keys=True, default=str)}"
    found = _read(path).get(name)
    launch = next((c for c in candidates if found is not None and asdict(c) == found), None)
    if launch is None and _asked:
        launch = _fastest(candidates, run)
        _read(path)[name] = asdict(launch)
        _write(path)
    return launch or candidates[0]


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
    return folder / f"{gpu}-triton{triton.__version__}.json"


def _read(path: Path) -> dict[str, Any]:
    if path not in _known:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or cut off: it is only a cache
            content = {}
        _known[path] = content if isinstance(content, dict) else {}
    return _known[path]


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(_known[path], file, indent=1)
    os.replace(file.name, path)
