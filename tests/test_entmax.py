"""Entmax against exact sorting and against bisection by loops, its gradients, whole attention, rows in chunks."""

from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.softmax import rows
from patchattn.variants.normalisers.entmax import entmax

from .behaviour import randomise, variant_parameters
from .families import FAMILIES, outputs
from .reference import HEADS, KV_HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])


def sparsemax_by_sorting(z: np.ndarray) -> np.ndarray:
    """Martins & Astudillo, algorithm 1."""
    descending = np.sort(z)[::-1]
    k = np.arange(1, len(z) + 1)
    support = k[1 + k * descending > np.cumsum(descending)][-1]
    return np.maximum(z - (np.cumsum(descending)[support - 1] - 1) / support, 0)


def entmax15_by_sorting(z: np.ndarray) -> np.ndarray:
    """Peters, Niculae & Martins, algorithm 2: of `z / 2` the k largest have mean M and sum of squared deviations S."""
    half = z / 2
    descending = np.sort(half)[::-1]
    threshold = None
    for k in range(1, len(z) + 1):
        mean = descending[:k].mean()
        left = 1 - ((descending[:k] - mean) ** 2).sum()
        if left < 0:
            break
        candidate = mean - (left / k) ** 0.5
        if candidate <= descending[k - 1]:
            threshold = candidate
    return np.maximum(half - threshold, 0) ** 2


def entmax_by_halving(z: np.ndarray, alpha: float) -> np.ndarray:
    low, high = (alpha - 1) * z.max() - 1, (alpha - 1) * z.max()
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(max((alpha - 1) * value - middle, 0.0) ** (1 / (alpha - 1)) for value in z)
        low, high = (middle, high) if total >= 1 else (low, middle)
    return np.array([max((alpha - 1) * value - low, 0.0) ** (1 / (alpha - 1)) for value in z])


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_it_is_what_sorting_finds(spread: float) -> None:
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * spread
    for alpha, exact in ((2.0, sparsemax_by_sorting), (1.5, entmax15_by_sorting)):
        want = torch.tensor(np.stack([exact(row) for row in logits.numpy()]))
        torch.testing.assert_close(entmax(logits, torch.tensor(alpha, dtype=torch.float64)), want, rtol=0, atol=1e-12)
        single = entmax(logits.float(), torch.tensor(alpha))
        torch.testing.assert_close(single.double(), want, rtol=0, atol=5e-6)


@pytest.mark.parametrize("alpha", [1.01, 1.1, 1.3, 1.7, 1.95])
def test_other_exponents_are_what_halving_finds(alpha: float) -> None:
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    want = torch.tensor(np.stack([entmax_by_halving(row, alpha) for row in logits.numpy()]))
    got = entmax(logits, torch.tensor(alpha, dtype=torch.float64))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got.sum(-1), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-10)
    single = entmax(logits.float(), torch.tensor(alpha))
    torch.testing.assert_close(single.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.5, 1.9])
def test_gradients_of_logits_and_of_the_exponent(alpha: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 6, generator=generator, dtype=torch.float64).requires_grad_()
    exponent = torch.tensor(alpha, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: entmax(*given), (logits, exponent), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"blend": None}, {"alpha": 2.0, "learned": False, "blend": 0.5}])
def test_attention_follows_the_formula(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = patchattn.patch_model(tiny_llama(), "entmax", **settings)
    variant = model.model.layers[0].self_attn.patchattn.entmax
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter.uniform_(0.2, 0.8)
    seen: list[Any] = []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: seen.append((call, output))):
        model(TOKENS)
    call, got = seen[0]
    learned = {name: tensor.detach() for name, tensor in variant.state_dict().items()}
    for sequence in range(2):
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            alpha = 1.01 + 0.99 / (1 + np.exp(-float(learned["sparsity"][head])))
            share = 1.0 if variant.blend is None else float(learned["blend"][head])
            for i in range(TOKENS.shape[1]):
                keys, values = (each[sequence, group, : i + 1].numpy() for each in (call.key, call.value))
                logits = keys @ call.query[sequence, head, i].numpy() * call.scaling
                soft = np.exp(logits) / np.exp(logits).sum()
                weights = (1 - share) * soft + share * entmax_by_halving(logits * float(learned["scale"][head]), alpha)
                np.testing.assert_allclose(got[sequence, i, head].numpy(), weights @ values, rtol=0, atol=1e-7)


def test_it_starts_at_the_model_and_everything_learns_by_the_second_step() -> None:
    model = tiny_llama()
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "entmax")
    assert patchattn.patch_info(model)["extra_parameters"] == 3 * HEADS
    torch.testing.assert_close(outputs(model, input_ids=TOKENS)[0], before, rtol=0, atol=1e-10)
    parameters = variant_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (model(TOKENS).logits * torch.linspace(-1, 1, 50)).sum().backward()
        moved = {name: bool((tensor.grad.abs() > 0).all()) for name, tensor in parameters.items()}
        assert moved == {name: step == 1 or name.endswith("blend") for name in parameters}
        optimizer.step()


@pytest.mark.parametrize("family", ["llama", "t5", "gemma2", "mistral"])
def test_rows_in_chunks_give_the_same_numbers_and_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patchattn.patch_model(FAMILIES[family].make().double(), "entmax")
    randomise(model)
    inputs = FAMILIES[family].inputs()

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        found = outputs(model, **inputs)[0]
        result = model(**inputs)[0]
        result.square().sum().backward()
        return found, [parameter.grad.clone() for parameter in variant_parameters(model).values()]

    whole, gradients = run()
    monkeypatch.setattr(rows, "_ENTRIES", 100)
    parts, others = run()
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(others, gradients, rtol=1e-6, atol=1e-9)


def test_rows_that_see_nothing_give_zeros() -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "entmax", blend=None)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(TOKENS)], dim=1)
    padded = torch.cat([torch.ones(2, 3, dtype=torch.long), TOKENS], dim=1)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: seen.append(output), layers=0):
        model(input_ids=padded, attention_mask=mask)
    assert not seen[0][:, :3].any()
    assert bool(torch.isfinite(seen[0]).all())


def test_weights_are_sparse_and_presets_are_the_papers() -> None:
    model = patchattn.patch_model(tiny_llama(attn_implementation="eager"), "entmax", preset="sparsemax")
    weights = model(TOKENS, output_attentions=True).attentions[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 7, dtype=weights.dtype), rtol=0, atol=1e-6)
    lower = torch.ones(7, 7, dtype=torch.bool).tril()
    assert float((weights[:, :, lower] == 0).float().mean()) > 0.1
    assert patchattn.variant_info("entmax").configure({"preset": "paper"}).to_dict()["blend"] is None
