"""Column mass, counts and attention on a CPU by the keys that are seen alone, against float64 and pair by pair."""

import math
from typing import Any

import pytest
import torch

from patchattn_kernels import AttentionRule, attention_with_lse, column_mass, dense_attention_cpu, key_counts

CASES: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": False},
    {"causal": True, "queries": 5},
    {"causal": True, "queries": 1},
    {"causal": True, "offset": -4},
    {"causal": True, "offset": 30, "queries": 9},
    {"causal": True, "padded": True},
    {"causal": True, "padded": True, "queries": 6},
    {"causal": False, "padded": True},
]


def made(case: dict[str, Any], dtype: torch.dtype) -> tuple[list[torch.Tensor], AttentionRule, Any, torch.Tensor]:
    """Operands, rule, real queries, and the pairs `(B, Tq, Tk)` that see each other, from indices."""
    batch, heads, groups, keys, dim = 2, 6, 2, 23, 8
    queries = case.get("queries", keys)
    generator = torch.Generator().manual_seed(7)
    shapes = ((heads, queries), (groups, keys), (groups, keys))
    states = [torch.randn(batch, n, t, dim, generator=generator, dtype=dtype) for n, t in shapes]
    mask = real = None
    offset = case.get("offset", keys - queries)
    if case.get("padded"):
        mask = torch.ones(batch, keys, dtype=torch.bool)
        mask[0, :4] = mask[1, -3:] = False
        real = torch.stack([mask[b, offset : offset + queries] for b in range(batch)])
    rule = AttentionRule(0.6, mask=mask, causal=case["causal"], offset=case.get("offset"))
    seen = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for i in range(queries):
            for j in range(keys):
                seen[b, i, j] = (mask is None or bool(mask[b, j])) and (not case["causal"] or j <= i + offset)
    return states, rule, real, seen


def dense(states: list[torch.Tensor], rule: AttentionRule, seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Weights and log-sum-exp in float64."""
    query, key = states[0].double(), states[1].double().repeat_interleave(3, dim=1)
    logits = (query @ key.mT * rule.scaling).masked_fill(~seen[:, None], -math.inf)
    some = seen.any(-1)[:, None]
    weights = logits.masked_fill(~some[..., None], 0.0).softmax(-1) * some[..., None]
    return weights, logits.logsumexp(-1)


@pytest.fixture(params=[(128, 2**18), (4, 1), (4, 100)], ids=["one tile", "tiny tiles", "small tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_attention_cpu, "ROWS", request.param[0])
    monkeypatch.setattr(dense_attention_cpu, "TILE", request.param[1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_column_mass(case: dict[str, Any], known: bool, dtype: torch.dtype, tiles: None) -> None:
    states, rule, real, seen = made(case, dtype)
    weights, lse = dense(states, rule, seen)
    wanted = (weights if real is None else weights * real[:, None, :, None]).sum(2)
    assert dense_attention_cpu.computes(rule, *states)
    mass, sums = column_mass(*states[:2], rule, lse=lse.to(dtype) if known else None, real=real)
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(mass.double(), wanted, **close)
    torch.testing.assert_close(sums.double(), lse, **close)


@pytest.mark.parametrize("case", CASES)
def test_key_counts(case: dict[str, Any]) -> None:
    _, rule, real, seen = made(case, torch.float64)
    batch, queries, keys = seen.shape
    counts = key_counts(rule, queries, keys, torch.device("cpu"), real)
    for b in range(batch):
        own = [i for i in range(queries) if real is None or real[b, i]]
        for j in range(keys):
            by = [i for i in own if seen[b, i, j]]
            found = [int(tensor[min(b, len(tensor) - 1), j]) for tensor in counts]
            longest = max((int(seen[b, i].sum()) for i in by), default=0)
            first = bool(by) and not any(bool(seen[b, i, :j].any()) for i in by)
            assert found == [len(by), longest, int(first)], (b, j)


@pytest.mark.parametrize("case", CASES)
def test_attention(case: dict[str, Any]) -> None:
    states, rule, _, seen = made(case, torch.float64)
    states[2] = states[2][..., :5]  # values of another width
    weights, lse = dense(states, rule, seen)
    output, sums = attention_with_lse(*states, rule)
    wanted = weights @ states[2].repeat_interleave(3, dim=1)
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sums, lse, rtol=1e-10, atol=1e-10)


def test_vectors_whose_channels_are_no_neighbours_in_memory() -> None:
    states, rule, _, seen = made(CASES[0], torch.float64)
    weights, lse = dense(states, rule, seen)
    output, sums = attention_with_lse(*(each.mT.contiguous().mT for each in states), rule)
    torch.testing.assert_close(output, weights @ states[2].repeat_interleave(3, dim=1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sums, lse, rtol=1e-10, atol=1e-10)


def test_what_is_not_seen_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal column mass multiplies half of the pairs, and attention calls torch's kernel once."""
    states, rule, _, _ = made({"causal": True}, torch.float32)
    monkeypatch.setattr(dense_attention_cpu, "ROWS", 1)
    pairs, calls = 0, 0
    multiply, flash = torch.baddbmm, dense_attention_cpu._flash

    def counted(memory: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **how: Any) -> torch.Tensor:
        nonlocal pairs
        pairs += left.shape[0] * left.shape[1] * right.shape[2]
        return multiply(memory.fill_(float("nan")), left, right, **how)  # whatever was there before

    def called(*given: Any, **how: Any) -> Any:
        nonlocal calls
        calls += 1
        return flash(*given, **how)

    wanted, _ = column_mass(*states[:2], rule)
    monkeypatch.setattr(torch, "baddbmm", counted)
    monkeypatch.setattr(dense_attention_cpu, "_flash", called)
    _, lse = attention_with_lse(*states, rule)
    mass, _ = column_mass(*states[:2], rule, lse=lse)
    torch.testing.assert_close(mass, wanted)
    assert pairs == 2 * 6 * 23 * 24 // 2
    assert calls == 1


@pytest.mark.parametrize("how", [{"softcap": 5.0}, {"window": 3}, {"sinks": torch.zeros(6)}, {"bias": torch.zeros(1)}])
def test_other_rules_are_left_to_the_reference(how: dict[str, Any]) -> None:
    states, _, _, _ = made({"causal": True}, torch.float32)
    assert not dense_attention_cpu.computes(AttentionRule(1.0, causal=True, **how), *states)


def test_gradients_are_those_of_the_reference() -> None:
    states, rule, _, _ = made({"causal": True}, torch.float64)
    query, key = (state.requires_grad_() for state in states[:2])
    assert not dense_attention_cpu.computes(rule, query, key)
    assert torch.autograd.gradcheck(lambda a, b: column_mass(a, b, rule), (query[:, :, :3], key[:, :, :3]))
