"""Triton's kernels of `routed_attention` in its interpreter, against softmax over explicit masks in float64."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from patchattn_kernels import AttentionRule, routed_attention, routed_attention_triton, routed_pairs_triton
from patchattn_kernels.tuning import Launch

Tensors = list[torch.Tensor]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton runs, with tiles so small that a few tokens fill several."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU; tests/test_routed_attention_gpu.py runs here")
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    for module in (routed_pairs_triton, routed_attention_triton):
        monkeypatch.setattr(module, "launches", lambda *_: [Launch({"BLOCK_M": 16, "BLOCK_N": 16})])


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(
    batch: int = 1, heads: int = 4, groups: int = 2, queries: int = 33, keys: int = 33, dim: int = 16,
    value_dim: int = 16, *, share: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.float32,
) -> Tensors:  # fmt: skip
    """Query, key, value, and a gate of both signs that keeps a share of the pairs."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    kept = torch.rand(batch, queries, heads, generator=generator) < share
    states = (batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, value_dim)
    gate = torch.where(kept, random(batch, queries, heads).float(), 0.0)
    return [*(random(*shape) for shape in states), gate]


def visible(rule: AttentionRule, batch: int, queries: int, keys: int) -> torch.Tensor:
    """`(B, Tq, Tk)`, pair by pair."""
    seen = np.zeros((batch, queries, keys), dtype=bool)
    for b, i, j in np.ndindex(seen.shape):
        own = i + (keys - queries if rule.offset is None else rule.offset)
        real = np.ones(keys, dtype=int)
        if rule.mask is not None and rule.mask.dim() == 2:
            real = rule.mask[min(b, len(rule.mask) - 1)].int().numpy()
        sees = bool(real[j])
        if rule.mask is not None and rule.mask.dim() == 4:
            sees = bool(rule.mask[min(b, len(rule.mask) - 1), 0, i, j])
        if rule.causal and j > own:
            sees = False
        if rule.window is not None and abs(real[: own + 1].sum() - real[: j + 1].sum()) >= rule.window:
            sees = False
        if rule.sequence is not None and rule.sequence[own] != rule.sequence[j]:
            sees = False
        seen[b, i, j] = sees
    return torch.from_numpy(seen)


def dense(tensors: Tensors, rule: AttentionRule) -> torch.Tensor:
    """`(B, H, Tq, Dv)` in float64 by the formula, with gradients."""
    query, key, value, gate = (tensor.double() for tensor in tensors)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    seen = visible(rule, len(query), query.shape[2], key.shape[2])[:, None]
    logits = torch.where(seen, query @ key.mT * rule.scaling, -torch.inf)
    peak = logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    powers = torch.where(seen, torch.exp(logits - peak), 0.0)
    weights = powers / powers.sum(-1, keepdim=True).clamp(min=1e-300)
    return weights @ value * gate.transpose(1, 2)[..., None]


