"""Triton's kernels of split attention, column mass and key counts, in its interpreter, against softmax in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from patchattn_kernels import (
    AttentionRule,
    attention_with_lse,
    column_mass,
    column_mass_few_triton,
    column_mass_triton,
    decoding_triton,
    key_counts,
    rows,
    split_attention,
    split_attention_backward_triton,
    split_attention_keys_triton,
    split_attention_triton,
)
from patchattn_kernels.tuning import Launch

Tensors = list[torch.Tensor]
MODULES = (
    split_attention_triton,
    split_attention_backward_triton,
    split_attention_keys_triton,
    column_mass_triton,
    column_mass_few_triton,
)


@pytest.fixture(autouse=True, params=[rows.FEW, 0], ids=["decoding", "prefill"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton runs, with tiles so small that a few tokens fill several; few queries as while generating, or as many."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU; test_key_sets_gpu.py runs here")
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    monkeypatch.setattr(rows, "FEW", request.param)
    monkeypatch.setattr(column_mass_few_triton, "QUERIES", request.param)
    monkeypatch.setattr(decoding_triton, "launches", lambda *_: [Launch({"BLOCK_N": 16})])
    for module in MODULES:
        monkeypatch.setattr(module, "launches", lambda *_: [Launch({"BLOCK_M": 16, "BLOCK_N": 16})])
    monkeypatch.setattr(column_mass_triton, "COUNTS", Launch({"BLOCK_M": 16, "BLOCK_N": 16}))


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(
    batch: int = 1, heads: int = 2, groups: int = 1, queries: int = 19, keys: int = 37, dim: int = 8,
    value_dim: int = 12, *, seed: int = 0, dtype: torch.dtype = torch.float32,
) -> tuple[Tensors, torch.Tensor]:  # fmt: skip
    """Query, key and value, and a set of keys."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, value_dim)
    states = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return states, torch.rand(batch, heads, keys, generator=generator) < 0.3


def dense(states: Tensors, key_set: torch.Tensor, scaling: float, visible: torch.Tensor, real: torch.Tensor) -> Tensors:
    """Output, part, mass, lse and sums over queries, from all weights, in float64; rows that see nothing give zeros."""
    query, key, value = (tensor.double() for tensor in states)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    seen = visible[:, None].expand(-1, query.shape[1], -1, -1)
    logits = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf)
    lse = torch.where(seen.any(-1), logits.masked_fill(~seen.any(-1, keepdim=True), 0.0).logsumexp(-1), -torch.inf)
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    chosen = weights * key_set[:, :, None]
    return [weights @ value, chosen @ value, chosen.sum(-1), lse, (weights * real[:, None, :, None]).sum(2)]


def given_gradients(outputs: Tensors) -> Tensors:
    """Random ones; a log-sum-exp of -inf has none."""
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(o.shape, generator=generator) * o.detach().isfinite() for o in outputs]


def gradients(outputs: Tensors, states: Tensors) -> Tensors:
    live = [torch.where(o.isfinite(), o, 0.0) for o in outputs]
    total = sum((o * g.to(o.dtype)).sum() for o, g in zip(live, given_gradients(outputs), strict=True))
    assert isinstance(total, torch.Tensor)
    return list(torch.autograd.grad(total, states))


def all_seen(batch: int, queries: int, keys: int) -> torch.Tensor:
    return torch.ones(batch, queries, keys, dtype=torch.bool)


def band(queries: int, keys: int, offset: int, window: int, *, causal: bool) -> torch.Tensor:
    distance = torch.arange(queries)[:, None] + offset - torch.arange(keys)
    return (distance.abs() < window) & ((distance >= 0) | (not causal))


