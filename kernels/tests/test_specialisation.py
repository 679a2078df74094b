"""How often kernels are compiled while a model generates: keys grow by one with every token.

Triton is asked what it would compile; nothing is compiled, and no GPU is needed: its driver is one that only names a
target. In a process of its own, since where Triton interprets it can no longer compile.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

TOKENS = 200


def _operations(name: str, dim: int, padded: bool) -> Callable[[int], Any]:
    """A decoding step of one operation, over so many keys."""
    import patchattn_kernels as kernels

    batch, heads, groups = 2, 8, 2
    query = torch.zeros(batch, heads, 1, dim, dtype=torch.bfloat16)

    def step(keys: int) -> Any:
        key, value = (torch.zeros(batch, groups, keys, dim, dtype=torch.bfloat16) for _ in range(2))
        mask = torch.ones(batch, keys, dtype=torch.bool) if padded else None
        rule = kernels.AttentionRule(0.125, mask=mask, causal=True)
        if name == "routed":
            return kernels.routed_attention(query, key, value, torch.ones(batch, 1, heads), rule)
        if name == "split":
            chosen = torch.zeros(batch, heads, keys, dtype=torch.bool)
            return kernels.split_attention(query, key, value, chosen, rule)
        if name == "column mass":
            kernels.column_mass(query, key, rule)
            return kernels.key_counts(rule, 1, keys, query.device)
        if name == "sinks":
            return kernels.block_sparse_attention(query, key, value, kernels.sink_and_recent(4, 64, heads), rule)
        if name == "selected":
            pages = torch.arange(-(-keys // 16)).expand(batch, groups, -1).contiguous()
            return kernels.selected_attention(query, key, value, pages, pages[..., 0], 16, rule)
        blocks = torch.ones(1, 1, 1, -(-keys // 16), dtype=torch.bool)
        return kernels.block_sparse_attention(query, key, value, kernels.lists_from_mask(blocks, 16, 16), rule)

    return step


def _counted(name: str, dim: int, padded: bool, first: int) -> dict[str, int]:
    """How many versions of each kernel the steps ask for."""
    import triton
    from triton.backends.compiler import GPUTarget

    from patchattn_kernels import backend

    class Driver:
        """Names a GPU and its stream."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    versions: dict[str, set[str]] = {}

    def refuse(**asked: Any) -> bool:
        versions.setdefault(asked["fn"].name, set()).add(str(asked["key"]))
        return True  # nothing is compiled, and nothing launched

    triton.runtime.driver.set_active(Driver())
    triton.knobs.runtime.jit_cache_hook = refuse
    backend._missing = lambda device: None
    step = _operations(name, dim, padded)
    with torch.no_grad():
        for keys in range(first, first + TOKENS, 3):  # four times each remainder by 16, which kernels are compiled by
            step(keys)
    return {kernel: len(found) for kernel, found in versions.items()}


OPERATIONS = ["routed", "split", "column mass", "sinks", "lists", "selected"]
# few keys of wide heads are cut into 1, 2 and 4 parts
SHAPES = [(dim, padded, first) for padded in (False, True) for dim, first in ((64, 900), (256, 90))]


@pytest.fixture(scope="module")
def versions() -> list[dict[str, int]]:
    """What each operation asks for in each shape, from one process for all."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([(name, *shape) for name in OPERATIONS for shape in SHAPES]),
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        | {"PATCHATTN_KERNELS": "triton"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, int]] = json.loads(done.stdout)
    assert len(found) == len(OPERATIONS) * len(SHAPES)
    return found


@pytest.mark.parametrize("name", OPERATIONS)
def test_two_compilations_in_two_hundred_tokens(name: str, versions: list[dict[str, int]]) -> None:
    start = OPERATIONS.index(name) * len(SHAPES)
    for shape, counts in zip(SHAPES, versions[start : start + len(SHAPES)], strict=True):
        assert counts, "no kernel was asked for"
        assert max(counts.values()) <= 2, (shape, counts)


if __name__ == "__main__":
    print(json.dumps([_counted(*case) for case in json.load(sys.stdin)]))
