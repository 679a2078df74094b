"""Routed attention on a CPU against the formula in float64, pair by pair; and which calls it leaves to others."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchattn_kernels import AttentionRule
from patchattn_kernels import routed_attention_cpu as cpu
from patchattn_kernels.routed_attention_cpu import routed_on_cpu

PLAIN = AttentionRule(scaling=0.3)
CAUSAL = AttentionRule(scaling=0.3, causal=True)
EVERYTHING = {
    "SHORTEST": 1,
    "LARGEST_SHARE": 1.0,
    "CAUSAL_SHORTEST": 1,
    "CAUSAL_SHARE": 1.0,
    "CAUSAL_SAVING": 0.0,
    "CAUSAL_GAIN": 2.0,
    "CAUSAL_ROWS": 3,
    "PREFIX_ROWS": 6,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is too short, and no share too large."""
    for name, setting in EVERYTHING.items():
        monkeypatch.setattr(cpu, name, setting)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Heads, rows and keys of every call of SDPA and of torch's kernel for CPUs."""
    calls = []
    attend = cpu.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        calls.append((*query.shape[1:3], key.shape[2]))
        return attend(query, key, value, **how)

    monkeypatch.setattr(cpu, "scaled_dot_product_attention", counted)
    flash = cpu.flash

    def counted_flash(query: torch.Tensor, key: torch.Tensor, *rest: Any, **how: Any) -> Any:
        calls.append((*query.shape[1:3], key.shape[2]))
        return flash(query, key, *rest, **how)

    monkeypatch.setattr(cpu, "flash", counted_flash)
    return calls


