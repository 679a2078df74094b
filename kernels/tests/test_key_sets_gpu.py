"""Split attention, column mass and key counts on a GPU: precision, large shapes, determinism, 64-bit offsets."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from patchattn_kernels import AttentionRule, attention_with_lse, column_mass, key_counts, split_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

Tensors = list[torch.Tensor]


@pytest.fixture(autouse=True)
def triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")


def operands(
    batch: int, heads: int, groups: int, queries: int, keys: int, dim: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensors, torch.Tensor]:
    """Query, key and value, and a set of an eighth of the keys, the first one in it."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim)
    states = [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]
    key_set = torch.rand(batch, heads, keys, generator=generator, device="cuda") < 0.125
    key_set[..., 0] = True
    return states, key_set


def dense(states: Tensors, key_set: torch.Tensor, visible: torch.Tensor) -> Tensors:
    """Output, part, mass, lse and sums over queries in float64, `visible` `(B or 1, Tq, Tk)`."""
    query, key, value = (tensor.double() for tensor in states)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    logits = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~visible[:, None], -torch.inf)
    some = visible.any(-1)[:, None, :, None]
    weights = logits.masked_fill(~some, 0.0).softmax(-1) * visible[:, None]
    chosen = weights * key_set[:, :, None]
    lse = logits.masked_fill(~some, 0.0).logsumexp(-1).masked_fill(~some[..., 0], -torch.inf)
    return [weights @ value, chosen @ value, chosen.sum(-1), lse, weights.sum(2)]


