"""Every operator is registered as torch wants it: schema, gradient, shapes without data (`torch.library.opcheck`)."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import patchattn_kernels
from patchattn_kernels import lists_from_mask, split_attention_ops
from patchattn_kernels.key_mask import key_mask
from patchattn_kernels.rows import AttentionRule

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator: 3 queries of 2 query heads, 20 keys of one kv head, padded."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, learns: bool = False) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_(learns)

    shapes = ((1, 2, 3, 16), (1, 1, 20, 16), (1, 1, 20, 16))
    states = [normal(*shape, learns=True) for shape in shapes]
    fixed = [state.detach() for state in states]
    mask = torch.arange(20)[None] > 1
    seen = tuple(key_mask(AttentionRule(0.4, causal=True, mask=mask), 3, 20, mask.device))
    gate, lse = normal(1, 3, 2).abs(), normal(1, 2, 3)
    output, rows = normal(1, 2, 3, 16), torch.ones(1, 3, dtype=torch.bool)
    key_set = torch.arange(20).expand(1, 2, -1) % 3 == 0
    lists = lists_from_mask(torch.ones(1, 2, 1, 2, dtype=torch.bool), 16, 16)
    sparse = (lists.indices, lists.counts, [16, 16], None, None, 0.4, True, None, None)
    pages = (torch.tensor([[[1, 0]]]).int(), torch.tensor([[2]]).int(), 8, None, None, 0.4, True, None, None)
    learning = lse.clone().requires_grad_()
    return {
        "routed_attention": (*states, gate.clone().requires_grad_(), *seen, 0.4),
        "routed_attention_backward": (normal(1, 3, 2, 16), *fixed, gate, normal(1, 3, 2, 16), gate, *seen, 0.4),
        "block_sparse_attention": (*states, *sparse),
        "block_sparse_attention_backward": (output, lse, output, lse, *fixed, *sparse),
        "selected_attention": (*states, *pages),
        "selected_attention_backward": (output, lse, *fixed, *pages),
        "attention": (*states, 0.4, *seen),
        "log_sum_exp": (*states[:2], 0.4, *seen),
        "key_set_part": (*states, learning, key_set, *split_attention_ops.compact(key_set), 0.4, *seen),
        "attention_backward": (*fixed, output, lse, lse, None, None, None, 0.4, *seen),
        "column_mass": (*states[:2], learning, rows, 0.4, *seen),
        "column_mass_backward": (*fixed[:2], lse, rows, normal(1, 2, 20), 0.4, seen[0], *seen[3:]),
        "key_counts": (lse, 3, 20, rows, *seen),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("name", calls())
def test_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    torch.library.opcheck(getattr(torch.ops.patchattn, name).default, calls()[name], test_utils=CHECKS)


def test_none_is_missing() -> None:
    code = "".join(path.read_text() for path in Path(patchattn_kernels.__file__).parent.glob("*.py"))
    assert set(re.findall(r'custom_op\(\s*add_op_namespace_prefix\("(\w+)"\)', code)) == set(calls())
