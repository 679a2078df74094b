"""Empty batches and sequences: an empty result and gradients of zeros, by the kernels and by the references."""

from collections.abc import Callable, Sequence

import pytest
import torch

from patchattn_kernels import (
    AttentionRule,
    attention_with_lse,
    block_means,
    block_sparse_attention,
    column_mass,
    key_counts,
    lists_from_mask,
    routed_attention,
    seen_blocks,
    select_blocks,
    sink_and_recent,
    split_attention,
)

HEADS, GROUPS, DIM, WIDTH, BLOCK = 4, 2, 8, 6, 16
SIZES = [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0), (0, 0, 0), (0, 2000, 2000)]  # batch, queries, keys
Rule = Callable[[int, int, int], AttentionRule]
RULES: dict[str, Rule] = {
    "all": lambda *_: AttentionRule(0.5),
    "causal": lambda *_: AttentionRule(0.5, causal=True, window=3),
    "padded": lambda batch, _, keys: AttentionRule(0.5, mask=torch.ones(batch, keys).bool(), causal=True),
    "rows": lambda batch, queries, keys: AttentionRule(0.5, mask=torch.ones(batch, 1, queries, keys).bool()),
    "added": lambda batch, queries, keys: AttentionRule(0.5, mask=torch.zeros(batch, HEADS, queries, keys)),
}
everywhere = pytest.mark.parametrize("rule", RULES)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.fixture(autouse=True, params=["auto", "triton", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", request.param)


def operands(batch: int, queries: int, keys: int) -> list[torch.Tensor]:
    shapes = (batch, HEADS, queries, DIM), (batch, GROUPS, keys, DIM), (batch, GROUPS, keys, WIDTH)
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


def check(found: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]], given: Sequence[torch.Tensor]) -> None:
    """Zeros (-inf of a log-sum-exp that nothing is added to) in these shapes, and zeros as gradients of operands."""
    for tensor, shape in zip(found, shapes, strict=True):
        assert tensor.shape == shape
        assert not tensor.detach().nan_to_num(neginf=0.0).any()
    sum(tensor.exp().sum() for tensor in found).backward()  # type: ignore[union-attr]
    for tensor in given:
        assert tensor.grad is not None
        assert not tensor.grad.any()


@everywhere
@sizes
def test_routed(rule: str, size: tuple[int, int, int]) -> None:
    batch, queries, _ = size
    states = operands(*size)
    gate = torch.ones(batch, queries, HEADS, requires_grad=True)
    output = routed_attention(*states, gate, RULES[rule](*size))
    assert output.transpose(1, 2).is_contiguous()
    check([output], [(batch, HEADS, queries, WIDTH)], [*states, gate])


@everywhere
@sizes
@pytest.mark.parametrize("listed", [False, True])
def test_block_sparse(rule: str, size: tuple[int, int, int], listed: bool) -> None:
    batch, queries, keys = size
    states = operands(*size)
    keep = sink_and_recent(1, 4, HEADS)
    blocks = torch.ones(1, HEADS, -(-queries // BLOCK), -(-keys // BLOCK), dtype=torch.bool)
    how = lists_from_mask(blocks, BLOCK, BLOCK) if listed else keep
    output, lse = block_sparse_attention(*states, how, RULES[rule](*size), return_lse=True)
    assert output.transpose(1, 2).is_contiguous()
    check([output, lse], [(batch, HEADS, queries, WIDTH), (batch, HEADS, queries)], states)
    if keys == 0:
        assert bool((lse == float("-inf")).all())


@everywhere
@sizes
@pytest.mark.parametrize("known", [False, True])
def test_split(rule: str, size: tuple[int, int, int], known: bool) -> None:
    batch, queries, keys = size
    states = operands(*size)
    of_rows = [(batch, HEADS, queries, WIDTH), (batch, HEADS, queries)]
    output, lse = attention_with_lse(*states, RULES[rule](*size))
    check([output, lse], of_rows, states)
    given = {"output": output.detach(), "lse": lse.detach()} if known else {}
    key_set = torch.ones(batch, HEADS, keys, dtype=torch.bool)
    found = split_attention(*states, key_set, RULES[rule](*size), **given)
    check(found, [of_rows[0], *of_rows, of_rows[1]], states)


@everywhere
@sizes
def test_column_mass(rule: str, size: tuple[int, int, int]) -> None:
    batch, queries, keys = size
    query, key, _ = operands(*size)
    real = torch.ones(batch, queries, dtype=torch.bool)
    mass, lse = column_mass(query, key, RULES[rule](*size), real=real)
    check([mass, lse], [(batch, HEADS, keys), (batch, HEADS, queries)], [query, key])
    per_head = (HEADS,) if rule == "added" else ()
    for counts in key_counts(RULES[rule](*size), queries, keys, torch.device("cpu"), real):
        assert counts.shape == (batch, *per_head, keys)
        assert not counts.any()


def test_sinks_take_the_rows_that_have_no_key() -> None:
    states = operands(2, 5, 0)
    sinks = torch.randn(HEADS)
    rule = AttentionRule(0.5, sinks=sinks)
    for _, lse in (
        attention_with_lse(*states, rule),
        block_sparse_attention(*states, sink_and_recent(1, 4, HEADS), rule, return_lse=True),
    ):
        torch.testing.assert_close(lse, sinks[None, :, None].expand(2, -1, 5))


@sizes
def test_lists(size: tuple[int, int, int]) -> None:
    batch, queries, keys = size
    rule = AttentionRule(0.5, causal=True)
    counts = {"queries": queries, "keys": keys, "block_q": BLOCK, "block_k": BLOCK}
    shape = (-(-queries // BLOCK), -(-keys // BLOCK))
    assert seen_blocks(rule, **counts, device=torch.device("cpu")).shape == (1, 1, *shape)
    for how in ({"top_k": 2}, {"top_p": 0.5}):
        lists = select_blocks(torch.randn(batch, HEADS, *shape), rule, **counts, **how)  # type: ignore[arg-type]
        assert lists.counts.shape == (batch, HEADS, shape[0])
        assert not lists.counts.any()
    assert block_means(torch.randn(batch, HEADS, keys, DIM), BLOCK).shape == (batch, HEADS, shape[1], DIM)
