"""Attention to selected pages, on a CPU and by Triton's interpreter, against loops over keys in float64."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from patchattn_kernels import AttentionRule, decoding_triton, selected_attention, selected_attention_cpu
from patchattn_kernels.selected_attention import _backward, _forward, _reference
from patchattn_kernels.tuning import Launch

Tensors = list[torch.Tensor]


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a CPU, and Triton's interpreter with small tiles."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    monkeypatch.setenv("PATCHATTN_KERNELS", request.param)
    monkeypatch.setattr(decoding_triton, "launches", lambda *_: [Launch({"BLOCK_N": 16})])
    return str(request.param)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(
    batch: int = 2, heads: int = 6, groups: int = 2, queries: int = 1, keys: int = 61, dim: int = 8, width: int = 8,
    *, seed: int = 0,
) -> Tensors:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, width)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def lists(batch: int, groups: int, keys: int, page: int, *, seed: int = 0, equal: bool = False) -> Tensors:
    """Random pages in random order, some heads without any unless all have as many."""
    generator = torch.Generator().manual_seed(seed)
    number = -(-keys // page)
    pages = torch.stack([torch.randperm(number, generator=generator) for _ in range(batch * groups)])
    counts = torch.randint(0, number + 1, (batch, groups), generator=generator)
    return [pages.view(batch, groups, -1), torch.full_like(counts, (number + 1) // 2) if equal else counts]


def by_loops(
    states: Tensors, pages: torch.Tensor, counts: torch.Tensor, page: int, scaling: float, visible: torch.Tensor
) -> Tensors:
    """Output and log-sum-exp in float64: for every query, the keys that stand in its list and that it sees."""
    query, key, value = (state.double() for state in states)
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1:3]
    output = query.new_zeros(batch, heads, queries, value.shape[-1])
    lse = query.new_full((batch, heads, queries), -math.inf)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            some = pages[b % len(pages), g % pages.shape[1]][: int(counts[b % len(counts), g % counts.shape[1]])]
            for i in range(queries):
                shown = [
                    k for p in some.tolist() for k in range(p * page, p * page + page)
                    if 0 <= k < keys and bool(visible[b % len(visible), i, k])
                ]  # fmt: skip
                if shown:
                    logits = key[b, g, shown] @ query[b, h, i] * scaling
                    lse[b, h, i] = logits.logsumexp(0)
                    output[b, h, i] = logits.softmax(0) @ value[b, g, shown]
    return [output, lse]


def close(got: Any, wanted: Tensors, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for some, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(some.double(), exact, rtol=tolerance, atol=tolerance)


PADDING = torch.arange(61).ge(torch.tensor([[7], [0]]))
ROWS = torch.rand(2, 1, 3, 61, generator=torch.Generator().manual_seed(3)) < 0.4
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], torch.Tensor]] = {
    "one query": ({"causal": True}, {}, torch.ones(1, 1, 61)),
    "wider values": ({}, {"width": 12}, torch.ones(1, 1, 61)),
    "wider queries": ({}, {"dim": 20, "groups": 6}, torch.ones(1, 1, 61)),
    "three queries": ({"causal": True}, {"queries": 3}, torch.ones(1, 3, 61).tril(58)),
    "an early query": ({"causal": True, "offset": 30}, {"groups": 1}, torch.ones(1, 1, 61).tril(30)),
    "window": ({"causal": True, "window": 20}, {}, torch.ones(1, 1, 61).triu(41)),
    "padding": ({"causal": True, "mask": PADDING}, {}, PADDING[:, None]),
    "rows": ({"mask": ROWS}, {"queries": 3}, ROWS[:, 0]),
}


@pytest.mark.parametrize(
    ("name", "page"),
    [*((name, page) for name in CASES for page in (5, 16)), ("one query", 1), ("rows", 1), ("padding", 64)],
)
def test_listed_keys_are_all_that_counts(backend: str, name: str, page: int) -> None:
    how, shape, visible = CASES[name]
    states = operands(**shape)
    for equal in (False, True):
        pages, counts = lists(2, states[1].shape[1], 61, page, equal=equal)
        wanted = by_loops(states, pages, counts, page, 0.3, visible)
        got = selected_attention(*states, pages, counts, page, AttentionRule(0.3, **how))
        assert got[0].transpose(1, 2).is_contiguous()
        close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernel refuses it")
    states = [state.to(dtype) for state in operands()]
    pages, counts = lists(2, 2, 61, 8)
    output, lse = selected_attention(*states, pages, counts, 8, AttentionRule(0.3))
    assert (output.dtype, lse.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    close((output, lse), by_loops(states, pages, counts, 8, 0.3, torch.ones(1, 1, 61)), dtype)


def test_all_pages_are_dense_attention(backend: str) -> None:
    query, key, value = operands(keys=64)
    pages, counts = torch.arange(4).expand(1, 1, -1), torch.tensor([[4]])
    output, lse = selected_attention(query, key, value, pages, counts, 16, AttentionRule(0.3, causal=True))
    dense = scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(output, dense, rtol=1e-5, atol=1e-5)
    logits = query @ key.repeat_interleave(3, 1).mT * 0.3
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_graph", [True, False])
def test_without_counts_every_page_is_read(backend: str, with_graph: bool) -> None:
    states, pages = operands(), lists(2, 2, 61, 8)[0][..., :3]
    wanted = by_loops(states, pages, torch.tensor([[3]]), 8, 0.3, torch.ones(1, 1, 61))
    with torch.set_grad_enabled(with_graph):
        close(selected_attention(*states, pages, None, 8, AttentionRule(0.3)), wanted)
        if backend == "reference":
            capped = AttentionRule(0.3, softcap=1.5)
            exact = selected_attention(*states, pages, torch.full((2, 2), 3), 8, capped)
            for found, same in zip(selected_attention(*states, pages, None, 8, capped), exact, strict=True):
                assert torch.equal(found, same)


def test_parts_of_the_pages_merge_by_their_log_sum_exp(backend: str) -> None:
    states = operands()
    pages, _ = lists(2, 2, 61, 8)
    rule = AttentionRule(0.3)
    whole, total = selected_attention(*states, pages, torch.tensor([[8]]), 8, rule)
    first, lse = selected_attention(*states, pages, torch.tensor([[3]]), 8, rule)
    second, other = selected_attention(*states, pages[..., 3:], torch.tensor([[5]]), 8, rule)
    torch.testing.assert_close(torch.logaddexp(lse, other), total, rtol=1e-5, atol=1e-5)
    share = torch.sigmoid(lse - other)[..., None]
    torch.testing.assert_close(share * first + (1 - share) * second, whole, rtol=1e-5, atol=1e-5)


def test_pages_without_keys_and_what_lies_behind_the_count_give_nothing(backend: str) -> None:
    states = operands()
    pages = torch.tensor([[[2, -1, 900, 7, 2**30, 1, -5, 123456789]]])
    counts = torch.tensor([[5]])
    wanted = by_loops(states, torch.tensor([[[2, 7]]]), torch.tensor([[2]]), 8, 0.3, torch.ones(1, 1, 61))
    close(selected_attention(*states, pages, counts, 8, AttentionRule(0.3)), wanted)


def test_unread_keys_may_hold_anything(backend: str) -> None:
    states = operands()
    pages, counts = torch.tensor([[[6, 1, 7]]]), torch.tensor([[3]])
    wanted = selected_attention(*states, pages, counts, 8, AttentionRule(0.3))
    unread = ~torch.isin(torch.arange(61) // 8, torch.tensor([6, 1, 7]))
    for state in states[1:]:
        state[:, :, unread] = torch.nan
    close(selected_attention(*states, pages, counts, 8, AttentionRule(0.3)), [some.double() for some in wanted])


def test_strides_of_a_buffer_with_spare_room(backend: str) -> None:
    states = operands()
    pages, counts = lists(2, 2, 61, 8, seed=4)
    wanted = selected_attention(*states, pages, counts, 8, AttentionRule(0.3))
    query, key, value = states
    room = [torch.full((2, 2, 80, 8), torch.nan) for _ in range(2)]
    for buffer, state in zip(room, (key, value), strict=True):
        buffer[:, :, :61] = state
    views = [buffer[:, :, :61] for buffer in room]
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    found = selected_attention(query, *views, pages, counts, 8, AttentionRule(0.3))
    close(found, [some.double() for some in wanted])
    views = [state.transpose(1, 2).contiguous().transpose(1, 2) for state in states[1:]]
    found = selected_attention(query, *views, pages, counts, 8, AttentionRule(0.3))
    close(found, [some.double() for some in wanted])


def buffered(keys: int, room: int, dtype: torch.dtype, in_one: bool) -> Tensors:
    """A query, and keys and values in buffers with spare places, which hold anything: in one for both, or one each."""
    query, *states = (state.to(dtype) for state in operands(heads=4, keys=keys))
    buffers = list(torch.full((2, 2, 2, room, 8), torch.nan, dtype=dtype))
    buffers = buffers if in_one else [buffer.clone() for buffer in buffers]
    for buffer, state in zip(buffers, states, strict=True):
        buffer[:, :, :keys] = state
    return [query, *(buffer[:, :, :keys] for buffer in buffers)]


@pytest.mark.parametrize("in_one", [True, False])
@pytest.mark.parametrize(
    ("keys", "room", "wanted", "at_once"),
    [
        (61, 64, [[0, 3, 7], [2, 5, 7]], True),  # the last page is cut off by the end of the text
        (61, 64, [[0, 3, 5], [2, 4, 6]], True),  # and is not among them
        (64, 64, [[0, 3, 7], [2, 5, 6]], True),
        (61, 64, [[0, 3, 7], [2, 5, 6]], False),  # is read in one head alone
        (61, 64, [[7, 0, 3], [7, 2, 5]], False),  # is not the last one
        (61, 64, [[0, 3, -1], [2, 5, 6]], False),
        (61, 64, [[0, 3, 9], [2, 5, 6]], False),
        (61, 65, [[0, 3, 7], [2, 5, 7]], False),  # heads do not begin at a page
    ],
)
def test_pages_of_all_heads_are_copied_at_once_where_they_lie_in_a_row(
    keys: int, room: int, wanted: list[list[int]], at_once: bool, in_one: bool
) -> None:
    states = buffered(keys, room, torch.float32, in_one)
    pages, counts = torch.tensor([wanted, wanted[::-1]]), torch.full((2, 2), 3)
    copied = selected_attention_cpu._copied_at_once(*states[1:], pages, counts, 8)
    assert (copied is not None) == at_once
    expected = by_loops(states, pages, counts, 8, 0.3, torch.ones(1, 1, keys))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        some = buffered(keys, room, dtype, in_one)
        close(selected_attention(*some, pages, counts, 8, AttentionRule(0.3)), expected, dtype)
    if copied is not None:
        uneven = torch.tensor([[3, 2], [3, 3]])
        assert selected_attention_cpu._copied_at_once(*states[1:], pages, uneven, 8) is None
        assert selected_attention_cpu._copied_at_once(states[1], states[2][..., :4], pages, counts, 8) is None


@pytest.mark.parametrize("extra", ["softcap", "bias", "sinks", "added mask"])
def test_what_the_kernel_lacks_is_computed_by_torch(monkeypatch: pytest.MonkeyPatch, extra: str) -> None:
    """Dense, with every key hidden that is not listed."""
    states = [state.double() for state in operands(queries=2)]
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(1, 6, 2, 61, generator=generator).double()
    sinks = torch.randn(6, generator=generator).double()
    given = {"softcap": 1.5, "bias": bias, "sinks": sinks, "added mask": bias.clone()}
    name = "mask" if extra == "added mask" else extra
    rule = AttentionRule(0.3, **{name: given[extra]})  # type: ignore[arg-type]
    pages, counts = lists(2, 2, 61, 8, equal=True)
    found = selected_attention(*states, pages, counts, 8, rule)
    query, key, value = states
    hidden = torch.ones(2, 2, 61, dtype=torch.bool)
    for b in range(2):
        for g in range(2):
            for page in pages[b, g, : int(counts[b, g])].tolist():
                hidden[b, g, page * 8 : page * 8 + 8] = False
    logits = query @ key.repeat_interleave(3, 1).mT * 0.3
    logits = 1.5 * torch.tanh(logits / 1.5) if extra == "softcap" else logits
    logits = logits + bias if extra in ("bias", "added mask") else logits
    logits = logits.masked_fill(hidden.repeat_interleave(3, 1)[:, :, None], -math.inf)
    if extra == "sinks":
        logits = torch.cat([logits, sinks[:, None, None].expand(2, -1, 2, 1)], -1)
    weights = logits.softmax(-1)[..., :61]
    close(found, [weights @ value.repeat_interleave(3, 1), logits.logsumexp(-1)], torch.float64)
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    with pytest.raises(NotImplementedError, match="cannot compute this call"):
        selected_attention(*states, pages, counts, 8, rule)


def test_gradients(backend: str) -> None:
    states = operands(queries=2)
    pages, counts = lists(2, 2, 61, 8, seed=2)
    counts[0, 0] = 0
    exact = [state.double().requires_grad_() for state in states]
    wanted = by_loops(exact, pages, counts, 8, 0.3, torch.ones(1, 2, 61).tril(59))
    for state in states:
        state.requires_grad_()
    got = selected_attention(*states, pages, counts, 8, AttentionRule(0.3, causal=True))
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(wanted[0].shape, generator=generator), torch.randn(wanted[1].shape, generator=generator)

    def gradients(results: Any, of: Tensors) -> Tensors:
        seen = results[1].isfinite()
        total = (results[0] * upstream[0]).sum() + (results[1][seen] * upstream[1][seen]).sum()
        return list(torch.autograd.grad(total, of))

    close(gradients(got, states), gradients(wanted, exact))


def test_memory_is_reused_and_never_handed_out() -> None:
    states = operands()
    pages, counts = lists(2, 2, 61, 8, equal=True)
    with torch.inference_mode():
        first, _ = selected_attention(*states, pages, counts, 8, AttentionRule(0.3))
    kept = first.clone()
    memory = selected_attention_cpu._memory.flat[torch.float32].data_ptr()
    other, _ = selected_attention(*operands(seed=1), pages, counts, 8, AttentionRule(0.3))
    assert selected_attention_cpu._memory.flat[torch.float32].data_ptr() == memory
    assert torch.equal(first, kept)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [(0, 1, 7), (2, 0, 7), (2, 1, 0)], ids=str)
def test_empty(backend: str, size: tuple[int, int, int]) -> None:
    batch, queries, keys = size
    states = [state.requires_grad_() for state in operands(batch, 6, 2, queries, keys)]
    pages, counts = torch.zeros(batch, 2, 3, dtype=torch.int), torch.full((batch, 2), 3)
    output, lse = selected_attention(*states, pages, counts, 4, AttentionRule(0.3))
    assert output.shape == (batch, 6, queries, 8)
    assert lse.shape == (batch, 6, queries)
    assert not output.any()
    output.sum().backward()
    assert all(state.grad is not None and not state.grad.any() for state in states)


@pytest.mark.parametrize("width", [0, 3])
def test_no_page(backend: str, width: int) -> None:
    states = operands()
    pages, counts = torch.zeros(2, 2, width, dtype=torch.int), torch.zeros(2, 2, dtype=torch.int)
    output, lse = selected_attention(*states, pages, counts, 4, AttentionRule(0.3))
    assert not output.any()
    assert bool((lse == -math.inf).all())


def test_wrong_operands_are_refused() -> None:
    states = operands()
    pages, counts = lists(2, 2, 61, 8)
    rule = AttentionRule(0.3)
    with pytest.raises(ValueError, match="multiple of G"):
        selected_attention(states[0][:, :5], *states[1:], pages, counts, 8, rule)
    with pytest.raises(ValueError, match="Expected pages"):
        selected_attention(*states, pages[:, :, 0], counts, 8, rule)
    with pytest.raises(ValueError, match="Expected counts"):
        selected_attention(*states, pages, counts[..., None], 8, rule)
    with pytest.raises(TypeError, match="Expected integers as pages"):
        selected_attention(*states, pages.float(), counts, 8, rule)
    with pytest.raises(ValueError, match="page_size of 0"):
        selected_attention(*states, pages, counts, 0, rule)


def test_many_queries_are_too_many_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    states = operands(queries=30)
    pages, counts = lists(2, 2, 61, 8)
    rule = AttentionRule(0.3)
    wanted = by_loops(states, pages, counts, 8, 0.3, torch.ones(1, 30, 61))
    close(selected_attention(*states, pages, counts, 8, rule), wanted)
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    with pytest.raises(NotImplementedError, match="too many"):
        selected_attention(*states, pages, counts, 8, rule)


def test_formula_of_other_devices() -> None:
    states = operands(queries=3)
    pages, counts = lists(2, 2, 61, 8, seed=6)
    wanted = by_loops(states, pages, counts, 8, 0.3, ROWS[:, 0])
    close(_reference(*states, pages, counts, 8, AttentionRule(0.3, mask=ROWS)), wanted)


def test_operators(backend: str) -> None:
    states = [state.requires_grad_() for state in operands(queries=2)]
    pages, counts = (some.int() for some in lists(2, 2, 61, 8))
    given = (pages, counts, 8, PADDING, None, 0.3, True, None, None)
    torch.library.opcheck(_forward, (*states, *given))
    upstream = torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2)
    torch.library.opcheck(_backward, (*upstream, *(state.detach() for state in states), *given))


def test_compiles_without_a_break(backend: str) -> None:
    pages, counts = lists(2, 2, 61, 8)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return selected_attention(query, key, value, pages, counts, 8, AttentionRule(0.3, causal=True))

    states = operands()
    got = torch.compile(run, backend="aot_eager", fullgraph=True)(*states)
    close(got, [some.double() for some in run(*states)])


def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kv heads and batches 2^31 numbers apart: memory that is never touched, but for a few pages."""
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    monkeypatch.setattr(decoding_triton, "launches", lambda *_: [Launch({"BLOCK_N": 16})])
    states = [state.half() for state in operands(1, 2, 2, 1, 20)]
    pages, counts = lists(1, 2, 20, 8, seed=1, equal=True)
    wanted = by_loops(states, pages, counts, 8, 0.3, torch.ones(1, 1, 20))
    torch.use_deterministic_algorithms(False)  # which would write to all of it
    far = torch.empty(2**31 + 400, dtype=torch.float16).as_strided((1, 2, 20, 8), (0, 2**31 + 16, 8, 1))
    for number in (1, 2):
        far.copy_(states[number])
        some = [*states[:number], far, *states[number + 1 :]]
        close(selected_attention(*some, pages, counts, 8, AttentionRule(0.3)), wanted, torch.float16)
