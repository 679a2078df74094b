"""CoPE against loops in float64, its start, gradients, and keys that padding or a window hide."""

from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.softmax import rows

from .behaviour import randomise, variant_parameters
from .families import FAMILIES, outputs
from .reference import DIM, HEADS, KV_HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])


def reference(query: np.ndarray, keys: np.ndarray, values: np.ndarray, table: np.ndarray, scaled: bool) -> np.ndarray:
    """One row: keys `(n, D)` up to its own, the last."""
    scale = DIM**-0.5
    logits = [float(query @ key) * scale for key in keys]
    total, place = 0.0, [0.0] * len(keys)
    for j in reversed(range(len(keys))):
        total += 1 / (1 + np.exp(-logits[j]))
        place[j] = min(total, table.shape[1] - 1)
    for j, p in enumerate(place):
        low, high = int(np.floor(p)), int(np.ceil(p))
        embedding = table[:, low] * (1 - (p - low)) + table[:, high] * (p - low)
        logits[j] += float(query @ embedding) * (scale if scaled else 1.0)
    weights = np.exp(np.array(logits) - max(logits))
    return weights / weights.sum() @ values


@pytest.mark.parametrize(("positions", "scaled"), [(3, True), (64, True), (64, False)])
def test_attention_follows_the_formula(positions: int, scaled: bool) -> None:
    torch.manual_seed(0)
    model = patchattn.patch_model(tiny_llama(), "cope", positions=positions, scaled=scaled)
    cope = model.model.layers[0].self_attn.patchattn.cope
    with torch.no_grad():
        cope.embedding.normal_()
    table = cope.embedding.detach().numpy().T
    seen: list[Any] = []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: seen.append((call, output))):
        model(TOKENS)
    call, got = seen[0]
    query, key, value = (each.numpy() for each in (call.query, call.key, call.value))
    for sequence in range(2):
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            for i in range(TOKENS.shape[1]):
                keys, values = key[sequence, group, : i + 1], value[sequence, group, : i + 1]
                want = reference(query[sequence, head, i], keys, values, table, scaled)
                np.testing.assert_allclose(got[sequence, i, head].numpy(), want, rtol=0, atol=1e-10)


def test_it_starts_at_the_model_and_learns() -> None:
    model = tiny_llama()
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "cope", positions=4)
    assert patchattn.patch_info(model)["extra_parameters"] == DIM * 4
    torch.testing.assert_close(outputs(model, input_ids=TOKENS)[0], before, rtol=0, atol=1e-10)
    (model(TOKENS).logits * torch.linspace(-1, 1, 50)).sum().backward()
    (embedding,) = variant_parameters(model).values()
    assert bool((embedding.grad.abs() > 0).all())


def test_counts_have_gradients() -> None:
    """Of queries and keys by way of the gates: against finite differences of the whole layer."""
    torch.manual_seed(0)
    model = patchattn.patch_model(tiny_llama(), "cope", positions=6)
    randomise(model)
    weight = model.model.layers[0].self_attn.k_proj.weight
    loss = model(TOKENS).logits.square().mean()
    (gradient,) = torch.autograd.grad(loss, weight)
    direction = torch.randn_like(weight)
    losses = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            weight.add_(direction, alpha=step)
            losses.append(float(model(TOKENS).logits.square().mean()))
    torch.testing.assert_close(
        (losses[0] - losses[1]) / 2e-3, float((gradient * direction).sum()), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_left_padding_one_token_at_a_time_and_rows_in_chunks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patchattn.patch_model(FAMILIES[family].make().double(), "cope", positions=5)
    randomise(model)
    tokens = torch.randint(1, 50, (1, 20), generator=torch.Generator().manual_seed(0))
    want = outputs(model, input_ids=tokens)[0]
    padded = torch.cat([torch.full((1, 3), 17), tokens], dim=1)
    mask = (torch.arange(23) >= 3).long()[None]
    got = outputs(model, input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))[0]
    torch.testing.assert_close(got[:, 3:], want, rtol=0, atol=1e-9)
    cache, steps = None, []
    with torch.no_grad():
        for at in range(20):
            given = model(tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = given.past_key_values
            steps.append(given.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), want, rtol=0, atol=1e-9)
    monkeypatch.setattr(rows, "_ENTRIES", 200)
    torch.testing.assert_close(outputs(model, input_ids=tokens)[0], want, rtol=0, atol=1e-9)


def test_settings_that_change_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="positions=1 gives every key the same embedding"):
        patchattn.patch_model(tiny_llama(), "cope", positions=1)


def test_counting_keys_of_which_some_are_gone_is_refused() -> None:
    model = patchattn.patch_model(tiny_llama(), ["knorm", "cope"], {"knorm": {"budget": 4}})
    with torch.no_grad():
        cache = model(TOKENS, use_cache=True).past_key_values
        model(TOKENS[:, :1], past_key_values=cache)  # until its end the prompt is whole
        with pytest.raises(NotImplementedError, match="its kv cache has dropped keys"):
            model(TOKENS[:, :1], past_key_values=cache)
