"""First and last keys of a mask are worked out once for all layers, and anew where the mask was written to."""

import numpy as np
import pytest
import torch

from patchattn_kernels import AttentionRule
from patchattn_kernels import key_mask as module
from patchattn_kernels.key_mask import key_mask

CPU = torch.device("cpu")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    bounds = module._bounds

    def spy(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(1)
        return bounds(seen)

    monkeypatch.setattr(module, "_bounds", spy)
    return made


def brute(mask: torch.Tensor) -> list[tuple[int, int]]:
    """First and one past the last key of each row; `(B, Tk)` or `(B, 1, Tq, Tk)`."""
    rows = [np.flatnonzero(row) for row in mask.bool().numpy().reshape(-1, mask.shape[-1])]
    return [(int(row[0]), int(row[-1]) + 1) if len(row) else (0, 0) for row in rows]


def told(mask: torch.Tensor, keys: int = 6) -> list[tuple[int, int]]:
    found = key_mask(AttentionRule(1.0, mask=mask, causal=mask.dim() == 2), 4, keys, CPU)
    assert found.first is not None
    assert found.last is not None
    return list(zip(found.first.flatten().tolist(), found.last.flatten().tolist(), strict=True))


@pytest.mark.parametrize("shape", [(3, 6), (2, 1, 4, 6)])
def test_once_for_all_layers(shape: tuple[int, ...], counted: list[int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for _ in range(5):
        assert told(mask) == brute(mask)
    assert len(counted) == 1
    assert told(mask, 5) == brute(mask[..., :5])
    assert len(counted) == 2


def test_views_that_are_alike_and_views_that_are_not(counted: list[int]) -> None:
    """Each layer has its own view of the mask that the model made."""
    whole = torch.rand(2, 1, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    for _ in range(3):
        assert told(whole[..., :6].expand(-1, -1, 4, -1)) == brute(whole[..., :6])
    assert len(counted) == 1
    assert told(whole[..., 3:]) == brute(whole[..., 3:])
    assert told(whole[:, :, :1].expand(-1, -1, 4, -1)) == brute(whole[:, :, :1, :6].expand(-1, -1, 4, -1))
    assert told(whole[1:]) == brute(whole[1:, ..., :6])


def test_anew_where_it_was_written_to(counted: list[int]) -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    told(mask)
    mask[0, :2] = False
    assert told(mask) == brute(mask)
    view = mask[1:]
    view[:, 4:] = False
    assert told(mask) == brute(mask)
    assert len(counted) == 3
    other = torch.ones(2, 6, dtype=torch.bool)
    assert told(other) == brute(other)


def test_nothing_is_kept_of_masks_that_are_gone() -> None:
    before = len(module._known)
    mask = torch.ones(2, 6, dtype=torch.bool)
    told(mask)
    assert len(module._known) == before + 1
    del mask
    assert len(module._known) == before


def test_inference(counted: list[int]) -> None:
    """A mask made in inference is not watched; the bounds of others may be used in training afterwards."""
    mask = torch.ones(2, 6, dtype=torch.bool)
    with torch.inference_mode():
        own = torch.ones(2, 6, dtype=torch.bool)
        told(own)
        own[0, :3] = False
        assert told(own) == brute(own)
        key_mask(AttentionRule(1.0, mask=mask), 4, 6, CPU)
    found = key_mask(AttentionRule(1.0, mask=mask), 4, 6, CPU)
    assert found.first is not None
    assert not found.first.is_inference()
    assert len(counted) == 3