def error(got: torch.Tensor, exactly: torch.Tensor) -> float:
    return float((got.double() - exactly).nan_to_num(0.0, posinf=0.0, neginf=0.0).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("kind", ["causal", "cached", "all", "padding", "window"])
def test_at_most_twice_as_wrong_as_sdpa(kind: str, dim: int, dtype: torch.dtype) -> None:
    queries, keys = (200, 500) if kind == "cached" else (417, 417)
    states, key_set = operands(2, 4, 2, queries, keys, dim, dtype)
    how: dict[str, Any] = {"causal": kind != "all"}
    visible = torch.ones(2, queries, keys, dtype=torch.bool, device="cuda")
    visible = visible.tril(keys - queries) if how["causal"] else visible
    if kind == "padding":
        how["mask"] = torch.arange(keys, device="cuda") >= torch.tensor([[0], [70]], device="cuda")
        visible = visible & how["mask"][:, None]
    if kind == "window":
        how["window"] = 100
        visible = visible.triu(-99)
    rule = AttentionRule(scaling=dim**-0.5, **how)
    exact = [tensor.double().requires_grad_() for tensor in states]
    wanted = dense(exact, key_set, visible)
    for tensor in states:
        tensor.requires_grad_()
    split = split_attention(*states, key_set, rule)
    mass, _ = column_mass(states[0], states[1], rule, lse=split.lse)
    plain = scaled_dot_product_attention(*states, attn_mask=visible[:, None], enable_gqa=True).nan_to_num(0.0)
    allowed = 2 * error(plain, wanted[0]) + 1e-5
    assert error(split.output, wanted[0]) <= allowed
    assert error(split.part, wanted[1]) <= allowed
    assert torch.equal(split.lse == -torch.inf, wanted[3] == -torch.inf)
    torch.testing.assert_close(mass.double(), wanted[4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(split.mass.double(), wanted[2], rtol=1e-4, atol=1e-5)

    upper = torch.randn_like(split.output)
    of_plain = torch.autograd.grad(plain, states, upper.to(dtype))
    of_wanted = torch.autograd.grad(wanted[0], exact, upper.double(), retain_graph=True)
    of_split = torch.autograd.grad(split.output, states, upper, retain_graph=True)
    for got, sdpa, exactly in zip(of_split, of_plain, of_wanted, strict=True):
        assert error(got, exactly) <= 2 * error(sdpa, exactly) + 1e-4
    both = (split.part, split.mass), (wanted[1], wanted[2])
    grads = upper, torch.randn_like(split.mass)
    of_split = torch.autograd.grad(both[0], states, grads)
    of_wanted = torch.autograd.grad(both[1], exact, [grad.double() for grad in grads])
    for got, exactly in zip(of_split, of_wanted, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), exactly, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("length", [8192, 16384])
def test_long_sequences(length: int) -> None:
    states, key_set = operands(1, 8, 2, length, length, 128)
    rule = AttentionRule(scaling=128**-0.5, causal=True)
    output, lse = attention_with_lse(*states, rule)
    split = split_attention(*states, key_set, rule, output=output, lse=lse)
    mass, _ = column_mass(states[0], states[1], rule, lse=lse)
    counts = key_counts(rule, length, length, output.device)
    rows = torch.tensor([0, 1, 127, 128, length // 2, length - 1], device="cuda")
    visible = (torch.arange(length, device="cuda") <= rows[:, None])[None]
    wanted = dense([states[0][:, :, rows], *states[1:]], key_set, visible)
    for got, exactly in zip((split.output, split.part), wanted, strict=False):
        torch.testing.assert_close(got[:, :, rows].double(), exactly, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(split.mass[:, :, rows].double(), wanted[2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 8), float(length), device="cuda"), rtol=1e-3, atol=0)
    ahead = torch.arange(length, 0, -1, device="cuda")
    assert torch.equal(counts.rows[0], ahead)
    assert bool((counts.longest == length).all())
    assert counts.first.nonzero().tolist() == [[0, 0]]
    # rounded alike in both, the set leaves the rest no error but the rest's own
    rest = dense([states[0][:, :, rows], *states[1:]], ~key_set, visible)[1]
    torch.testing.assert_close((split.output - split.part)[:, :, rows].double(), rest, rtol=1e-2, atol=2e-3)


def test_the_same_bits_each_time() -> None:
    states, key_set = operands(2, 8, 2, 1024, 1024, 64)
    rule = AttentionRule(scaling=0.125, causal=True)
    real = torch.arange(1024, device="cuda")[None] >= 3

    def results() -> Tensors:
        leaves = [tensor.detach().requires_grad_() for tensor in states]
        split = split_attention(*leaves, key_set, rule)
        mass, _ = column_mass(leaves[0], leaves[1], rule, lse=split.lse, real=real)
        total = split.output.square().sum() + split.part.square().sum() + split.mass.sum()
        return [*split, mass, *torch.autograd.grad(total, leaves)]

    first = results()
    for _ in range(100):
        for left, right in zip(results(), first, strict=True):
            assert torch.equal(left, right)


def test_offsets_beyond_32_bits() -> None:
    """Queries of more than 2^31 numbers, of which the last head is compared."""
    heads, length = 260, 65536
    states, key_set = operands(1, 1, 1, length, length, 128)
    query = torch.empty(1, heads, length, 128, dtype=torch.bfloat16, device="cuda")
    query[:, -1] = states[0][:, 0]
    query[:, :-1] = 0
    key = states[1]
    rule = AttentionRule(scaling=128**-0.5, causal=True, window=256)
    small, lse = attention_with_lse(*states, rule)
    output, sums = attention_with_lse(query, key, states[2], rule)
    assert torch.equal(output[:, -1], small[:, 0])
    wide = key_set.expand(-1, heads, -1)
    part = split_attention(query, key, states[2], wide, rule, output=output, lse=sums).part
    assert torch.equal(part[:, -1], split_attention(*states, key_set, rule, output=small, lse=lse).part[:, 0])
    mass, _ = column_mass(query, key, rule, lse=sums)
    assert torch.equal(mass[:, -1], column_mass(states[0], key, rule, lse=lse)[0][:, 0])


def test_nothing_waits_for_the_device() -> None:
    """What a CUDA graph records must not ask the device anything."""
    states, key_set = operands(1, 8, 2, 512, 512, 64)
    rule = AttentionRule(scaling=0.125, causal=True)

    def work() -> Tensors:
        output, lse = attention_with_lse(*states, rule)
        mass, _ = column_mass(states[0], states[1], rule, lse=lse)
        counts = key_counts(rule, 512, 512, lse.device)
        sinks = (mass / counts.rows[:, None] > 1.0 / 512) | key_set
        return list(split_attention(*states, sinks, rule, output=output, lse=lse))

    wanted = work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    graph.replay()
    for left, right in zip(found, wanted, strict=True):
        assert torch.equal(left, right)
