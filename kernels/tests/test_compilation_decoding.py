"""Kernels of few queries compile for GPUs, without one: see test_compilation.py."""

from typing import Any

import pytest

from patchattn_kernels import column_mass_few_triton, decoding_triton
from patchattn_kernels.tuning import Launch

from .test_compilation import check, compiled, compiled_kernels

DTYPES, ROWS = compiled_kernels.DTYPES, compiled_kernels.ROWS


def decode(dim: int, rows: int = 16, *, dtype: str = "*bf16", **how: Any) -> Any:
    """The kernel that decodes, with its first launch settings."""
    launch = decoding_triton.launches(DTYPES[dtype], dim, rows)[0]
    return compiled_kernels.decoding(rows, dim, launch, dtype=dtype, **how)


def merge(dim: int, dtype: str = "*bf16") -> Any:
    like = decode(dim)
    launch = Launch({}, num_warps=4)
    constants = {**like.constants, "MOST": decoding_triton.SPLITS}
    return compiled_kernels.Kernel(
        "decoding_triton.merge_kernel", launch, constants, {**like.types, "output": dtype}, products=False
    )


def few(dim: int, *, dtype: str = "*bf16", **how: Any) -> Any:
    """`column_mass` of few queries, likewise."""
    return compiled_kernels.few_queries(dim, column_mass_few_triton.launches(DTYPES[dtype], dim)[0], dtype=dtype, **how)


QUICK = [few(64, mask="rows"), decode(32, page=16), decode(32, mask="rows", split=False), merge(80)]
ALL = [decode(dim, rows, page=page) for dim in (64, 80, 128, 256) for rows in ROWS for page in (0, 16)]
ALL += [decode(dim, rows, capability=80) for dim in (64, 80, 128, 256) for rows in ROWS]
ALL += [decode(128, rows, mask=mask) for mask in ("all", "window", "keys", "rows") for rows in ROWS]
ALL += [decode(dim, 16, output=False) for dim in (64, 128, 256)]
ALL += [decode(dim, 64, dtype=dtype, page=64) for dtype in ("*fp16", "*fp32") for dim in (64, 128, 256)]
ALL += [few(dim, mask=mask) for dim in (64, 80, 128, 256) for mask in ("none", "rows")]
ALL += [few(128, capability=80), few(64, padded=True), few(128, dtype="*fp32"), few(128, dtype="*fp16", mask="keys")]
ALL += [merge(dim) for dim in (64, 80, 256)]


def test_decoding_compiles() -> None:
    check(QUICK)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_of_decoding_compiles() -> None:
    check(ALL)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_products_of_decoding_overlap() -> None:
    kernels = [kernel for kernel in ALL if kernel.capability == 90]
    assert not [kernel.id for kernel, found in zip(kernels, compiled(kernels), strict=True) if found["serialized"]]