PADDING = torch.arange(37).ge(5) & torch.arange(37).ne(20)
ANY = torch.rand(2, 19, 37, generator=torch.Generator().manual_seed(4)) < 0.2
ANY[0, 3] = ANY[1, 18] = False
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], torch.Tensor]] = {
    "all": ({}, {"batch": 2, "heads": 1}, all_seen(2, 19, 37)),
    "causal": ({"causal": True}, {"queries": 37}, all_seen(1, 37, 37).tril()),
    "causal from an early key on": (
        {"causal": True, "offset": -4},
        {"heads": 1},
        all_seen(1, 19, 37).tril(-4),
    ),
    "window": ({"causal": True, "window": 9}, {"heads": 1}, band(19, 37, 18, 9, causal=True)[None]),
    "window on both sides": ({"window": 18, "offset": 0}, {"heads": 1}, band(19, 37, 0, 18, causal=False)[None]),
    "padding": (
        {"causal": True, "mask": PADDING[None], "offset": 0},
        {},
        (all_seen(1, 19, 37).tril() & PADDING),
    ),
    "any mask": ({"mask": ANY[:, None]}, {"batch": 2, "heads": 1}, ANY),
}


@pytest.mark.parametrize("few", [True, False])
def test_few_queries_are_decoded(monkeypatch: pytest.MonkeyPatch, few: bool) -> None:
    """One program for a kv head and a part of its keys, while all its query heads' queries fit a tile."""
    grids: list[int] = []

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> Any:
            grids.append(grid[0])
            return lambda *_, **__: None

    monkeypatch.setattr(rows, "FEW", 64)
    monkeypatch.setattr(decoding_triton, "decode_kernel", Counted())
    monkeypatch.setattr(decoding_triton, "merge_kernel", Counted())
    monkeypatch.setattr(decoding_triton, "shares", lambda *_: 3)
    states, _ = operands(2, 8, 2, 16 if few else 17)
    attention_with_lse(*states, AttentionRule(0.4))
    assert grids == ([2 * 2 * 3, 2 * 8 * 16] if few else [])


@pytest.mark.parametrize("block", [16, 32])
def test_mass_of_the_last_rows(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """As SnapKV scores keys by: some rows of a prompt, under the log-sum-exp of its attention."""
    monkeypatch.setattr(column_mass_few_triton, "launches", lambda *_: [Launch({"BLOCK_M": block, "BLOCK_N": 16})])
    (query, key, value), key_set = operands(2, 6, 2, 41, 41)
    rule = AttentionRule(0.4, causal=True)
    real = torch.arange(41).ge(2).expand(2, -1)
    visible = all_seen(2, 41, 41).tril()
    only = torch.arange(41).ge(30).expand(2, -1)
    wanted = dense([query, key, value], key_set, 0.4, visible, only)[-1]
    _, lse = attention_with_lse(query, key, value, rule)
    mass, _ = column_mass(query[:, :, 30:], key, rule, lse=lse[:, :, 30:], real=real[:, 30:])
    torch.testing.assert_close(mass.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str) -> None:
    how, shape, visible = CASES[name]
    states, key_set = operands(**shape)
    rule = AttentionRule(scaling=0.4, **how)
    batch, _, queries, _ = states[0].shape
    real = torch.arange(queries).ge(2).expand(batch, -1)
    exact = [tensor.double().requires_grad_() for tensor in states]
    wanted = dense(exact, key_set, 0.4, visible, real)
    for tensor in states:
        tensor.requires_grad_()
    split = split_attention(*states, key_set, rule)
    mass, _ = column_mass(states[0], states[1], rule, lse=split.lse, real=real)
    for got, exactly in zip([*split, mass], wanted, strict=True):
        torch.testing.assert_close(got.double(), exactly, rtol=1e-5, atol=1e-5)
    for got, exactly in zip(gradients(list(split), states), gradients(wanted[:4], exact), strict=True):
        torch.testing.assert_close(got.double(), exactly, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["all", "window", "padding", "any mask"])
def test_key_counts(name: str) -> None:
    how, _, visible = CASES[name]
    batch = visible.shape[0]
    real = torch.rand(batch, 19, generator=torch.Generator().manual_seed(1)) < 0.7
    seen = visible & real[:, :, None]
    counts = key_counts(AttentionRule(scaling=1.0, **how), 19, 37, torch.device("cpu"), real)
    earlier = (visible.long().cumsum(-1) - visible.long()) > 0
    assert torch.equal(counts.rows, seen.sum(1))
    assert torch.equal(counts.longest, (seen * visible.sum(-1, keepdim=True)).amax(1))
    assert torch.equal(counts.first, seen.any(1) & ~(seen & earlier).any(1))


def test_what_is_known_is_not_computed_again_and_has_its_gradient() -> None:
    states, key_set = operands(queries=19, keys=19)
    rule = AttentionRule(scaling=0.4, causal=True)
    exact = [tensor.double().requires_grad_() for tensor in states]
    for tensor in states:
        tensor.requires_grad_()
    visible = all_seen(1, 19, 19).tril()
    wanted = dense(exact, key_set, 0.4, visible, torch.ones(1, 19))
    output, lse = attention_with_lse(*states, rule)
    known = split_attention(*states, key_set, rule, output=output, lse=lse)
    assert known.output is output
    assert known.lse is lse
    for got, exactly in zip(gradients(list(known), states), gradients(wanted[:4], exact), strict=True):
        torch.testing.assert_close(got.double(), exactly, rtol=1e-4, atol=1e-5)
    half = split_attention(*states, key_set, rule, output=output.detach())  # the lse's own gradient
    wanted = dense(exact, key_set, 0.4, visible, torch.ones(1, 19))
    for got, exactly in zip(
        torch.autograd.grad((half.part.square().sum(), half.lse.sum()), states[:2]),
        torch.autograd.grad((wanted[1].square().sum(), wanted[3].sum()), exact[:2]),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), exactly, rtol=1e-4, atol=1e-5)