def with_gradients(function: Any, tensors: Tensors, rule: AttentionRule, upstream: torch.Tensor) -> Tensors:
    """Output, and the gradients of all operands; gradients of gates that are closed are not part of the formula."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(leaves, rule)
    gradients = torch.autograd.grad(output, leaves, upstream.to(output.dtype))
    closed = tensors[-1] == 0
    return [output.detach(), *gradients[:-1], gradients[-1].masked_fill(closed, 0.0)]


def routed(tensors: Tensors, rule: AttentionRule) -> torch.Tensor:
    return routed_attention(*tensors, rule)


def check(tensors: Tensors, rule: AttentionRule, tolerance: float = 5e-6) -> Tensors:
    """Output and gradients agree with the formula; those of the kernel are returned."""
    query, _, value, gate = tensors
    upstream = torch.randn(*query.shape[:3], value.shape[-1], generator=torch.Generator().manual_seed(9))
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = routed(leaves, rule)
    assert output.dtype == value.dtype
    assert output.transpose(1, 2).is_contiguous()
    got = [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]
    assert not got[0].transpose(1, 2)[gate == 0].any()
    assert not got[1].transpose(1, 2)[gate == 0].any()
    assert not got[-1][gate == 0].any()
    exact = with_gradients(dense, [tensor.double() for tensor in tensors], rule, upstream)
    for mine, expected in zip(got, exact, strict=True):
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(mine.double(), expected, rtol=0, atol=tolerance * scale)
    return got


def padding(*lengths: int, keys: int, left: bool = True) -> torch.Tensor:
    """`(B, Tk)`, true of real keys; one more key in the middle of the first sequence is not."""
    place = torch.arange(keys)
    mask = torch.stack([place >= keys - n if left else place < n for n in lengths])
    mask[0, keys // 2] = False
    return mask


def random_mask(batch: int, queries: int, keys: int) -> torch.Tensor:
    """`(B, 1, Tq, Tk)`; some queries see nothing."""
    mask = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(3)) < 0.3
    mask[:, :, 5:8] = False
    return mask & (torch.arange(keys) < keys - 17)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal, grouped": ({"batch": 2}, {"causal": True}),
    "bidirectional, odd head dims": ({"groups": 4, "dim": 20, "value_dim": 40}, {}),
    "cached keys": ({"queries": 33, "keys": 50, "heads": 3, "groups": 1}, {"causal": True}),
    "more queries than keys": ({"keys": 21}, {"causal": True}),
    "cached keys, offset 0": ({"keys": 40, "groups": 1}, {"causal": True, "offset": 0}),
    "causal window": ({"queries": 35, "keys": 70, "dim": 41}, {"causal": True, "window": 20}),
    "window on both sides": ({"queries": 50, "keys": 50}, {"window": 19}),
    "left padding, causal": ({"batch": 2, "groups": 1}, {"causal": True, "mask": padding(30, 4, keys=33)}),
    "right padding": ({"batch": 2, "keys": 40}, {"mask": padding(35, 17, keys=40, left=False)}),
    "window over padding": ({"batch": 2}, {"causal": True, "window": 9, "mask": padding(30, keys=33)}),
    "packed": ({}, {"causal": True, "sequence": torch.arange(33) // 11}),
    "mask of queries": ({"batch": 2, "queries": 35}, {"mask": random_mask(2, 35, 33)}),
    "decoding": ({"batch": 2, "queries": 1, "keys": 70, "dim": 40, "value_dim": 35}, {"causal": True}),
    "decoding, padded": ({"batch": 2, "queries": 1}, {"causal": True, "mask": padding(30, 0, keys=33)}),
    "a few tokens": ({"queries": 5, "keys": 70, "share": 0.8}, {"causal": True, "window": 30}),
    "one row, one key": ({"queries": 1, "keys": 1, "share": 1.0}, {"causal": True}),
    "nothing selected": ({"share": 0.0}, {"causal": True}),
    "all selected": ({"share": 1.1, "groups": 4}, {"causal": True}),
    "few selected": ({"share": 0.05, "queries": 60, "keys": 60}, {"causal": True}),
}


SLOW = {"cached keys, offset 0", "right padding", "packed", "few selected"}  # the others go through all code as well


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_output_and_gradients(name: str) -> None:
    shape, rule = CASES[name]
    tensors = operands(**shape)
    check(tensors, AttentionRule(scaling=tensors[0].shape[-1] ** -0.5, **rule))


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    repeats=st.integers(1, 3), groups=st.integers(1, 2), queries=st.integers(1, 33), keys=st.integers(1, 33),
    dims=st.tuples(st.integers(1, 20), st.integers(1, 20)), share=st.floats(0, 1), causal=st.booleans(),
    window=st.none() | st.integers(1, 50), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(
    repeats: int, groups: int, queries: int, keys: int, dims: tuple[int, int], share: float, causal: bool,
    window: int | None, seed: int,
) -> None:  # fmt: skip
    if keys < queries:  # a window is counted from a query's own key
        window = None
    tensors = operands(1, repeats * groups, groups, queries, keys, *dims, share=share, seed=seed)
    check(tensors, AttentionRule(scaling=0.3, causal=causal, window=window))


def test_half_precision_is_as_exact_as_torch() -> None:
    tensors = operands(queries=24, keys=40, heads=3, groups=1, dtype=torch.float16)
    rule = AttentionRule(scaling=0.25)
    upstream = torch.randn(1, 3, 24, 16, generator=torch.Generator().manual_seed(9)).half()

    def torchs(leaves: Tensors, rule: AttentionRule) -> torch.Tensor:
        output = scaled_dot_product_attention(*leaves[:3], scale=rule.scaling, enable_gqa=True)
        return output * leaves[3].half().transpose(1, 2)[..., None]

    tensors[3] = tensors[3].half().float()
    exact = with_gradients(dense, [tensor.double() for tensor in tensors], rule, upstream)
    mine = with_gradients(routed, tensors, rule, upstream)
    theirs = with_gradients(torchs, tensors, rule, upstream)
    for got, other, wanted in zip(mine, theirs, exact, strict=True):
        error, usual = ((result.double() - wanted).abs().max() for result in (got, other))
        assert float(error) <= 2 * float(usual) + 1e-5


def test_rows_that_see_nothing_are_zeros() -> None:
    tensors = operands(2, heads=2, groups=1, share=0.8)
    got = check(tensors, AttentionRule(scaling=0.25, causal=True, mask=padding(30, 0, keys=33)))
    assert not got[0][1].any()
    assert not any(gradient[1].any() for gradient in got[1:])
    assert not got[0][0, :, :3].any()


def test_large_and_infinite_logits() -> None:
    query, key, value, gate = operands(heads=2, groups=1, share=0.8)
    rule = AttentionRule(scaling=1.0, causal=True)
    check([query * 20, key * 20, value, gate], rule, tolerance=1e-3)  # logits of thousands
    query, key = query.abs(), key.clone()
    key[:, :, ::3, 0] = -torch.inf  # such keys have a logit of -inf; the first row sees no other
    with np.errstate(invalid="ignore"):  # numpy's products meet infinity times zero in lanes that are masked
        output = routed_attention(query, key, value, gate, rule)
    torch.testing.assert_close(output.double(), dense([query, key, value, gate], rule), atol=1e-5, rtol=0)


def test_strides_are_free() -> None:
    query, key, value, gate = operands(2, groups=1, queries=17, keys=33)
    rule = AttentionRule(scaling=0.25, causal=True)
    expected = check([query, key, value, gate], rule)
    cache = torch.full((2, 1, 64, 16), torch.nan)
    cache[:, :, :33] = key
    views = [
        query.transpose(1, 2).contiguous().transpose(1, 2),
        cache[:, :, :33],
        value.mT.contiguous().mT,
        gate.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    for got, wanted in zip(check(views, rule), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_gate_of_the_heads_alone() -> None:
    query, key, value, _ = operands(groups=1)
    gate = torch.tensor([1.0, 0.0, -0.5, -0.0]).expand(1, 33, 4)
    check([query, key, value, gate], AttentionRule(scaling=0.25))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_gates_of_other_dtypes_have_gradients(dtype: torch.dtype) -> None:
    query, key, value, gate = operands(queries=8, keys=20)
    gate = gate.to(dtype).requires_grad_()
    routed_attention(query, key, value, gate, AttentionRule(scaling=0.25, causal=True)).sum().backward()
    assert gate.grad is not None
    assert gate.grad.dtype == dtype
    expected = dense([query, key, value, torch.ones_like(gate)], AttentionRule(scaling=0.25, causal=True)).sum(-1).mT
    torch.testing.assert_close(gate.grad.double(), expected * (gate != 0), atol=2e-3, rtol=0)


def test_queries_and_keys_in_float32_beside_half_values() -> None:
    query, key, value, gate = operands()  # as autocast leaves them after rotary embeddings in float32
    rule = AttentionRule(scaling=0.25, causal=True)
    output = routed_attention(query, key, value.half(), gate, rule)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.double(), dense([query, key, value, gate], rule), atol=5e-3, rtol=0)


class Read:
    """Counts the tiles of keys and values that kernels load."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiles = 0
        load = routed_pairs_triton.load_rows

        def counted(*arguments: Any) -> Any:
            self.tiles += 1
            return load(*arguments)

        monkeypatch.setattr(routed_attention_triton, "load_rows", counted)

    def of(self, tensors: Tensors, **rule: Any) -> int:
        before = self.tiles
        routed_attention(*tensors, AttentionRule(scaling=0.25, **rule))
        return self.tiles - before


