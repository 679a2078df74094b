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
