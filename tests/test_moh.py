"""MoH against its formulas (arXiv 2410.11842), computed independently in numpy."""

import numpy as np
import pytest
import torch

import patchattn

from .behaviour import randomise
from .families import FAMILIES, outputs
from .reference import HEADS, attend, layer_in_and_out, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13]])


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def chosen(scores: np.ndarray, k: int) -> np.ndarray:
    mask = np.zeros_like(scores)
    mask[np.argsort(-scores)[:k]] = 1
    return mask


def expected(model: torch.nn.Module, gate) -> tuple[np.ndarray, np.ndarray]:
    inputs, given = layer_in_and_out(model, TOKENS)
    return attend(model.model.layers[0].self_attn, inputs[0], gate=gate), given[0]


@pytest.mark.parametrize(("ratio", "shared", "k"), [(0.75, 2, 1), (0.5, 1, 1), (0.25, 1, 0)])
def test_query_norm_router_keeps_the_heads_with_the_longest_queries(ratio: float, shared: int, k: int) -> None:
    model = patchattn.patch_model(tiny_llama(), "moh", active_ratio=ratio)

    def gate(x: np.ndarray, queries: np.ndarray) -> np.ndarray:
        return np.concatenate([np.ones(shared), chosen(np.linalg.norm(queries[shared:], axis=-1), k)])

    want, got = expected(model, gate)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shared", [0, 1, 2, 3])
def test_learned_router_has_the_released_codes_factors(shared: int) -> None:
    model = patchattn.patch_model(tiny_llama(), "moh", router="learned", active_ratio=0.75, shared_ratio=shared / HEADS)
    randomise(model)
    variant = model.model.layers[0].self_attn.patchattn.moh
    weights = {name: p.detach().numpy() for name, p in variant.named_parameters()}
    k = 3 - shared
    assert set(weights) == (
        ({"routed_weight"} if k else set())
        | ({"shared_weight"} if shared > 1 else set())
        | ({"type_weight"} if shared and k else set())
    )

    def gate(x: np.ndarray, queries: np.ndarray) -> np.ndarray:
        shared_gate = softmax(weights["shared_weight"] @ x) * shared if shared > 1 else np.ones(shared)
        if not k:
            return np.concatenate([shared_gate, np.zeros(HEADS - shared)])
        scores = softmax(weights["routed_weight"] @ x)
        kept = scores * chosen(scores, k)
        routed_gate = kept / kept.sum() * k
        if not shared:
            return routed_gate
        first, second = 2 * softmax(weights["type_weight"] @ x)
        return np.concatenate([first * shared_gate, second * routed_gate])

    want, got = expected(model, gate)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_the_router_reads_the_query_before_its_norm() -> None:
    model, tokens = FAMILIES["qwen3"].make(), FAMILIES["qwen3"].inputs()["input_ids"]
    module = model.model.layers[0].self_attn
    norms: list[torch.Tensor] = []
    module.q_proj.register_forward_hook(lambda _, __, output: norms.append(output.unflatten(-1, (4, 8)).norm(dim=-1)))
    gates: list[torch.Tensor] = []
    patchattn.patch_model(model, "moh", active_ratio=0.5, shared_ratio=0.0)
    with patchattn.observe(model, lambda seen: gates.append(seen.values["gate"])):
        outputs(model, input_ids=tokens)
    want = torch.zeros_like(norms[0]).scatter(-1, norms[0].topk(2, dim=-1).indices, 1.0)
    assert torch.equal(gates[0], want)


def test_heads_equal_rows_are_told_apart() -> None:
    """With as many tokens as heads only the memory layout says which axis of the query is which."""
    for family in ("qwen3", "gemma3_text"):
        model = patchattn.patch_model(FAMILIES[family].make(), "moh", active_ratio=0.5)
        tokens = FAMILIES[family].inputs()["input_ids"]
        four = outputs(model, input_ids=tokens[:, :4])[0]
        torch.testing.assert_close(four, outputs(model, input_ids=tokens[:, :5])[0][:, :4], rtol=1e-4, atol=1e-4)


def test_straight_through_gradient_reaches_the_query_projection_of_a_dropped_head_only_through_scores() -> None:
    """Forward is 0 or 1; backward is that of mask * score, so only while training does the score have a gradient."""
    slopes = []
    for training in (False, True):
        model = patchattn.patch_model(tiny_llama(), "moh", active_ratio=0.5, shared_ratio=0.25).train(training)
        model(TOKENS).logits.pow(2).sum().backward()
        slopes.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert not torch.equal(slopes[0], slopes[1])
    assert bool(slopes[1].isfinite().all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active_ratio": 1.5}, "active_ratio must lie between 0.0 and 1.0, got 1.5"),
        ({"active_ratio": "half"}, r"active_ratio must be float \| tuple\[float, ...\] \| None, got 'half'"),
        ({"active_ratio": 0.25, "shared_ratio": 0.5}, "fewer than the 2 shared ones"),
        ({"router": "random"}, "router"),
        ({"active_ration": 0.5}, "did you mean 'active_ratio'"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    model = tiny_llama()
    with pytest.raises((ValueError, TypeError), match=message):
        patchattn.patch_model(model, "moh", **settings)
    assert not patchattn.patch_info(model)["patches"]


def test_one_head_is_always_kept() -> None:
    model = tiny_llama(num_attention_heads=1, num_key_value_heads=1)
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "moh", active_ratio=0.1)
    assert torch.equal(outputs(model, input_ids=TOKENS)[0], before)
