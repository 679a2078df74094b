"""Attention put together from parts of the keys, against one softmax over all of them in float64."""

import math

import pytest
import torch

from patchattn_kernels import AttentionRule, attention_with_lse, merge_attention

SIZE = 5  # tokens of each of the ranks
RANKS = 3


def text(seed: int = 0) -> list[torch.Tensor]:
    """Queries `(2, 4, T, 6)`, keys and values of two kv heads."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, RANKS * SIZE, 6) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> tuple[list, list]:
    """Outputs and log-sum-exps by loops over rows and keys, as lists of numbers."""
    outputs, sums = [], []
    for row in range(query.shape[2]):
        places = range(row + 1) if causal else range(key.shape[2])
        logits = [float(query[0, 3, row] @ key[0, 1, place]) * 0.3 for place in places]
        total = sum(math.exp(logit) for logit in logits)
        sums.append(math.log(total))
        weighted = [math.exp(logit) / total * value[0, 1, place] for logit, place in zip(logits, places, strict=True)]
        outputs.append(sum(weighted).tolist())
    return outputs, sums


def ring(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> tuple[torch.Tensor, ...]:
    """Ring Attention's schedule: in each step every rank adds the next part of keys and values to the others."""
    queries, keys, values = (tensor.split(SIZE, dim=2) for tensor in (query, key, value))
    running: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * RANKS
    for step in range(RANKS):
        for rank in range(RANKS):
            source = (rank - step) % RANKS
            if causal and source > rank:
                continue
            rule = AttentionRule(0.3, causal=causal, offset=(rank - source) * SIZE)
            part = attention_with_lse(queries[rank], keys[source], values[source], rule)
            before = running[rank]
            running[rank] = part if before is None else merge_attention(before, part)
    return tuple(torch.cat([found[side] for found in running if found is not None], dim=2) for side in (0, 1))


@pytest.mark.parametrize("causal", [True, False])
def test_a_ring_of_ranks_is_attention_to_the_whole(causal: bool) -> None:
    """Also its gradients, those of the log-sum-exps included."""
    states = [tensor.requires_grad_() for tensor in text()]
    output, lse = ring(*states, causal=causal)
    outputs, sums = attended(*(tensor.detach() for tensor in states), causal=causal)
    torch.testing.assert_close(output[0, 3].detach(), torch.tensor(outputs, dtype=torch.float64))
    torch.testing.assert_close(lse[0, 3].detach(), torch.tensor(sums, dtype=torch.float64))
    found = torch.autograd.grad((output * output.detach().roll(1)).sum() + lse.sum(), states)
    whole, total = attention_with_lse(*states, AttentionRule(0.3, causal=causal))
    expected = torch.autograd.grad((whole * output.detach().roll(1)).sum() + total.sum(), states)
    torch.testing.assert_close(found, expected)


def test_parts_come_in_any_order_and_one_alone_is_itself() -> None:
    query, key, value = text(1)
    parts = [
        attention_with_lse(query, *(tensor[:, :, at : at + SIZE] for tensor in (key, value)), AttentionRule(1.0))
        for at in range(0, RANKS * SIZE, SIZE)
    ]
    whole = attention_with_lse(query, key, value, AttentionRule(1.0))
    torch.testing.assert_close(merge_attention(*parts), whole)
    torch.testing.assert_close(merge_attention(*reversed(parts)), whole)
    torch.testing.assert_close(merge_attention(parts[0]), parts[0])


def test_rows_that_see_nothing_add_nothing() -> None:
    """In one part: the other alone counts, and no gradient is lost. In both: zeros, and -inf. Whatever they hold."""
    query, key, value = text(2)
    output, lse = attention_with_lse(query, key, value, AttentionRule(1.0))
    nothing = torch.full_like(output, torch.nan), torch.full_like(lse, -torch.inf)
    output, lse = output.requires_grad_(), lse.requires_grad_()
    found = merge_attention((output, lse), nothing)
    torch.testing.assert_close(found, (output, lse))
    grads = torch.autograd.grad(found[0].sum() + found[1].sum(), (output, lse))
    torch.testing.assert_close(grads, (torch.ones_like(output), torch.ones_like(lse)))
    empty, total = merge_attention(nothing, nothing)
    assert not empty.any()
    assert (total == -torch.inf).all()


def test_gradients_are_those_of_numbers() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, 1, 2, 3), (1, 1, 2)] * 2
    parts = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(lambda a, b, c, d: merge_attention((a, b), (c, d)), parts)


def test_parts_of_other_queries_are_refused() -> None:
    one = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="at least one"):
        merge_attention()
    with pytest.raises(ValueError, match=r"of the same queries, got .*\(1, 2, 5, 4\)"):
        merge_attention(one, (torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5)))
    with pytest.raises(ValueError, match="of the same queries"):
        merge_attention((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4)))