def test_gradient_of_column_mass() -> None:
    states, key_set = operands(queries=17, keys=17, heads=4, groups=2, batch=1)
    rule = AttentionRule(scaling=0.4, causal=True)
    exact = [tensor.double().requires_grad_() for tensor in states]
    real = torch.arange(17).ne(3)[None]
    wanted = dense(exact, key_set, 0.4, all_seen(1, 17, 17).tril(), real)[4]
    for tensor in states:
        tensor.requires_grad_()
    mass, _ = column_mass(states[0], states[1], rule, real=real)
    for got, exactly in zip(gradients([mass], states[:2]), gradients([wanted], exact[:2]), strict=True):
        torch.testing.assert_close(got.double(), exactly, rtol=1e-4, atol=1e-5)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    dim=st.sampled_from([1, 3, 16]),
    causal=st.booleans(),
    few=st.booleans(),
    seed=st.integers(0, 99),
)
def test_small_shapes_and_empty_sets(queries: int, keys: int, dim: int, causal: bool, few: bool, seed: int) -> None:
    states, key_set = operands(queries=queries, keys=keys, dim=dim, value_dim=dim, heads=1, seed=seed)
    key_set = key_set & few
    rule = AttentionRule(scaling=0.5, causal=causal)
    visible = all_seen(1, queries, keys).tril(keys - queries) if causal else all_seen(1, queries, keys)
    wanted = dense(states, key_set, 0.5, visible, torch.ones(1, queries))
    split = split_attention(*states, key_set, rule)
    mass, _ = column_mass(states[0], states[1], rule, lse=split.lse)
    for got, exactly in zip([*split, mass], wanted, strict=True):
        torch.testing.assert_close(got.double(), exactly, rtol=1e-5, atol=1e-5)


def test_large_logits_and_memory_in_any_order() -> None:
    states, key_set = operands(queries=19, keys=19, dim=16, value_dim=16)
    large = [(tensor * 60).transpose(2, 3).contiguous().transpose(2, 3) for tensor in states[:2]]
    value = torch.stack([states[2], states[2] + 1], dim=-1)[..., 0]
    assert value.stride(-1) == 2
    shared = key_set[:, :1].expand(-1, 2, -1)  # one list for both heads
    rule = AttentionRule(scaling=0.4, causal=True)
    wanted = dense([*large, states[2]], shared, 0.4, all_seen(1, 19, 19).tril(), torch.ones(1, 19))
    split = split_attention(*large, value, shared, rule)
    assert float(split.lse.abs().max()) > 1000
    for got, exactly in zip(split, wanted[:4], strict=True):
        torch.testing.assert_close(got.double(), exactly, rtol=1e-3, atol=1e-3)  # float32 holds 4 digits of 10^4's exp


