"""Multi-Token Attention against loops in float64, at its start, with padding, caches and beams, and what it refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.softmax import rows

from .behaviour import randomise, variant_parameters
from .families import FAMILIES
from .pieces import in_chunks
from .reference import DIM, HEADS, KV_HEADS, layer_in_and_out, rotate, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
SETTINGS: list[dict[str, Any]] = [
    {"queries": 3, "keys": 5},
    {"queries": 2, "keys": 3, "weights": False, "heads_of_logits": False, "group": 2},
    {"queries": 4, "keys": 3, "logits": False, "heads_of_weights": False, "gate": False},
]


def live(**settings: Any) -> Any:
    model = patchattn.patch_model(tiny_llama(), "mta", **settings)
    randomise(model)
    return model


def convolved(kernel: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`(N, N)` of a lower triangle, entry by entry; nothing is read above the diagonal or outside."""
    found, (rows_, keys) = np.zeros_like(table), kernel.shape
    for i in range(len(table)):
        for j in range(i + 1):
            for row in range(rows_):
                for key in range(keys):
                    y, x = i - (rows_ - 1 - row), j + key - keys // 2
                    if y >= 0 and 0 <= x <= y:
                        found[i, j] += kernel[row, key] * table[y, x]
    return found


def reference(model: Any, text: np.ndarray) -> np.ndarray:
    """What the layer's attention gives `(N, E)` a text of inputs."""
    attention = model.model.layers[0].self_attn
    weights = {name: getattr(attention, f"{name}_proj").weight.detach().numpy() for name in "qkvo"}
    learned = {name: value.detach().numpy() for name, value in attention.patchattn.mta.named_parameters()}
    count, tables = len(text), np.zeros((HEADS, len(text), len(text)))
    for head in range(HEADS):
        for i in range(count):
            query = rotate((weights["q"] @ text[i]).reshape(HEADS, DIM)[head], i)
            for j in range(i + 1):
                key = (weights["k"] @ text[j]).reshape(KV_HEADS, DIM)[head * KV_HEADS // HEADS]
                tables[head, i, j] = query @ rotate(key, j) / np.sqrt(DIM)
    if "kernel_of_logits" in learned:
        tables = np.stack([convolved(*pair) for pair in zip(learned["kernel_of_logits"], tables, strict=True)])
    if "heads_of_logits" in learned:
        tables = np.einsum("gh,hij->gij", learned["heads_of_logits"][0], tables)
    raised = np.tril(np.exp(tables))
    shares = raised / raised.sum(-1, keepdims=True)
    if "kernel_of_weights" in learned:
        shares = np.stack([convolved(*pair) for pair in zip(learned["kernel_of_weights"], shares, strict=True)])
    if "heads_of_weights" in learned:
        groups = learned["heads_of_weights"]
        size = groups.shape[1]
        shares = np.concatenate(
            [np.einsum("gh,hij->gij", each, shares[n * size : (n + 1) * size]) for n, each in enumerate(groups)]
        )
    values = np.stack([(weights["v"] @ x).reshape(KV_HEADS, DIM) for x in text])
    heads = np.stack([shares[head] @ values[:, head * KV_HEADS // HEADS] for head in range(HEADS)], axis=1)
    if "gate_weight" in learned:
        opening = heads @ learned["gate_weight"] + learned["gate_bias"]
        heads = heads * (2 / (1 + np.exp(-opening)))[..., None]
    return heads.reshape(count, -1) @ weights["o"].T


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings)))
def test_it_is_the_formula(settings: dict[str, Any]) -> None:
    model = live(**settings)
    for text, got in zip(*layer_in_and_out(model, TOKENS), strict=True):
        np.testing.assert_allclose(got, reference(model, text), rtol=0, atol=1e-9)


def test_it_starts_at_the_model_and_learns() -> None:
    model = tiny_llama()
    before = model(TOKENS).logits
    patchattn.patch_model(model, "mta")
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=0, atol=1e-9)
    (model(TOKENS).logits * torch.linspace(-1, 1, 50)).sum().backward()
    for name, parameter in variant_parameters(model).items():
        assert parameter.grad.abs().max() > 0, name
        assert name.count("kernel") == 0 or (parameter.grad != 0).any(dim=-1).all(), name  # every row of every kernel


