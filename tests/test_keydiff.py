"""KeyDiff against loops in float64: the keys least like the mean direction of all that are stored."""

import pytest
import torch

from .evictions import extended, kept_by_loops, padded, registered, watched


def likeness(keys: torch.Tensor) -> list[float]:
    """Minus the cosine of each key `(n, D)` and the mean of all of length one."""
    lengths = [float(key @ key) ** 0.5 for key in keys]
    mean = sum(key / length for key, length in zip(keys, lengths, strict=True)) / len(keys)
    size = float(mean @ mean) ** 0.5
    return [-float(key @ mean) / (length * size) for key, length in zip(keys, lengths, strict=True)]


@pytest.mark.parametrize(("event", "sizes"), [("chunk", [12]), ("chunk", [7, 5]), ("prompt", [7, 5]), ("call", [12])])
def test_the_set_after_every_event(event: str, sizes: list[int]) -> None:
    ids, real = padded()
    more = torch.randint(3, 60, (3, 4), generator=torch.Generator().manual_seed(2))
    ids, real = torch.cat([ids, more], dim=1), extended(real, 16)
    with registered():
        _, layers, _ = watched("keydiff", {"budget": 6, "event": event}, ids, real, [*sizes, *[1] * 4])
    for calls in layers:
        keys = torch.cat([call["key"][:, :, -call["query"].shape[2] :] for call in calls], dim=2)
        for row in range(3):
            for head in range(2):
                held: list[int] = []
                end = 0
                for number, call in enumerate(calls):
                    start, end = end, end + call["query"].shape[2]
                    held = [*held, *(place for place in range(start, end) if real[row, place])]
                    assert call["seen"][row, 2 * head, -1].nonzero()[:, 0].tolist() == held
                    is_last = number == len(sizes) - 1
                    if event == "call" or (number < len(sizes) if event == "chunk" else is_last):
                        scores = likeness(keys[row, head, held])
                        held = [held[place] for place in kept_by_loops(scores, [True] * len(held), 6)]
