"""What is read off the calls of a module that has written attention itself, one call after the other."""

from typing import Any

import pytest
import torch

from patchattn.hosts.transformers.tape import Tape


def weighted(pattern: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as `attend` of a tape is to give it."""
    return (pattern.weights @ pattern.value).transpose(1, 2), pattern.weights


def operands() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, 5, 4) for _ in range(3)]


def test_a_product_behind_the_softmax_that_is_none_of_weights_does_not_matter() -> None:
    query, key, value = operands()
    mixing = torch.randn(2, 3, 4, 4)
    wanted = (query @ key.mT).softmax(-1) @ (value @ mixing)
    with Tape("Mine", weighted):
        weights = torch.matmul(query, key.mT).softmax(dim=-1)
        found = torch.matmul(weights, torch.matmul(value, mixing))
    assert torch.allclose(found, wanted, atol=1e-6)


def test_weights_on_the_right_of_their_product_are_refused_by_name() -> None:
    query, key, value = operands()
    with Tape("Mine", weighted):
        weights = torch.matmul(query, key.mT).softmax(dim=-1)
        with pytest.raises(NotImplementedError, match=r"Mine computes attention itself.*the left side"):
            torch.matmul(value.mT, weights.mT)


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 3, 1, 1)])
def test_a_factor_of_heads_reaches_variants_in_the_queries(shape: tuple[int, ...]) -> None:
    query, key, value = operands()
    factor, bias = torch.rand(shape) + 0.5, torch.randn(3, 5, 5)

    def given(gain: float) -> torch.Tensor:
        def attend(pattern: Any) -> tuple[torch.Tensor, torch.Tensor]:
            torch.testing.assert_close(pattern.query, query * factor)
            torch.testing.assert_close(pattern.position_bias, bias.expand(pattern.position_bias.shape))
            changed = pattern.query * gain
            return pattern.base(changed, pattern.key, pattern.value, pattern.mask, pattern.position_bias, 0.5)

        with Tape("Mine", attend):
            scores = torch.matmul(query, key.mT) * 0.5
            weights = (scores * factor + bias).softmax(dim=-1)
            return torch.matmul(weights, value)

    assert torch.equal(given(1.0), (torch.matmul(query, key.mT) * 0.5 * factor + bias).softmax(-1) @ value)
    wanted = (query.double() @ key.double().mT * factor.double() + bias.double()).softmax(-1) @ value.double()
    torch.testing.assert_close(given(2.0).double(), wanted, rtol=0, atol=1e-5)


def test_a_maximum_with_the_least_number_changes_nothing_and_another_is_refused() -> None:
    query, key, value = operands()
    wanted = (query @ key.mT).softmax(-1) @ value
    for least, is_known in ((torch.finfo(torch.float32).min, True), (-1.0, False)):
        with Tape("Mine", weighted):
            scores = torch.max(torch.matmul(query, key.mT), torch.tensor(least))
            weights = scores.softmax(dim=-1)
            if is_known:
                torch.testing.assert_close(torch.matmul(weights, value), wanted)
            else:
                with pytest.raises(NotImplementedError, match="0 products reach the softmax"):
                    torch.matmul(weights, value)
