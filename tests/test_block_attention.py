"""Block attention against blocks that the plain model reads alone, whose keys and values are put together."""

from typing import Any

import torch

import patchattn

from .families import FAMILIES
from .pieces import encoded

IDS = torch.randint(3, 60, (15,), generator=torch.Generator().manual_seed(4))
BLOCKS = [(0, 4), (4, 6), (6, 11)]
SPANS = [["prefix", 0, 4], ["document", 4, 6], ["document", 6, 11]]


def by_blocks(model: Any) -> torch.Tensor:
    stored, logits = [], []
    for start, end in BLOCKS:
        part, own = encoded(model, IDS[start:end], start)
        logits.append(part)
        stored.append(own)
    last, _ = encoded(model, IDS[11:], 11, stored)
    return torch.cat([*logits, last])


def test_blocks_that_are_read_alone() -> None:
    model: Any = FAMILIES["llama"].make_exact()
    expected = by_blocks(model)
    with torch.no_grad():
        plain = model(IDS[None]).logits[0]
        found = patchattn.patch_model(model, "block_attention", spans=SPANS)(IDS[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (plain - expected)[11:].abs().max() > 1e-3


def test_one_block_and_none_are_the_model_itself() -> None:
    model: Any = FAMILIES["gpt2"].make_exact()
    with torch.no_grad():
        plain = model(IDS[None]).logits
        for spans in ([], [["document", 0, 15]], [["document", 0, 9]]):
            found = patchattn.patch_model(model, "block_attention", spans=spans)(IDS[None]).logits
            torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-9)
            patchattn.unpatch_model(model)
