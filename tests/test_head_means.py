"""Means of heads against hooks before the output projection."""

import numpy as np
import pytest
import torch

import patchattn
from patchattn.inspection.head_means import head_means

from .families import FAMILIES
from .reference import DIM, HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [4, 4, 8, 2, 30, 6, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]])
LAST = [4, 6]


@pytest.mark.parametrize("rows", ["all", "last"])
def test_means_are_those_of_what_the_output_projection_reads(rows: str) -> None:
    model, seen = tiny_llama(num_hidden_layers=2), []
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batches = [{"input_ids": TOKENS, "attention_mask": MASK}, {"input_ids": TOKENS[:1, :3]}]
    found = head_means(model, batches, rows=rows)
    handle.remove()
    wanted = [
        seen[batch][row, place].view(HEADS, DIM).detach().numpy()
        for batch, row, places in ((0, 0, range(5)), (0, 1, range(1, 7)), (1, 0, range(3)))
        for place in (places if rows == "all" else places[-1:])
    ]
    got = np.array([found.vectors[1][head] for head in range(HEADS)])
    np.testing.assert_allclose(got, np.mean(wanted, axis=0), rtol=1e-12)
    assert str(found.base) == "llama of 2 layers with 4 heads"


def test_mean_ablation_lets_every_row_give_the_mean() -> None:
    model, seen = tiny_llama(), []
    means = head_means(model, [{"input_ids": TOKENS}])
    patchattn.patch_model(model, "heads", vectors=means.to_dict())
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(TOKENS[:1])
    flat = torch.tensor([number for head in range(HEADS) for number in means.vectors[0][head]])
    torch.testing.assert_close(seen[0], flat.double().expand(1, 7, -1), rtol=1e-6, atol=1e-7)


def test_what_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="rows must be one of"):
        head_means(model, [], rows="first")
    with pytest.raises(ValueError, match="does not reach model"):
        head_means(model, [])
    with pytest.raises(ValueError, match="evaluation mode"):
        head_means(model.train(), [{"input_ids": TOKENS}])
    with pytest.raises(ValueError, match="choose one of each"):
        head_means(FAMILIES["t5"].make(), [FAMILIES["t5"].inputs()])