def test_work_is_that_of_the_selected_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Read(monkeypatch)
    query, key, value, gate = operands(groups=1, queries=48, keys=48, share=1.1)
    some = gate.clone()
    some[..., 1::2] = 0
    # 48 rows of 4 heads are 12 blocks of 16, each with 3 tiles of keys and 3 of values
    assert read.of([query, key, value, gate]) == 12 * 6
    assert read.of([query, key, value, some]) == 6 * 6
    # blocks of four rows, four of which end in each tile of keys
    assert read.of([query, key, value, gate], causal=True) == 2 * 4 * (1 + 2 + 3)
    assert read.of([query, key, value, torch.zeros_like(gate)]) == 0
    assert read.of([query, key, value, gate], mask=torch.arange(48)[None] >= 32) == 12 * 2


def test_decoding_reads_only_keys_of_groups_with_a_selected_head(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Read(monkeypatch)
    query, key, value, gate = operands(heads=8, groups=4, queries=1, keys=160, share=1.1)
    assert read.of([query, key, value, gate], causal=True) == 4 * 10 * 2
    gate[..., :4] = 0
    assert read.of([query, key, value, gate], causal=True) == 2 * 10 * 2
    assert read.of([query, key, value, gate * 0], causal=True) == 0


def test_operators_are_registered_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed_attention_triton, "FEW_PAIRS", 0)
    tensors = [tensor.requires_grad_() for tensor in operands(heads=2, groups=1, queries=8, keys=16)]
    seen = (None, None, None, True, 8, 0)
    torch.library.opcheck(torch.ops.patchattn.routed_attention.default, (*tensors, *seen, 0.25))


