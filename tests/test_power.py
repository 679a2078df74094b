"""Blocks at powers of two (PowerAttention, arXiv 2503.03588) against loops, and how far they reach."""

import numpy as np
import pytest
import torch

import patchattn
from patchattn.reading import selection

from .behaviour import close, decoded, positions, text
from .families import FAMILIES, outputs
from .reference import tiny_llama
from .selecting import assert_reads, recorded

TOKENS = torch.arange(3, 43)[None]


def reads(i: int, j: int, block: int, local: int) -> bool:
    away = i // block - j // block
    return away < local or away in {2**n for n in range(20)} or j < block


@pytest.mark.parametrize(("block", "local"), [(1, 1), (1, 3), (3, 1), (4, 2), (2, 5)])
def test_a_token_reads_blocks_at_powers_of_two(block: int, local: int) -> None:
    model = patchattn.patch_model(tiny_llama(), "power", block=block, local=local)
    assert_reads(model, TOKENS, lambda head, i, j: reads(i, j, block, local))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_blocks_are_counted_from_the_start_of_each_text(family: str) -> None:
    """Behind padding that is no whole block, and in packed texts."""
    model, tokens = FAMILIES[family].make_exact(), text(14)
    patchattn.patch_model(model, "power", block=2, local=1)
    alone = [outputs(model, input_ids=row[None])[0] for row in tokens]
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, :3] = 0
    shifted = torch.cat([tokens[:1], tokens[1:].roll(3, dims=1)])
    together = outputs(model, input_ids=shifted, attention_mask=mask, position_ids=positions(mask))[0]
    close(together[:1], alone[0])
    close(together[1:, 3:], alone[1][:, :11])
    packed = torch.cat([tokens[:1, :13], tokens[1:]], dim=1)
    numbers = torch.cat([torch.arange(13), torch.arange(14)])[None]
    together = outputs(model, input_ids=packed, position_ids=numbers, use_cache=False)[0]
    close(together[:, 13:], alone[1])


def test_chunks_that_start_inside_a_block_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = patchattn.patch_model(FAMILIES["llama"].make_exact(), "power", block=4, local=1), text(40)
    whole = outputs(model, input_ids=tokens)[0]
    close(decoded(model, tokens, [7, 1, 12, 20]), whole)
    monkeypatch.setattr(selection, "_PAYS_FROM", 1)  # by an operation that leaves blocks out
    torch.testing.assert_close(decoded(model, tokens, [8, 1, 11, 20]), whole, rtol=1e-5, atol=1e-5)


def test_every_token_is_reached_within_the_bits_of_its_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = patchattn.patch_model(tiny_llama(), "power", block=1, local=1), recorded(monkeypatch)
    with torch.no_grad():
        model(TOKENS)
    step = calls[0][1][0, 0].numpy()
    reached = np.eye(40, dtype=bool)
    for layers in range(1, 7):
        reached = (reached.astype(int) @ step.astype(int)) > 0
        for i, j in np.ndindex(40, 40):
            if j <= i and bin(i - j).count("1") <= layers:
                assert reached[i, j]
