"""On which device the commands compute."""

import torch


def choose_device(name: str | None) -> torch.device:
    """The device of that name; without one a GPU where there is one, else the CPU.

    Args:
        name: such as `cuda`, `cuda:1` or `cpu`.

    Returns:
        The device with its index, as `torch.cuda.set_device` needs it.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter is said by a torch that was built without CUDA
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"There is no device {name!r} on this machine ({reason}).") from error