def test_compiled_exported_and_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed_attention_triton, "FEW_PAIRS", 0)
    tensors = operands(heads=2, groups=1, queries=8, keys=16)
    mask = padding(12, keys=16)
    upstream = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(9))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return routed_attention(query, key, value, gate, AttentionRule(scaling=0.25, causal=True, mask=mask)) * 2

    def again(leaves: Tensors, _: AttentionRule) -> torch.Tensor:
        return checkpoint(attend, *leaves, use_reentrant=False)

    rule = AttentionRule(scaling=0.25)
    expected = with_gradients(lambda leaves, _: attend(*leaves), tensors, rule, upstream)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for function in (again, lambda leaves, _: compiled(*leaves)):
        for got, wanted in zip(with_gradients(function, tensors, rule, upstream), expected, strict=True):
            assert torch.equal(got, wanted)

    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return attend(*tensors)

    with torch.no_grad():
        program = torch.export.export(Module(), tuple(tensors))
        assert torch.equal(program.module()(*tensors), expected[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"softcap": 2.0}, "softcap"),
        ({"scaling": -1.0}, "not positive"),
        ({"mask": torch.zeros(1, 1, 33, 33)}, "added to the logits"),
    ],
)
def test_what_the_kernel_lacks_is_said(change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = operands()
    rule = AttentionRule(**{"scaling": 0.25, **change})
    with pytest.raises(NotImplementedError, match=reason):
        routed_attention(*tensors, rule)
    monkeypatch.setenv("PATCHATTN_KERNELS", "auto")
    assert routed_attention(*tensors, rule).shape == (1, 4, 33, 16)


def test_float64_and_very_wide_heads_are_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for tensors, reason in ((operands(dtype=torch.float64), "float64"), (operands(dim=257), "257")):
        with pytest.raises(NotImplementedError, match=reason):
            routed_attention(*tensors, AttentionRule(scaling=0.25))


def test_the_reference_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Read(monkeypatch)
    tensors = operands()
    monkeypatch.setenv("PATCHATTN_KERNELS", "reference")
    assert read.of(tensors, causal=True) == 0
    expected = dense(tensors, AttentionRule(scaling=0.25, causal=True))
    output = routed_attention(*tensors, AttentionRule(scaling=0.25, causal=True))
    torch.testing.assert_close(output.double(), expected, atol=1e-6, rtol=0)
