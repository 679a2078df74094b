"""Which implementation of an operation runs: Triton's kernels, or plain torch."""

import functools
import importlib.util
import logging
import os
from contextlib import AbstractContextManager, nullcontext

import torch

SETTING = "PATCHATTN_KERNELS"
_LOGGER = logging.getLogger("patchattn.kernels")


@torch.compiler.assume_constant_result
def chosen_backend() -> str:
    """`reference`, `triton` or `auto`: the environment variable PATCHATTN_KERNELS; auto where it is empty or not set.

    Raises:
        ValueError: it is something else.
    """
    name = os.environ.get(SETTING) or "auto"
    if name not in ("reference", "triton", "auto"):
        raise ValueError(f"{SETTING} must be reference, triton or auto, got {name!r}.")
    return name


def triton_runs(tensor: torch.Tensor, *, lacking: str | None = None) -> bool:
    """Whether Triton's kernel is to compute a call.

    `auto` takes it on GPUs that it knows and where it can do what is asked; `triton` insists on it.

    Args:
        tensor: one of the operands; all are on one device.
        lacking: what the kernel cannot do of what this call needs, in words; `None` if it can do all.

    Raises:
        NotImplementedError: PATCHATTN_KERNELS is `triton`, and it cannot be; the message says why.
    """
    backend = chosen_backend()
    if backend == "reference":
        return False
    reason = lacking or _missing(tensor.device)
    if reason is not None and backend == "triton":
        raise NotImplementedError(
            f"{SETTING} is triton, but the kernel cannot compute this call: {reason}. Set it to auto or reference."
        )
    if reason is not None:
        _note_plain_torch(reason, tensor.is_cuda)
    return reason is None and (backend == "triton" or tensor.is_cuda)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def rowwise(tensor: torch.Tensor) -> torch.Tensor:
    """With vectors whose numbers lie side by side, as kernels read them."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


@torch.compiler.assume_constant_result  # not traced, and a compiled model tells it, too
def _note_plain_torch(reason: str, is_cuda: bool) -> bool:
    return _note_once(reason, is_cuda)


@functools.cache
def _note_once(reason: str, is_cuda: bool) -> bool:
    """Say why Triton's kernels do not run: on a GPU that is news."""
    _LOGGER.log(logging.INFO if is_cuda else logging.DEBUG, "Plain torch computes in place of Triton: %s", reason)
    return True


@torch.compiler.assume_constant_result
def _missing(device: torch.device) -> str | None:
    if not _has_triton():
        return "triton is not installed"
    if device.type == "cpu":
        interprets = os.environ.get("TRITON_INTERPRET") == "1"
        return (
            None
            if interprets
            else "its tensors are on a CPU, where only Triton's interpreter runs (TRITON_INTERPRET=1)"
        )
    if device.type != "cuda":
        return f"its tensors are on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
