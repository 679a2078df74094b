"""Block-sparse attention, gathered on a CPU and in Triton's interpreter, against explicit masks in float64."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from patchattn_kernels import (
    AttentionRule,
    BlockLists,
    SinkAndRecent,
    block_sparse_attention,
    block_sparse_attention_backward_triton,
    block_sparse_attention_cpu,
    block_sparse_attention_triton,
    lists_from_mask,
    sink_and_recent,
)
from patchattn_kernels.tuning import Launch

Tensors = list[torch.Tensor]
Keep = SinkAndRecent | BlockLists
BACKENDS = ["reference", "triton"]
KINDS = ["window", "lists", "large lists", "small lists"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a few tokens fill several."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU; test_block_sparse_attention_gpu.py runs here")
    for module in (block_sparse_attention_triton, block_sparse_attention_backward_triton):
        monkeypatch.setattr(module, "launches", lambda *_: [Launch({"BLOCK_M": 16, "BLOCK_N": 16})])
    monkeypatch.setattr(block_sparse_attention_cpu, "ROWS", 16)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(
    batch: int = 1, heads: int = 4, groups: int = 2, queries: int = 33, keys: int = 41, dim: int = 16,
    value_dim: int = 16, *, seed: int = 0, dtype: torch.dtype = torch.float32,
) -> Tensors:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    states = (batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, value_dim)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in states]


def kept(kind: str, tensors: Tensors, *, seed: int = 0) -> Keep:
    """Sizes that differ between heads, or random lists, some of them empty."""
    batch, heads, queries, _ = tensors[0].shape
    keys = tensors[1].shape[2]
    generator = torch.Generator().manual_seed(seed + 1)
    if kind == "window":
        sizes = torch.randint(0, 20, (heads, 2), generator=generator).tolist()
        recent = [None if last == 0 else last for _, last in sizes]
        return sink_and_recent([first for first, _ in sizes], recent, heads)
    block_q, block_k = {"lists": (16, 16), "large lists": (32, 64), "small lists": (4, 32)}[kind]
    shape = (batch, 1 if kind == "small lists" else heads, -(-queries // block_q), -(-keys // block_k))
    return lists_from_mask(torch.rand(*shape, generator=generator) < 0.6, block_q, block_k)


def shown(keep: Keep, rule: AttentionRule, tensors: Tensors) -> torch.Tensor:
    """`(B, H, Tq, Tk)`: which keys are kept and seen, pair by pair."""
    (batch, heads, queries, _), keys = tensors[0].shape, tensors[1].shape[2]
    seen = np.zeros((batch, heads, queries, keys), dtype=bool)
    offset = keys - queries if rule.offset is None else rule.offset
    for b in range(batch):
        real = np.ones(keys, dtype=int)
        if rule.mask is not None:
            of_batch = rule.mask[min(b, len(rule.mask) - 1)]
            real = (of_batch[0].any(0) if rule.mask.dim() == 4 else of_batch).int().numpy()
        number = real.cumsum()
        for i in range(queries):
            own = i + offset
            for j in range(keys):
                sees = bool(real[j]) and not (rule.causal and j > own)
                if rule.mask is not None and rule.mask.dim() == 4:
                    sees = bool(rule.mask[min(b, len(rule.mask) - 1), 0, i, j])
                elif rule.window is not None:
                    sees = sees and abs(number[own] - number[j]) < rule.window
                begins = 0
                if rule.sequence is not None:
                    sees = sees and bool(rule.sequence[own] == rule.sequence[j])
                    begins = number[int((rule.sequence == rule.sequence[j]).int().argmax()) - 1] if j else 0
                    begins = 0 if rule.sequence[j] == rule.sequence[0] else begins
                for h in range(heads):
                    if isinstance(keep, SinkAndRecent):
                        near = abs(number[own] - number[j]) < int(keep.recent[h])
                        listed = near or number[j] - begins <= int(keep.sinks[h])
                    else:
                        line = min(b, len(keep.indices) - 1), min(h, keep.indices.shape[1] - 1), i // keep.block_q
                        listed = j // keep.block_k in keep.indices[line][: int(keep.counts[line])].tolist()
                    seen[b, h, i, j] = sees and listed
    return torch.from_numpy(seen)


def dense(tensors: Tensors, rule: AttentionRule, seen: torch.Tensor) -> Tensors:
    """Output and log-sum-exp in float64."""
    query, key, value = (tensor.double() for tensor in tensors)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    logits = query @ key.mT * rule.scaling
    if rule.softcap is not None:
        logits = torch.tanh(logits / rule.softcap) * rule.softcap
    if rule.bias is not None:
        logits = logits + rule.bias
    logits = logits.masked_fill(~seen, -torch.inf)
    top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    if rule.sinks is not None:
        top = torch.maximum(top, rule.sinks.double()[None, :, None, None])
    powers = torch.exp(logits - top)
    total = powers.sum(-1, keepdim=True)
    if rule.sinks is not None:
        total = total + torch.exp(rule.sinks.double()[None, :, None, None] - top)
    return [powers @ value / torch.where(total > 0, total, 1.0), (top + total.log()).squeeze(-1)]


def gradients(function: Callable[[Tensors], Tensors], tensors: Tensors, upstream: Tensors) -> Tensors:
    """Output, log-sum-exp and the gradients of what both are multiplied with, where that is finite."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output, lse = function(leaves)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    loss = (output * upstream[0].to(output.dtype)).sum() + (finite * upstream[1].to(lse.dtype)).sum()
    return [output.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def upstream_of(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(7)
    batch, heads, rows, _ = tensors[0].shape
    shape = (batch, heads, rows)
    return [torch.randn(*shape, tensors[2].shape[-1], generator=generator), torch.randn(*shape, generator=generator)]


def ours(keep: Keep, rule: AttentionRule) -> Callable[[Tensors], Tensors]:
    return lambda leaves: list(block_sparse_attention(*leaves, keep, rule, return_lse=True))


def check(
    tensors: Tensors, keep: Keep, rule: AttentionRule, *, tolerance: float = 2e-5, of_largest: float = 0.0
) -> Tensors:
    """To a tolerance, or to a share of the largest number where that is more."""
    seen, upstream = shown(keep, rule, tensors), upstream_of(tensors)
    got = gradients(ours(keep, rule), tensors, upstream)
    wanted = gradients(lambda leaves: dense(leaves, rule, seen), tensors, upstream)
    for mine, exact in zip(got, wanted, strict=True):
        largest = float(exact[exact.isfinite()].abs().amax()) if exact.isfinite().any() else 0.0
        torch.testing.assert_close(
            mine.double(), exact.double(), atol=max(tolerance, of_largest * largest), rtol=tolerance
        )
    layout = (len(tensors[0]), tensors[0].shape[2], tensors[0].shape[1], tensors[2].shape[-1])
    assert got[0].transpose(1, 2).is_contiguous()
    assert got[0].transpose(1, 2).shape == layout
    return got


@st.composite
def cases(draw: Any) -> tuple[Tensors, Keep, AttentionRule]:
    """Operands, what is kept, and a rule: any mixture."""
    groups, keys, seed = draw(st.integers(1, 2)), draw(st.integers(1, 50)), draw(st.integers(0, 2**16))
    batch, queries = draw(st.integers(1, 2)), draw(st.sampled_from([1, keys, max(1, keys - 5), max(1, keys // 2)]))
    tensors = operands(batch, groups * draw(st.integers(1, 2)), groups, queries, keys, 8, 4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    kind = draw(st.sampled_from(["none", "keys", "4-dim"]))
    mask: torch.Tensor | None = None
    if kind == "keys":
        mask = torch.rand(batch, keys, generator=generator) < 0.8
    elif kind == "4-dim":
        mask = torch.rand(batch, 1, queries, keys, generator=generator) < 0.7
    structure: dict[str, Any] = {}
    if kind != "4-dim":
        structure["causal"] = draw(st.booleans())
        structure["window"] = draw(st.sampled_from([None, None, 3, 20]))
        if kind == "none" and draw(st.integers(0, 3)) == 0:
            structure["sequence"] = torch.randint(0, 4, (keys,), generator=generator).sort().values
    rule = AttentionRule(0.4, mask=mask, offset=draw(st.sampled_from([None, 0])), **structure)
    return tensors, kept(draw(st.sampled_from(KINDS)), tensors, seed=seed), rule


several = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(case=cases())
@several
def test_gathered_against_explicit_masks(case: tuple[Tensors, Keep, AttentionRule]) -> None:
    tensors, keep, rule = case
    check([tensor.double() for tensor in tensors], keep, rule, tolerance=1e-10)


@given(case=cases(), terms=st.sampled_from(["softcap", "bias", "sinks"]))
@settings(several, max_examples=10)
def test_rules_of_the_dense_reference(case: tuple[Tensors, Keep, AttentionRule], terms: str) -> None:
    tensors, keep, rule = case
    generator = torch.Generator().manual_seed(3)
    heads, pairs = tensors[0].shape[1], (tensors[0].shape[2], tensors[1].shape[2])
    values = {"softcap": 2.0, "bias": torch.randn(1, heads, *pairs, generator=generator).double()}
    values["sinks"] = torch.randn(heads, generator=generator).double()
    rule = AttentionRule(**{**rule.__dict__, terms: values[terms]})
    check([tensor.double() for tensor in tensors], keep, rule, tolerance=1e-10)


def test_logits_of_sinks_and_bias_have_gradients() -> None:
    tensors = [tensor.double() for tensor in operands(heads=2, groups=1, queries=5, keys=9)]
    sinks, bias = torch.randn(2).double().requires_grad_(), torch.randn(1, 2, 5, 9).double().requires_grad_()
    rule = AttentionRule(0.25, causal=True, sinks=sinks, bias=bias)
    keep = sink_and_recent(2, 3, 2)
    seen = shown(keep, rule, tensors)
    weights = torch.randn(1, 2, 5, 16).double()
    got = torch.autograd.grad((block_sparse_attention(*tensors, keep, rule) * weights).sum(), [sinks, bias])
    wanted = torch.autograd.grad((dense(tensors, rule, seen)[0] * weights).sum(), [sinks, bias])
    for mine, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, exact)


def left_padding(*lengths: int, keys: int = 41) -> torch.Tensor:
    return torch.arange(keys) >= torch.tensor(lengths)[:, None]


RULES = {
    "causal": {"causal": True},
    "bidirectional": {},
    "offset": {"causal": True, "offset": 3},
    "left padding": {"causal": True, "mask": left_padding(7, 20)},
    "holes": {"mask": torch.rand(2, 41, generator=torch.Generator().manual_seed(5)) < 0.7},
    "window": {"causal": True, "window": 9},
    "window over padding": {"causal": True, "window": 9, "mask": left_padding(3, 0)},
    "4-dim": {"mask": torch.rand(2, 1, 33, 41, generator=torch.Generator().manual_seed(6)) < 0.5},
}


# the interpreter is slow: every rule with windows, every kind of lists with some rule
QUICK = [("window", "causal"), ("window", "holes"), ("lists", "causal"), ("small lists", "left padding")]
SLOW = [("window", name) for name in RULES if ("window", name) not in QUICK] + [
    ("lists", "holes"),
    ("large lists", "4-dim"),
]


@pytest.mark.parametrize(("kind", "name"), QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
def test_triton_against_explicit_masks(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    tensors = operands(2, heads=2, groups=1, value_dim=8)
    check(tensors, kept(kind, tensors), AttentionRule(0.25, **RULES[name]))


@pytest.mark.parametrize("kind", ["window", "lists"])
@pytest.mark.parametrize("queries", [1, 5])
def test_decoding_shares_out_the_keys(kind: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    tensors = operands(2, heads=2, groups=1, queries=queries, keys=100)
    rule = AttentionRule(0.25, causal=True, mask=left_padding(30, 0, keys=100))
    check(tensors, sink_and_recent([40, 3], [30, 5], 2) if kind == "window" else kept(kind, tensors), rule)


@pytest.mark.parametrize("backend", BACKENDS)
def test_streaming_heads_are_exact_to_the_key(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", backend)
    tensors = operands(heads=2, groups=2, queries=40, keys=40)
    output = block_sparse_attention(*tensors, sink_and_recent([3, 0], [5, 1], 2), AttentionRule(0.25, causal=True))
    for head, (sinks, recent) in enumerate([(3, 5), (0, 1)]):
        for i in range(40):
            keys = [j for j in range(i + 1) if j < sinks or i - j < recent]
            weights = torch.softmax(tensors[0][0, head, i] @ tensors[1][0, head, keys].T * 0.25, dim=-1)
            torch.testing.assert_close(output[0, head, i], weights @ tensors[2][0, head, keys])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["window", "lists"])
def test_rows_that_see_nothing_are_zeros(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", backend)
    tensors = operands(2, heads=2, groups=1)
    rule = AttentionRule(0.25, causal=True, mask=left_padding(41, 20))
    got = check(tensors, kept(kind, tensors), rule)
    assert not got[0][0].any()
    assert not any(gradient[0].any() for gradient in got[2:])
    assert got[1][0].eq(-math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_and_infinite_logits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", backend)
    tensors = operands(heads=2, groups=1, queries=20, keys=20)
    keep, rule = sink_and_recent(2, 9, 2), AttentionRule(1.0, causal=True)
    # logits of thousands are rounded to 5e-4, and so are weights made anew in the backward pass
    check([tensors[0] * 20, tensors[1] * 20, tensors[2]], keep, rule, of_largest=5e-4)
    query, key = tensors[0].abs(), tensors[1].clone()
    key[:, :, ::3, 0] = -torch.inf  # such keys have a logit of -inf; the first row sees no other
    with np.errstate(invalid="ignore"):  # numpy's products meet infinity times zero in lanes that are masked
        output = block_sparse_attention(query, key, tensors[2], keep, rule)
    expected, _ = dense([query, key, tensors[2]], rule, shown(keep, rule, tensors))
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["window", "lists"])
def test_half_precision_is_as_exact_as_torch(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", backend)
    tensors = operands(heads=2, groups=2, dtype=torch.float16)
    rule, keep = AttentionRule(0.25, causal=True), kept(kind, tensors)
    seen, upstream = shown(keep, rule, tensors), upstream_of(tensors)
    upstream[1].zero_()

    def torchs(leaves: Tensors) -> Tensors:
        output = scaled_dot_product_attention(*leaves, attn_mask=seen, scale=rule.scaling)
        return [output, torch.zeros(output.shape[:3])]

    exact = gradients(lambda leaves: dense(leaves, rule, seen), [tensor.double() for tensor in tensors], upstream)
    mine = gradients(ours(keep, rule), tensors, upstream)
    theirs = gradients(torchs, tensors, upstream)
    for place in (0, 2, 3, 4):
        error, usual = ((result[place].double() - exact[place]).abs().max() for result in (mine, theirs))
        assert float(error) <= 2 * float(usual) + 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_free(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", backend)
    query, key, value = operands(2, heads=2, groups=1, queries=17, keys=33)
    rule, keep = AttentionRule(0.25, causal=True), sink_and_recent(3, 8, 2)
    cache = torch.full((2, 1, 64, 16), torch.nan)
    cache[:, :, :33] = key
    views = [query.transpose(1, 2).contiguous().transpose(1, 2), cache[:, :, :33], value.mT.contiguous().mT]
    expected = check([query, key, value], keep, rule)
    for got, wanted in zip(check(views, keep, rule), expected, strict=True):
        assert torch.equal(got, wanted)


def test_queries_and_keys_in_float32_beside_half_values() -> None:
    query, key, value = operands()  # as autocast leaves them after rotary embeddings in float32
    rule, keep = AttentionRule(0.25, causal=True), sink_and_recent(2, 9, 4)
    output = block_sparse_attention(query, key, value.half(), keep, rule)
    assert output.dtype == torch.float16
    expected, _ = dense([query, key, value], rule, shown(keep, rule, [query, key]))
    torch.testing.assert_close(output.double(), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["window", "lists"])
def test_operators_are_registered_well(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", backend)
    tensors = [tensor.requires_grad_() for tensor in operands(heads=2, groups=1, queries=8, keys=16)]
    keep = kept(kind, tensors)
    sizes = [keep.most_sinks] if isinstance(keep, SinkAndRecent) else [keep.block_q, keep.block_k]
    rule = (None, None, 0.25, True, None, None)
    torch.library.opcheck(torch.ops.patchattn.block_sparse_attention.default, (*tensors, *keep[:2], sizes, *rule))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_exported_and_checkpointed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", backend)
    tensors = operands(heads=2, groups=1, queries=8, keys=16)
    keep, mask, upstream = kept("window", tensors), left_padding(5, keys=16), upstream_of(tensors)

    def attend(*tensors: torch.Tensor) -> Tensors:
        rule = AttentionRule(0.25, causal=True, mask=mask)
        return list(block_sparse_attention(*tensors, keep, rule, return_lse=True))

    expected = gradients(lambda leaves: attend(*leaves), tensors, upstream)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for function in (lambda leaves: checkpoint(attend, *leaves, use_reentrant=False), lambda leaves: compiled(*leaves)):
        for got, wanted in zip(gradients(function, tensors, upstream), expected, strict=True):
            assert torch.equal(got, wanted)

    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> Tensors:
            return attend(*tensors)

    exported = torch.export.export(Module(), tuple(tensors), strict=False)
    assert torch.equal(exported.module()(*tensors)[0], expected[0])


def test_reference_is_traced_whole() -> None:
    tensors = operands(heads=2, groups=1, queries=8, keys=16)
    keep, upstream = kept("lists", tensors), upstream_of(tensors)

    def attend(*tensors: torch.Tensor) -> Tensors:
        return list(block_sparse_attention(*tensors, keep, AttentionRule(0.25, softcap=5.0), return_lse=True))

    expected = gradients(lambda leaves: attend(*leaves), tensors, upstream)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(gradients(lambda leaves: compiled(*leaves), tensors, upstream), expected, strict=True):
        torch.testing.assert_close(got, wanted)
