"""Shifted sparse attention (LongLoRA, arXiv 2309.12307) against loops over groups; nothing leaks from behind."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import patchattn

from .behaviour import decoded, text
from .families import FAMILIES, outputs
from .reference import tiny_llama
from .selecting import assert_reads, assert_texts_are_apart, recorded


def group_of(place: int, length: int, groups: int, is_shifted: bool) -> int:
    """Number of a token's group, by the borders between groups."""
    size = math.ceil(length / groups)
    borders = [border for border in range(size // 2 if is_shifted else 0, length, size) if border > 0]
    return sum(place >= border for border in borders)


@pytest.mark.parametrize(("length", "groups"), [(16, 4), (19, 4), (12, 2), (9, 3), (5, 7)])
def test_a_token_reads_its_own_group_and_half_of_the_heads_shift_theirs(length: int, groups: int) -> None:
    model = patchattn.patch_model(tiny_llama(), "longlora", groups=groups, when="always")

    def reads(head: int, i: int, j: int) -> bool:
        return len({group_of(place, length, groups, head >= 2) for place in (i, j)}) == 1

    assert_reads(model, torch.arange(3, 3 + length)[None], reads)


@pytest.mark.parametrize(("shifted", "heads"), [(0.0, 0), (0.25, 1), (0.75, 3), (1.0, 4)])
def test_some_of_the_heads_shift_and_all_tokens_read_sinks(shifted: float, heads: int) -> None:
    settings = {"groups": 4, "shifted": shifted, "sinks": 2, "when": "always"}
    model = patchattn.patch_model(tiny_llama(), "longlora", settings)

    def reads(head: int, i: int, j: int) -> bool:
        return j < 2 or len({group_of(place, 19, 4, head >= 4 - heads) for place in (i, j)}) == 1

    assert_reads(model, torch.arange(3, 22)[None], reads)


def test_it_acts_while_training_alone() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected, cached = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 2])
    patchattn.patch_model(model, "longlora", groups=3)
    assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
    assert torch.equal(decoded(model, tokens, [9, 1, 2]), cached)
    assert not torch.equal(outputs(model.train(), input_ids=tokens)[0], expected)
    with patchattn.patched(FAMILIES["llama"].make(), "longlora", groups=1, when="always") as whole:
        assert torch.equal(outputs(whole, input_ids=tokens)[0], expected)


def test_no_loss_depends_on_later_tokens_as_it_does_where_the_last_group_wraps_around() -> None:
    model = patchattn.patch_model(tiny_llama(), "longlora").train()
    embedded = model.get_input_embeddings()(torch.arange(3, 19)[None]).detach().requires_grad_()
    for i in range(16):
        (gradient,) = torch.autograd.grad(model(inputs_embeds=embedded).logits[0, i].square().sum(), embedded)
        assert not bool(gradient[0, i + 1 :].any())
        assert bool(gradient[0, i].any())


@pytest.mark.parametrize("side", ["left", "right"])
def test_groups_are_those_of_each_text(side: str) -> None:
    """Beside padding on either side, and in packed texts."""
    model = FAMILIES["llama"].make_exact()
    patchattn.patch_model(model, "longlora", groups=3, when="always")
    assert_texts_are_apart(model, side)


def test_gradients_are_those_of_dense_attention_under_the_mask() -> None:
    model, tokens = patchattn.patch_model(tiny_llama(), "longlora").train(), torch.arange(3, 19)[None]
    module: nn.Module = model.model.layers[0].self_attn
    model(tokens).logits.square().sum().backward()
    got = module.v_proj.weight.grad.clone()
    patchattn.unpatch_model(model)
    model.zero_grad()
    rows = np.zeros((4, 16, 16), dtype=bool)
    for head, i, j in np.ndindex(*rows.shape):
        same = group_of(i, 16, 4, head >= 2) == group_of(j, 16, 4, head >= 2)
        rows[head, i, j] = j <= i and same
    model(tokens, attention_mask=torch.from_numpy(rows)[None]).logits.square().sum().backward()
    torch.testing.assert_close(got, module.v_proj.weight.grad, rtol=1e-9, atol=1e-12)


def test_single_tokens_are_dense_and_models_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch)
    model = patchattn.patch_model(tiny_llama(), "longlora", when="always")
    decoded(model, torch.arange(3, 15)[None], [8, 1, 3])
    assert [int(seen[0, 0, -1].sum()) for _, seen, _ in calls] == [2, 9, 3]
    with pytest.raises(NotImplementedError, match="leaves out layers with a sliding window"):
        patchattn.patch_model(FAMILIES["mistral"].make(), "longlora")
    with pytest.raises(ValueError, match="groups must lie between 1"):
        patchattn.patch_model(tiny_llama(), "longlora", groups=0)