def operands(
    batch: int, heads: int, groups: int, rows: int, keys: int, *, share: float = 0.5, seed: int = 0
) -> list[torch.Tensor]:
    """Float64 query, key, value (of another width) and gate."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    open_pairs = torch.rand(batch, rows, heads, generator=generator) < share
    gate = (random(batch, rows, heads).abs() + 0.1) * open_pairs
    return [random(batch, heads, rows, 4), random(batch, groups, keys, 4), random(batch, groups, keys, 3), gate]


def brute(
    tensors: list[torch.Tensor], scaling: float, mask: np.ndarray | None = None, causal: bool = False
) -> np.ndarray:
    """`(B, H, Tq, Dv)` by the formula; mask `(B, Tk)`."""
    query, key, value, gate = (tensor.detach().double().numpy() for tensor in tensors)
    batch, heads, rows, _ = query.shape
    output = np.zeros((batch, heads, rows, value.shape[-1]))
    for b, h, t in np.ndindex(batch, heads, rows):
        group = h * key.shape[1] // heads
        seen = np.ones(key.shape[2], bool) if mask is None else mask[b]
        seen = seen & (np.arange(key.shape[2]) <= t) if causal else seen
        if gate[b, t, h] and seen.any():
            logits = scaling * key[b, group, seen] @ query[b, h, t]
            weights = np.exp(logits - logits.max())
            output[b, h, t] = gate[b, t, h] * (weights / weights.sum()) @ value[b, group, seen]
    return output


shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, share=st.sampled_from([0.1, 0.5, 1.0]), padded=st.booleans(), seed=st.integers(0, 999))
def test_output(shape: tuple[int, ...], share: float, padded: bool, seed: int) -> None:
    batch, groups, repeats, rows, keys = shape
    tensors = operands(batch, groups * repeats, groups, rows, keys, share=share, seed=seed)
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) < 0.6 if padded else None
    with pytest.MonkeyPatch.context() as patch:
        for name, setting in EVERYTHING.items():
            patch.setattr(cpu, name, setting)
        output = routed_on_cpu(*tensors, AttentionRule(scaling=0.3, mask=mask))
    want = brute(tensors, 0.3, None if mask is None else mask.numpy())
    if output is None:  # nothing is left to compute
        assert not want.any()
        return
    assert output.transpose(1, 2).is_contiguous()
    np.testing.assert_allclose(output.numpy(), want, rtol=1e-12, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, share=st.sampled_from([0.1, 0.5, 1.0]), full=st.booleans(), seed=st.integers(0, 999))
def test_causal_output(shape: tuple[int, ...], share: float, full: bool, seed: int) -> None:
    """With some heads that keep every row, too; with gradients by a mask, without in two parts."""
    batch, groups, repeats, rows, _ = shape
    tensors = operands(batch, groups * repeats, groups, rows, rows, share=share, seed=seed)
    if full:
        tensors[3][:, :, : repeats + 1] = 1.5
    with pytest.MonkeyPatch.context() as patch:
        for name, setting in EVERYTHING.items():
            patch.setattr(cpu, name, setting)
        leaf = tensors[0].clone().requires_grad_()
        outputs = [routed_on_cpu(*tensors, CAUSAL), routed_on_cpu(leaf, *tensors[1:], CAUSAL)]
    want = brute(tensors, 0.3, causal=True)
    for output in outputs:
        if output is None:
            assert not want.any()
            continue
        np.testing.assert_allclose(output.detach().numpy(), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", ["of keys", "of queries and keys"])
def test_masks_in_both_forms(small: None, form: str, attended: list[tuple[int, int, int]]) -> None:
    """Keys that are not seen are not computed either; a sequence of which nothing is seen gives zeros."""
    tensors = operands(3, 4, 2, 6, 7)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 5:], mask[1] = False, False
    given_as = mask if form == "of keys" else mask[:, None, None].expand(-1, -1, 6, -1).contiguous()
    output = routed_on_cpu(*tensors, AttentionRule(scaling=0.3, mask=given_as))
    assert output is not None
    np.testing.assert_allclose(output.numpy(), brute(tensors, 0.3, mask.numpy()), rtol=1e-12, atol=1e-13)
    assert {keys for _, _, keys in attended} == {5, 7}


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(small: None, causal: bool) -> None:
    """Against finite differences; GQA, a head without any row, a row without any head, hidden keys."""
    tensors = operands(2, 4, 2, 5, 5 if causal else 6)
    tensors[3][:, :, 1], tensors[3][0, 2] = 0.0, 0.0
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    rule = CAUSAL if causal else AttentionRule(scaling=0.3, mask=mask)
    closed = tensors[3] == 0

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        output = routed_on_cpu(query, key, value, gate.masked_fill(closed, 0.0), rule)
        assert output is not None
        return output

    assert torch.autograd.gradcheck(attend, [tensor.requires_grad_() for tensor in tensors])


def test_closed_gates_get_no_gradient_and_hide_what_is_not_finite(small: None) -> None:
    query, key, value, gate = operands(1, 2, 2, 5, 5)
    query[0, 1, 3], gate[0, 3, 1] = float("nan"), 0.0
    tensors = [tensor.requires_grad_() for tensor in (query, key, value, gate)]
    output = routed_on_cpu(*tensors, PLAIN)
    assert output is not None
    output.sum().backward()
    assert output.isfinite().all()
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert not gate.grad[gate == 0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_is_that_of_dense_attention(small: None, dtype: torch.dtype) -> None:
    """In the same dtype, at large logits."""
    query, key, value, gate = operands(1, 2, 1, 40, 33)
    tensors = [tensor.to(dtype) for tensor in (20 * query, 20 * key, value)]
    output = routed_on_cpu(*tensors, gate.float(), PLAIN)
    assert output is not None
    assert output.dtype == dtype
    dense = torch.nn.functional.scaled_dot_product_attention(*tensors, scale=0.3, enable_gqa=True)
    want = brute([*tensors, gate.float()], 0.3)
    gated = (dense * gate.transpose(1, 2)[..., None].to(dtype)).double().numpy()
    errors = [np.abs(given - want).max() for given in (output.double().numpy(), gated)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps


def test_rows_that_are_not_selected_are_not_attended(attended: list[tuple[int, int, int]]) -> None:
    """Heads 0 and 1 keep all rows, 2 a quarter, 3 none: two calls, of as many heads as have about as many rows."""
    query, key, value = torch.randn(3, 1, 1024, 4, 8).transpose(2, 3)
    gate = torch.zeros(1, 1024, 4)
    gate[..., :2], gate[:, ::4, 2] = 1.0, 1.0
    assert routed_on_cpu(query, key, value, gate, PLAIN) is not None
    assert attended == [(2, 1024, 1024), (1, 256, 1024)]


def test_heads_of_a_group_share_a_call(attended: list[tuple[int, int, int]]) -> None:
    query, key, value = torch.randn(1, 8, 800, 4), torch.randn(1, 2, 800, 4), torch.randn(1, 2, 800, 4)
    gate = (torch.arange(8) % 2 * torch.ones(1, 800, 1)).contiguous()
    assert routed_on_cpu(query, key, value, gate, PLAIN) is not None
    assert attended == [(2, 1600, 800)]


def test_uneven_sequences_of_a_batch(attended: list[tuple[int, int, int]]) -> None:
    query, key, value = torch.randn(3, 2, 2, 800, 4)
    gate = torch.zeros(2, 800, 2)
    gate[0, :100], gate[1, :700, 0] = 1.0, 1.0
    assert routed_on_cpu(query, key, value, gate, PLAIN) is not None
    assert attended == [(2, 100, 800), (1, 700, 800)]


def given_to(rows: int, keys: int, share: float, rule: AttentionRule) -> torch.Tensor | None:
    query, key, value = torch.randn(1, 2, rows, 4), torch.randn(1, 2, keys, 4), torch.randn(1, 2, keys, 4)
    gate = torch.zeros(1, rows, 2)
    gate[:, : int(rows * share)] = 1.0
    return routed_on_cpu(query, key, value, gate, rule)


TRIANGLE = torch.ones(800, 800, dtype=torch.bool).tril()[None, None]
ONE_ROW_ELSE = torch.ones(1, 1, 800, 800, dtype=torch.bool)
ONE_ROW_ELSE[..., 400, 0] = False


@pytest.mark.parametrize(
    ("rows", "keys", "share", "how"),
    [
        (767, 1024, 0.5, {}),
        (1024, 767, 0.5, {}),
        (1, 4096, 0.5, {}),
        (800, 800, 0.81, {}),
        (800, 800, 1.0, {}),
        (800, 800, 0.0, {}),
        (1535, 1535, 0.2, {"causal": True}),
        (1536, 1536, 0.68, {"causal": True}),
        (1536, 1537, 0.2, {"causal": True}),
        (1536, 1536, 0.2, {"causal": True, "mask": torch.ones(1, 1536)}),
        (800, 800, 0.5, {"mask": TRIANGLE}),
        (800, 800, 0.5, {"mask": ONE_ROW_ELSE}),
        (800, 800, 0.5, {"window": 4}),
        (800, 800, 0.5, {"sequence": torch.zeros(800)}),
        (800, 800, 0.5, {"softcap": 30.0}),
        (800, 800, 0.5, {"sinks": torch.zeros(2)}),
        (800, 800, 0.5, {"bias": torch.zeros(1, 2, 800, 800)}),
        (800, 800, 0.5, {"mask": torch.zeros(1, 1, 800, 800)}),
    ],
)
def test_left_to_dense_attention(rows: int, keys: int, share: float, how: dict[str, Any]) -> None:
    assert given_to(rows, keys, share, AttentionRule(scaling=0.3, **how)) is None


@pytest.mark.parametrize(
    ("rows", "keys", "share", "causal"),
    [(768, 768, 0.8, False), (800, 1024, 0.5, False), (1024, 768, 0.01, False), (1536, 1536, 0.66, True)],
)
def test_computed_here(rows: int, keys: int, share: float, causal: bool) -> None:
    assert given_to(rows, keys, share, CAUSAL if causal else PLAIN) is not None


def test_causal_rows_see_the_keys_up_to_their_last(attended: list[tuple[int, int, int]]) -> None:
    """Head 0 keeps all rows, the others every eighth: 128 at a time, under a mask with gradients.

    Without, the keys that 256 of them see are apart.
    """
    query, key, value = torch.randn(3, 1, 1920, 4, 8).transpose(2, 3)
    gate = torch.zeros(1, 1920, 4)
    gate[..., 0], gate[:, ::8, 1:] = 1.0, 1.0
    assert routed_on_cpu(query, key, value, gate, CAUSAL) is not None
    whole = (1, 1920, 1920)
    assert attended == [whole, (3, 240, 1), (3, 128, 8 * 127), (3, 112, 8 * 239)]
    attended.clear()
    assert routed_on_cpu(query.requires_grad_(), key, value, gate, CAUSAL) is not None
    assert attended == [whole, (3, 128, 8 * 127 + 1), (3, 112, 8 * 239 + 1)]


def test_too_little_is_left_out_of_causal_attention() -> None:
    """Half the heads keep a fifth of their rows, 0.4 of the pairs: not with gradients. Three in four: never."""
    query, key, value = torch.randn(3, 1, 1536, 4, 8).transpose(2, 3)
    gate = torch.ones(1, 1536, 4)
    gate[..., 2:] = (torch.arange(1536) % 5 == 0)[:, None]
    assert routed_on_cpu(query, key, value, gate, CAUSAL) is not None
    assert routed_on_cpu(query.requires_grad_(), key, value, gate, CAUSAL) is None
    gate[:] = (torch.arange(1536) % 4 != 0)[:, None]
    assert routed_on_cpu(query.detach(), key, value, gate, CAUSAL) is None


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32")])
def test_queries_and_keys_of_another_dtype(dtypes: tuple[str, str], autocast: bool, causal: bool) -> None:
    """As rotary embeddings leave them under autocast: computed in the dtype of values, whatever autocast says."""
    states, values = (getattr(torch, name) for name in dtypes)
    *tensors, gate = operands(1, 4, 2, 40, 40)
    tensors = [tensor.to(states).to(values) for tensor in tensors]
    given = [tensor.to(states) for tensor in tensors[:2]] + tensors[2:]
    gate = gate.to(values).float()
    rule = CAUSAL if causal else PLAIN
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = routed_on_cpu(*given, gate, rule)
    assert output is not None
    assert output.dtype == values
    want = brute([tensor.to(values) for tensor in given] + [gate], 0.3, causal=causal)
    np.testing.assert_allclose(output.double().numpy(), want, atol=8 * torch.finfo(values).eps)


def test_compiled_calls_are_left_to_dense_attention() -> None:
    query = torch.randn(1, 2, 800, 4)
    gate = torch.zeros(1, 800, 2)

    @torch.compile(fullgraph=True, backend="eager")
    def attend(query: torch.Tensor) -> bool:
        return routed_on_cpu(query, query, query, gate, PLAIN) is None

    assert attend(query)
