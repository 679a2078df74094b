"""Kernels of few queries compile for GPUs, without one: see test_compilation.py."""

from typing import Any

import pytest

from patchattn_kernels import column_mass_few_triton, decoding_triton
from patchattn_kernels.tuning import Launch

from .test_compilation import check, compilation, compiled

FEW = (16, 32, 64)


def decode(
    dim: int, rows: int = 16, *, dtype: str = "*bf16", mask: str = "none", capability: int = 90, page: int = 0,
    output: bool = True, split: bool = True,
) -> Any:  # fmt: skip
    """The kernel that decodes, over pages of some size or (0) all keys; masks as of `key_set`."""
    found = decoding_triton.launches(compilation.DTYPES[dtype], dim, rows)[0]
    launch = Launch({**found.blocks, "BLOCK_M": rows}, found.num_warps, found.num_stages)
    like = compilation.key_set(
        "attention_kernel", dim, launch, dtype=dtype, mask=mask, capability=capability, OUTPUT=output
    )
    constants: dict[str, Any] = {**like.constants, "GROUP": 4, "PAGE": page or 1, "PAGED": page > 0, "SPLIT": split}
    types = {**like.types, **dict.fromkeys(["totals", "masses", "tops"], "*fp32")}
    types |= dict.fromkeys(["pages", "counts"], "*i32") | {"output": dtype if page else "*fp32"}
    return compilation.Kernel("decoding_triton.decode_kernel", launch, constants, types, like.multiples, capability)


def merge(dim: int, dtype: str = "*bf16") -> Any:
    like = decode(dim)
    launch = Launch({}, num_warps=4)
    constants = {**like.constants, "MOST": decoding_triton.SPLITS}
    return compilation.Kernel(
        "decoding_triton.merge_kernel", launch, constants, {**like.types, "output": dtype}, products=False
    )


def few(dim: int, *, dtype: str = "*bf16", mask: str = "none", capability: int = 90, padded: bool = False) -> Any:
    """`column_mass` of few queries."""
    launch = column_mass_few_triton.launches(compilation.DTYPES[dtype], dim)[0]
    like = compilation.key_set("column_mass_kernel", dim, launch, dtype=dtype, mask=mask, PADDED=padded)
    constants = {**like.constants, "HEADS": 4}
    name = "column_mass_few_triton.column_mass_few_kernel"
    return compilation.Kernel(name, launch, constants, like.types, like.multiples, capability)


QUICK = [few(64, mask="rows"), decode(32, page=16), decode(32, mask="rows", split=False), merge(80)]
ALL = [decode(dim, rows, page=page) for dim in (64, 80, 128, 256) for rows in FEW for page in (0, 16)]
ALL += [decode(dim, rows, capability=80) for dim in (64, 80, 128, 256) for rows in FEW]
ALL += [decode(128, rows, mask=mask) for mask in ("all", "window", "keys", "rows") for rows in FEW]
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