def test_half_precision_is_at_most_twice_as_wrong_as_sdpa() -> None:
    states, key_set = operands(queries=37, heads=2, dim=16, value_dim=16, dtype=torch.float16)
    exact = [tensor.double().requires_grad_() for tensor in states]
    wanted = dense(exact, key_set, 0.25, all_seen(1, 37, 37).tril(), torch.ones(1, 37))
    for tensor in states:
        tensor.requires_grad_()
    plain = scaled_dot_product_attention(*states, is_causal=True, enable_gqa=True, scale=0.25)
    upper = torch.randn(plain.shape, generator=torch.Generator().manual_seed(3)).half()
    split = split_attention(*states, key_set, AttentionRule(scaling=0.25, causal=True))
    assert all(tensor.dtype == torch.float32 for tensor in split)
    assert split.output.transpose(1, 2).is_contiguous()

    def error(got: torch.Tensor, exactly: torch.Tensor) -> float:
        return float((got.detach().double() - exactly.detach()).abs().max())

    allowed = error(plain, wanted[0])
    assert error(split.output, wanted[0]) <= 2 * allowed
    assert error(split.part, wanted[1]) <= 2 * allowed
    assert error(split.mass, wanted[2]) <= 1e-5
    of_exact = torch.autograd.grad(wanted[0], exact, upper.double())
    of_plain = torch.autograd.grad(plain, states, upper)
    for got, sdpa, exactly in zip(
        torch.autograd.grad(split.output, states, upper.float()), of_plain, of_exact, strict=True
    ):
        assert error(got, exactly) <= 2 * error(sdpa, exactly) + 1e-5


def test_what_is_left_of_a_row_keeps_its_digits() -> None:
    """Weights of the set are rounded to half precision in the output and in the part alike."""
    states, _ = operands(queries=3, keys=33, heads=1, dim=16, value_dim=16, dtype=torch.float16)
    states[1][:, :, :20] += 0.5 * states[0][:, :, 1:2] / 0.25  # the second query looks at these
    key_set = torch.arange(33).lt(20)[None, None]
    split = split_attention(*states, key_set, AttentionRule(scaling=0.25))
    rest = dense(states, ~key_set, 0.25, all_seen(1, 3, 33), torch.ones(1, 3))[1]
    left = 1.0 - float(split.mass[0, 0, 1])
    assert 0.0 < left < 1e-2
    found = (split.output - split.part)[0, 0, 1].double()
    # a few float32 digits of the whole row, and half precision's own of what is left
    torch.testing.assert_close(found, rest[0, 0, 1], rtol=0, atol=2e-6 + left * 2**-9)


def test_compile_checkpoint_and_export() -> None:
    states, key_set = operands(queries=5, keys=5, heads=2)
    rule = AttentionRule(scaling=0.4, causal=True)

    def work(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mass, lse = column_mass(query, key, rule)
        counts = key_counts(rule, 5, 5, query.device)
        split = split_attention(query, key, value, key_set & (mass > 0.1) & ~counts.first, rule, lse=lse)
        return split.output - 0.5 * split.part + split.mass[..., None]

    for tensor in states:
        tensor.requires_grad_()
    wanted = work(*states)
    of_wanted = torch.autograd.grad(wanted.sum(), states)
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for again in (compiled(*states), checkpoint(work, *states, use_reentrant=False)):
        assert isinstance(again, torch.Tensor)
        torch.testing.assert_close(again, wanted, rtol=0, atol=0)
        for left, right in zip(torch.autograd.grad(again.sum(), states), of_wanted, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0)

    class Work(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return work(query, key, value)

    exported = torch.export.export(Work(), tuple(tensor.detach() for tensor in states))
    torch.testing.assert_close(exported.module()(*states), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"softcap": 2.0}, "softcap"), ({"scaling": -1.0}, "not positive"), ({"sinks": torch.zeros(2)}, "sinks")],
    ids=str,
)
def test_what_kernels_cannot_do_is_said(change: dict[str, Any], message: str) -> None:
    states, key_set = operands(queries=3, keys=3)
    rule = AttentionRule(**{"scaling": 1.0, **change})
    with pytest.raises(NotImplementedError, match=message):
        split_attention(*states, key_set, rule)
    with pytest.raises(NotImplementedError, match=message):
        column_mass(*states[:2], rule)
    with pytest.raises(NotImplementedError, match="float64"):
        attention_with_lse(*(tensor.double() for tensor in states), AttentionRule(scaling=1.0))
