"""HAT against the plain model with masks written out pair by pair, and what changes when one token does."""

from typing import Any

import pytest
import torch

import patchattn

from .families import FAMILIES

SIZE = 4
IDS = torch.randint(4, 60, (2, 14), generator=torch.Generator().manual_seed(1))
REAL = torch.ones_like(IDS)
REAL[1, 9:] = 0


def sees(row: int, key: int) -> bool:
    return row // SIZE == key // SIZE or (row % SIZE == 0 and key % SIZE == 0)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_masks_written_out(family: str) -> None:
    model: Any = FAMILIES[family].make_exact()
    model = model.get_encoder() if family == "t5" else model.base_model
    pairs = torch.tensor([[sees(row, key) for key in range(14)] for row in range(14)])
    added = torch.zeros(2, 1, 14, 14, dtype=torch.float64)
    added.masked_fill_(~(pairs & REAL[:, None, None].bool()), torch.finfo(torch.float64).min)
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=added)[0]
        plain = model(input_ids=IDS, attention_mask=REAL)[0]
        found = patchattn.patch_model(model, "hat", segment=SIZE)(input_ids=IDS, attention_mask=REAL)[0]
    torch.testing.assert_close(found[REAL.bool()], expected[REAL.bool()], rtol=1e-9, atol=1e-9)
    assert (plain - expected)[REAL.bool()].abs().max() > 1e-3


@pytest.mark.parametrize(("every", "changed"), [(1, [*range(8), 8, 9, 10, 11, 12, 13]), (2, [0, *range(4, 8), 8, 12])])
def test_layers_in_which_segments_meet(every: int, changed: list[int]) -> None:
    """What two layers make of a change of the second segment's first token."""
    model: Any = patchattn.patch_model(FAMILIES["bert"].make_exact().base_model, "hat", segment=SIZE, every=every)
    other = IDS[:1].clone()
    other[0, 4] = 63
    with torch.no_grad():
        difference = (model(IDS[:1])[0] - model(other)[0])[0].abs().amax(-1)
    assert (difference > 1e-9).nonzero().flatten().tolist() == changed


def test_left_padding_is_not_counted() -> None:
    model: Any = patchattn.patch_model(FAMILIES["modernbert"].make_exact().base_model, "hat", segment=SIZE)
    padded = torch.nn.functional.pad(IDS[:1], (3, 0))
    with torch.no_grad():
        expected = model(IDS[:1])[0]
        found = model(padded, attention_mask=(padded > 0).long())[0][:, 3:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="'hat' does not support causal or cross"):
        patchattn.patch_model(FAMILIES["llama"].make(), "hat")