@torch.no_grad()
def test_rows_and_gradients_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = live(**SETTINGS[0])

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        with torch.enable_grad():
            logits = model(TOKENS).logits
            logits.square().sum().backward()
        return logits, [parameter.grad.clone() for parameter in variant_parameters(model).values()]

    whole = run()
    monkeypatch.setattr(rows, "_ENTRIES", 1)  # as many rows as a chunk reads before it
    torch.testing.assert_close(run(), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("chunks", [[9], [4, 3, 1, 1], [1] * 9], ids=str)
@torch.no_grad()
def test_padding_anywhere_in_one_call_or_in_chunks(chunks: list[int], implementation: str) -> None:
    """On the left, in the middle, on the right of a prompt that then goes on: the text alone is what counts."""
    model = patchattn.patch_model(tiny_llama(attn_implementation=implementation), "mta", **SETTINGS[0])
    randomise(model)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 1]])
    tokens = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(0))
    got = in_chunks(model, tokens, mask, chunks)
    for text, real, given in zip(tokens, mask.bool(), got, strict=True):
        torch.testing.assert_close(given[real], model(text[real][None]).logits[0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_what_is_remembered_is_a_few_queries_and_follows_beams() -> None:
    model = live(**SETTINGS[0])
    cache = DynamicCache(config=model.config)
    model(TOKENS, **cache_argument(model, cache))
    (state,) = cache.layers[0].sequence_states.values()
    assert state.tensors["queries"].shape == (2, HEADS, 4, DIM)  # two of logits, two of weights
    assert state.per_key["terms"].shape == (2, 4, TOKENS.shape[1])
    cache.reorder_cache(torch.tensor([1, 1]))
    last = torch.tensor([[4], [9]])
    got = model(last, **cache_argument(model, cache)).logits[:, 0]
    want = model(torch.cat([TOKENS[[1, 1]], last], dim=1)).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    with pytest.raises(NotImplementedError, match="MTA"):
        cache.crop(-2)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="keys must be odd, as many on either side of a kernel's own, got 4"):
        patchattn.patch_model(tiny_llama(), "mta", keys=4)
    with pytest.raises(ValueError, match="group=3 does not divide the 4 query heads"):
        patchattn.patch_model(tiny_llama(), "mta", group=3)
    with pytest.raises(NotImplementedError, match="does not support bidirectional or cross"):
        patchattn.patch_model(FAMILIES["bert"].make(), "mta")
    with pytest.raises(NotImplementedError, match="leaves out layers with a sliding window"):
        patchattn.patch_model(FAMILIES["mistral"].make(), "mta")
    patchattn.patch_model(FAMILIES["mistral"].make(), "mta", weights=False)
    config = {"quest": {"page": 2, "budget": 4, "dense_layers": 0}, "mta": {}}
    model = patchattn.patch_model(tiny_llama(), list(config), config=config)
    with pytest.raises(NotImplementedError, match="'MTA' remembers something of every key and cannot run inside"):
        model.generate(TOKENS, max_new_tokens=2, do_sample=False)
    config = {"streaming_llm": {"sinks": 1, "recent": 3}, "mta": {}}
    model = patchattn.patch_model(tiny_llama(), list(config), config=config)
    with pytest.raises(NotImplementedError, match="remembers something of every key and cannot go on"):
        model.generate(TOKENS, max_new_tokens=2, do_sample=False)
    model = patchattn.patch_model(tiny_llama(), "mta", queries=2)
    model.model.layers[0].self_attn.patchattn.mta.gate_weight = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(NotImplementedError, match="gates 3 channels of a head of"):
        model(TOKENS)
