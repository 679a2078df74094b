"""Column mass and split attention against dense attention in float64, written from the definition."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from patchattn_kernels import AttentionRule, column_mass, key_counts, rows, split_attention

seeds = st.integers(0, 2**16)
few = settings(max_examples=25, deadline=None)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_visible(rule: AttentionRule, batch: int, queries: int, keys: int) -> np.ndarray:
    """`(B, Tq, Tk)`, pair by pair."""
    visible = np.zeros((batch, queries, keys), dtype=bool)
    for b in range(batch):
        real = [True] * keys
        if rule.mask is not None and rule.mask.dim() == 2:
            real = [bool(x) for x in rule.mask[min(b, len(rule.mask) - 1)]]
        for i in range(queries):
            own = i + (keys - queries if rule.offset is None else rule.offset)
            for j in range(keys):
                sees = real[j]
                if rule.mask is not None and rule.mask.dim() == 4:
                    entry = rule.mask[min(b, len(rule.mask) - 1), 0, i, j]
                    sees = bool(entry) if entry.dtype == torch.bool else bool(entry > torch.finfo(entry.dtype).min / 2)
                if rule.causal and j > own:
                    sees = False
                if rule.window is not None and abs(sum(real[: own + 1]) - sum(real[: j + 1])) >= rule.window:
                    sees = False
                if rule.sequence is not None and rule.sequence[own] != rule.sequence[j]:
                    sees = False
                visible[b, i, j] = sees
    return visible


def dense_weights(query: torch.Tensor, key: torch.Tensor, rule: AttentionRule) -> tuple[np.ndarray, np.ndarray]:
    """Weights `(B, H, Tq, Tk)` and log-sum-exp, head by head in numpy."""
    q, k = query.double().numpy(), key.double().numpy()
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    visible = dense_visible(rule, batch, queries, keys)
    weights, lse = np.zeros((batch, heads, queries, keys)), np.full((batch, heads, queries), -np.inf)
    for b in range(batch):
        for h in range(heads):
            logits = q[b, h] @ k[b, h // (heads // k.shape[1])].T * rule.scaling
            if rule.softcap is not None:
                logits = rule.softcap * np.tanh(logits / rule.softcap)
            for term in (rule.bias, rule.mask):
                if term is not None and term.dim() == 4 and term.is_floating_point():
                    logits = logits + term[min(b, len(term) - 1), min(h, term.shape[1] - 1)].double().numpy()
            powers = np.where(visible[b], np.exp(np.where(visible[b], logits, 0.0)), 0.0)
            total = powers.sum(-1) + (0.0 if rule.sinks is None else np.exp(float(rule.sinks[h])))
            weights[b, h] = np.divide(powers, total[:, None], where=total[:, None] > 0, out=np.zeros_like(powers))
            with np.errstate(divide="ignore"):
                lse[b, h] = np.log(total)
    return weights, lse


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """Queries, keys, values, a set of keys and a rule; any mixture of what a rule can say."""
    batch, groups, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    keys = draw(st.integers(1, 7))
    queries, dim, seed = draw(st.integers(1, keys)), draw(st.integers(1, 4)), draw(seeds)
    heads = groups * repeats
    kind = draw(st.sampled_from(["none", "keys", "bool", "float"]))
    mask: torch.Tensor | None = None
    if kind == "keys":
        mask = random(batch, keys, seed=seed + 5) > -0.7
    elif kind != "none":
        mask = random(batch, 1, queries, keys, seed=seed + 5) > -0.7
        if kind == "float":
            mask = random(batch, 1, queries, keys, seed=seed + 6).masked_fill(~mask, torch.finfo(torch.float64).min)
    structured = kind in ("none", "keys")
    rule = AttentionRule(
        scaling=draw(st.sampled_from([0.5, 2.0])),
        softcap=draw(st.sampled_from([None, 1.5])),
        bias=draw(st.sampled_from([None, random(1, heads, queries, keys, seed=seed + 7)])),
        sinks=draw(st.sampled_from([None, random(heads, seed=seed + 8)])),
        mask=mask,
        causal=structured and draw(st.booleans()),
        offset=draw(st.sampled_from([None, 0])),
        window=draw(st.sampled_from([None, 1, 3])) if structured else None,
        sequence=draw(st.sampled_from([None, torch.arange(keys) // 3])) if structured else None,
    )
    return {
        "query": random(batch, heads, queries, dim, seed=seed),
        "key": random(batch, groups, keys, dim, seed=seed + 1),
        "value": random(batch, groups, keys, dim, seed=seed + 2),
        "key_set": random(batch, heads, keys, seed=seed + 3) > 0.5,
        "real": draw(st.sampled_from([None, random(batch, queries, seed=seed + 4) > -0.5])),
        "rule": rule,
        "block": draw(st.sampled_from([1, 2**20])),
    }


@few
@given(case=cases())
def test_column_mass(case: dict[str, Any]) -> None:
    weights, lse = dense_weights(case["query"], case["key"], case["rule"])
    expected = weights if case["real"] is None else weights * case["real"].numpy()[:, None, :, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", case["block"])
        mass, sums = column_mass(case["query"], case["key"], case["rule"], real=case["real"])
        again, _ = column_mass(case["query"], case["key"], case["rule"], real=case["real"], lse=sums)
    np.testing.assert_allclose(mass, expected.sum(2), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sums, lse, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(again, mass, rtol=1e-12, atol=1e-14)


@few
@given(case=cases())
def test_key_counts(case: dict[str, Any]) -> None:
    batch, _, queries, _ = case["query"].shape
    keys = case["key"].shape[2]
    visible = dense_visible(case["rule"], batch, queries, keys)
    if case["real"] is not None:
        visible = visible & case["real"].numpy()[:, :, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", case["block"])
        counts = key_counts(case["rule"], queries, keys, torch.device("cpu"), case["real"])
    for b in range(batch):
        for j in range(keys):
            seeing = [i for i in range(queries) if visible[b, i, j]]
            at = min(b, len(counts.rows) - 1)
            assert counts.rows[at, j] == len(seeing)
            assert counts.longest[at, j] == max((visible[b, i].sum() for i in seeing), default=0)
            assert counts.first[at, j] == (bool(seeing) and not any(visible[b, i, :j].any() for i in seeing))


@pytest.mark.parametrize("counted", [None, 1, 2])
@pytest.mark.parametrize("masked", [None, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_key_counts_of_one_row_beside_two(masked: int | None, counted: int | None, causal: bool) -> None:
    """A mask or a set of queries that is one for all rows of the batch stands beside one per row."""
    queries, keys = 2, 3
    mask = None if masked is None else torch.tensor([[False, True, True], [True, False, True]])[:masked]
    real = None if counted is None else torch.tensor([[True, False], [True, True]])[:counted]
    rule = AttentionRule(scaling=1.0, mask=mask, causal=causal)
    counts = key_counts(rule, queries, keys, torch.device("cpu"), real)
    batch = max(masked or 1, counted or 1)
    visible = dense_visible(rule, batch, queries, keys)
    if real is not None:
        visible = visible & real.numpy()[:, :, None]
    for name, expected in (
        ("rows", visible.sum(1)),
        ("longest", (visible * visible.sum(2, keepdims=True)).max(1)),
        ("first", (visible & (visible.cumsum(2) == 1)).any(1) & ~(visible & (visible.cumsum(2) > 1)).any(1)),
    ):
        found = getattr(counts, name).numpy()
        np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected, err_msg=name)


@few
@given(case=cases(), known=st.sampled_from(["nothing", "lse", "both"]))
def test_split_attention(case: dict[str, Any], known: str) -> None:
    query, value, key_set = case["query"], case["value"], case["key_set"]
    weights, lse = dense_weights(query, case["key"], case["rule"])
    groups = query.shape[1] // value.shape[1]
    values = np.repeat(value.numpy(), groups, axis=1)
    chosen = weights * key_set.numpy()[:, :, None]
    given_too: dict[str, torch.Tensor] = {}
    if known != "nothing":
        given_too["lse"] = torch.from_numpy(lse)
    if known == "both":
        given_too["output"] = torch.from_numpy(weights @ values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", case["block"])
        split = split_attention(query, case["key"], value, key_set, case["rule"], **given_too)
    expected = (weights @ values, chosen @ values, chosen.sum(-1), lse)
    for got, wanted in zip(split, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.untyped_storage().nbytes() // item.element_size())
        return result


@pytest.mark.parametrize("known", [False, True])
def test_nothing_as_large_as_all_weights_is_made(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    length, heads = 4096, 1
    monkeypatch.setattr(rows, "BLOCK", length * heads * 128)
    query = random(1, heads, length, 2, seed=0, dtype=torch.float32)
    key, value = (random(1, 1, length, 2, seed=seed, dtype=torch.float32) for seed in (1, 2))
    rule = AttentionRule(scaling=0.5, causal=True)
    with Largest() as largest:
        mass, lse = column_mass(query, key, rule)
        counts = key_counts(rule, length, length, query.device)
        sinks = mass / counts.rows[:, None] > 2.0 / length
        given_too = {"lse": lse, "output": query} if known else {}
        split_attention(query, key, value, sinks & (torch.arange(length) < 200), rule, **given_too)
    assert largest.elements <= length * length // 8
    assert float(mass.sum()) == pytest.approx(heads * length, rel=1e-4)


def test_kv_heads_are_not_repeated() -> None:
    query = random(1, 16, 3, 64, seed=0)
    key, value = random(1, 1, 512, 64, seed=1), random(1, 1, 512, 64, seed=2)
    rule = AttentionRule(scaling=0.1)
    with Largest() as largest:
        column_mass(query, key, rule)
        split_attention(query, key, value, torch.ones(1, 16, 512, dtype=torch.bool), rule)
    assert largest.elements < 16 * 512 * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32_and_under_autocast_too(dtype: torch.dtype) -> None:
    query, key, value = (random(1, 2, 50, 8, seed=seed, dtype=dtype) for seed in (0, 1, 2))
    rule = AttentionRule(scaling=0.3, causal=True)
    weights, _ = dense_weights(query, key, rule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mass, lse = column_mass(query, key, rule)
        split = split_attention(query, key, value, torch.ones(1, 2, 50, dtype=torch.bool), rule)
    assert mass.dtype == lse.dtype == split.part.dtype == torch.float32
    np.testing.assert_allclose(mass, weights.sum(2), rtol=1e-5)
    np.testing.assert_allclose(split.part, weights @ value.double().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(split.mass, np.ones((1, 2, 50)), rtol=1e-5)


def test_gradient_of_split_attention() -> None:
    tensors = [random(1, 2, 4, 3, seed=seed).requires_grad_() for seed in range(3)]
    key_set = torch.tensor([[[True, False, True, False], [False, True, False, False]]])
    rule = AttentionRule(scaling=0.5, causal=True)
    assert torch.autograd.gradcheck(lambda q, k, v: split_attention(q, k, v, key_set, rule)[:3], tensors)
