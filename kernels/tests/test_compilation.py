"""Kernels compile for a GPU, without one: Triton's interpreter, which other tests use, accepts more than its compiler.

To add a kernel, add it to QUICK, in a shape that compiles within a few seconds, and its launch settings to ALL.
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import torch

from patchattn_kernels import (
    block_sparse_attention_backward_triton,
    block_sparse_attention_triton,
    column_mass_triton,
    routed_pairs_triton,
    split_attention_backward_triton,
    split_attention_keys_triton,
    split_attention_triton,
)
from patchattn_kernels.tuning import Launch, tile_width

KIB = 1024
SHARED = {80: 163 * KIB, 90: 227 * KIB}  # bytes of shared memory that a program may have, by compute capability


@dataclass(frozen=True)
class Kernel:
    """A kernel and what it is compiled for.

    Attributes:
        name: module and function.
        launch: tiles, warps, stages.
        constants: values of constexpr arguments, those of `launch` apart; `None` for a pointer that is not given.
        types: of arguments, in Triton's words; int32 of those that are not named.
        multiples: numbers that are multiples of 16, as strides are; pointers are all taken for aligned.
        capability: of the GPU.
        products: whether it multiplies matrices.
    """

    name: str
    launch: Launch
    constants: dict[str, Any]
    types: dict[str, str]
    multiples: list[str] = field(default_factory=list)
    capability: int = 90
    products: bool = True

    @property
    def id(self) -> str:
        settings = "x".join(map(str, [*self.launch.blocks.values(), self.launch.num_warps, self.launch.num_stages]))
        return f"{self.name}-{self.types.get('query')}-{self.constants.get('DIM')}-{settings}-{self.capability}"


def routed(
    part: str, dim: int, launch: Launch, *, dtype: str = "*bf16", mask: str = "none", capability: int = 90
) -> Kernel:
    """A kernel of `routed_attention`; masks: `none` or a `window` (causal), `all` seen, `keys`, `rows`."""
    width = tile_width(dim)
    module = "routed_attention_backward_triton" if part in ("queries", "keys") else "routed_attention_triton"
    floats = ["gate", "lse", "delta", "gate_gradient", "parts", "sums"]
    states = ["query", "key", "value", "output", "upstream", "query_gradient", "key_gradient", "value_gradient"]
    constants = {"REPEATS": 4, "DIM": dim, "PAD": width, "VDIM": dim, "VPAD": width}
    constants |= {"CAUSAL": mask not in ("rows", "all"), "WINDOWED": mask == "window"}
    constants |= {"MASKED": mask in ("keys", "rows"), "PER_ROW": mask == "rows"}
    if mask not in ("keys", "rows"):
        constants |= {"mask": None, "first": None, "last": None}
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(states, dtype)
    types |= dict.fromkeys(["pairs", "starts", "first", "last"], "*i32") | {"mask": "*i1", "scale": "fp32"}
    strides = [f"{name}_{axis}" for name in ("query", "key", "value") for axis in ("batch", "head", "row")]
    return Kernel(f"{module}._{part}", launch, constants, types, strides, capability)


def _all_routed() -> list[Kernel]:
    kernels = []
    for part in ("prefill", "decode", "queries", "keys"):
        for dim in (64, 80, 128, 256):
            launches = routed_pairs_triton.launches(part, dim, torch.bfloat16)
            kernels += [routed(part, dim, launch) for launch in launches]
            kernels.append(routed(part, dim, launches[0], capability=80))
            kernels.append(routed(part, dim, launches[0], dtype="*fp16"))
        kernels += [routed(part, 64, launches[-1], mask=mask) for mask in ("all", "window", "keys", "rows")]
        for dim in (64, 256):
            kernels.append(routed(part, dim, routed_pairs_triton.launches(part, dim, torch.float32)[0], dtype="*fp32"))
    return kernels


def routed_without_products() -> list[Kernel]:
    """The lists of pairs, and the parts of decoding put together."""
    few = Launch({}, num_warps=4)
    lists = {"gate": "*fp32", "pairs": "*i32", "starts": "*i32"}
    merged = dict.fromkeys(["parts", "sums", "gate", "lse"], "*fp32") | {"output": "*bf16"}
    return [
        Kernel("routed_pairs_triton.list_pairs", few, {"REPEATS": 4, "BLOCK": 2048}, lists, products=False),
        Kernel("routed_attention_triton._merge", few, {"SPLITS": 8, "VDIM": 80, "VPAD": 128}, merged, products=False),
    ]


KEY_SETS = {
    "attention_kernel": split_attention_triton,
    "key_set_kernel": split_attention_triton,
    "query_gradient_kernel": split_attention_backward_triton,
    "key_gradient_kernel": split_attention_keys_triton,
    "column_mass_kernel": column_mass_triton,
}


def key_set(
    name: str, dim: int, launch: Launch, *, dtype: str = "*bf16", mask: str = "none", capability: int = 90, **how: bool
) -> Kernel:
    """A kernel of `split_attention` or `column_mass`; masks as of `routed`; `how`: what it leaves out or takes in."""
    constants: dict[str, Any] = {"DIM": dim, "DIM_V": dim, "BLOCK_D": max(16, 1 << (dim - 1).bit_length())}
    constants |= {"BLOCK_V": constants["BLOCK_D"], "CAUSAL": mask != "rows", "WINDOWED": mask == "window"}
    constants |= {"MASKED": mask in ("keys", "rows"), "PER_ROW": mask == "rows"}
    constants |= {"OUTPUT": True, "LISTED": False, "PADDED": False, **how}
    states = ["query", "key", "value", "given", "query_gradient", "key_gradient", "value_gradient"]
    types = dict.fromkeys(states, dtype) | dict.fromkeys(["output", "lse", "extra", "mass", "mass_of"], "*fp32")
    types |= dict.fromkeys(["index", "rank", "first", "last", "counts", "nearest", "seeing", "longest"], "*i32")
    types |= dict.fromkeys(["mask", "real", "chosen", "leading"], "*u8") | dict.fromkeys(["scale", "scaling"], "fp32")
    strides = [f"{tensor}_{axis}" for tensor in [*states, "output"] for axis in ("batch", "head", "token")]
    return Kernel(f"{KEY_SETS[name].__name__.split('.')[-1]}.{name}", launch, constants, types, strides, capability)


def _all_key_sets() -> list[Kernel]:
    kernels = []
    for name, module in KEY_SETS.items():
        for dim in (64, 80, 128, 256):
            launches = module.launches(torch.bfloat16, dim)
            kernels += [key_set(name, dim, launch) for launch in launches]
            kernels.append(key_set(name, dim, launches[0], capability=80))
            kernels.append(key_set(name, dim, launches[0], dtype="*fp16", OUTPUT=False, LISTED=True, PADDED=True))
        launch = module.launches(torch.bfloat16, 64)[-1]
        kernels += [key_set(name, 64, launch, mask=mask, LISTED=True) for mask in ("window", "keys", "rows")]
        for dim in (64, 256):
            kernels.append(key_set(name, dim, module.launches(torch.float32, dim)[0], dtype="*fp32"))
    return kernels


BLOCK_SPARSE = {
    "attend": block_sparse_attention_triton,
    "query_gradients": block_sparse_attention_backward_triton,
    "key_gradients": block_sparse_attention_backward_triton,
}


def block_sparse(
    name: str, dim: int, launch: Launch, *, dtype: str = "*bf16", mask: str = "none", capability: int = 90,
    listed: bool = False, sinks: bool = False,
) -> Kernel:  # fmt: skip
    """A kernel of `block_sparse_attention`; masks as of `routed`; of blocks of 128, or of windows."""
    block, width = 128 if listed else 0, tile_width(dim)
    constants: dict[str, Any] = {"DIM": dim, "PAD": width, "VDIM": dim, "VPAD": width, "CAUSAL": mask != "rows"}
    constants |= {"BLOCK_Q": block, "BLOCK_K": block, "LISTED": listed, "WINDOWED": mask == "window"}
    constants |= {"MASKED": mask in ("keys", "rows"), "PER_ROW": mask == "rows", "SINKS": sinks}
    constants |= {"PADDED": mask in ("keys", "rows") and not listed, "ADDED": not listed and not sinks}
    states = ["query", "key", "value", "gradient", "output", "result", "key_result", "value_result"]
    types = dict.fromkeys(states, dtype) | dict.fromkeys(["lse", "power", "delta", "key_part", "value_part"], "*fp32")
    types |= dict.fromkeys(["first", "second", "order", "places"], "*i32")
    types |= {"mask": "*i1", "scale": "fp32", "scaling": "fp32"}
    strides = [f"{name}_{axis}" for name in "qkvgor" for axis in ("batch", "head", "row")]
    return Kernel(f"{BLOCK_SPARSE[name].__name__.split('.')[-1]}.{name}", launch, constants, types, strides, capability)


def _all_block_sparse() -> list[Kernel]:
    kernels = []
    for name in BLOCK_SPARSE:

        def launches(dim: int, dtype: torch.dtype, forward: bool = name == "attend") -> list[Launch]:
            if forward:
                few = block_sparse_attention_triton.launches(dim, dtype, 1)
                return [*block_sparse_attention_triton.launches(dim, dtype, 8192), *few]
            return block_sparse_attention_backward_triton.launches(dim, dtype)

        for dim in (64, 80, 128, 256):
            for launch in launches(dim, torch.bfloat16):
                kernels += [block_sparse(name, dim, launch, listed=listed) for listed in (False, True)]
            default = launches(dim, torch.bfloat16)[0]
            kernels.append(block_sparse(name, dim, default, capability=80))
            kernels.append(block_sparse(name, dim, default, dtype="*fp16", sinks=name == "key_gradients"))
        default = launches(64, torch.bfloat16)[0]
        kernels += [block_sparse(name, 64, default, mask=mask) for mask in ("window", "keys", "rows")]
        for dim in (64, 256):
            kernels.append(block_sparse(name, dim, launches(dim, torch.float32)[0], dtype="*fp32"))
    return kernels


SMALL = Launch({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2)
QUICK = {"routed_attention": [routed(part, 32, SMALL, mask="rows") for part in ("prefill", "queries", "decode")]}
QUICK["routed_attention"] += [routed("prefill", 32, SMALL), routed("keys", 32, SMALL, mask="all")]
QUICK["routed_attention"] += routed_without_products()
QUICK["split_attention"] = [
    key_set(name, 32, SMALL, LISTED=True) for name in ("attention_kernel", "key_gradient_kernel")
]
QUICK["split_attention"].append(key_set("column_mass_kernel", 32, SMALL, mask="rows"))
QUICK["block_sparse_attention"] = [
    block_sparse(name, 32, SMALL, listed=listed)
    for name, listed in [("attend", False), ("attend", True), ("query_gradients", True), ("key_gradients", False)]
]
ALL = {
    "routed_attention": _all_routed(),
    "split_attention": _all_key_sets(),
    "block_sparse_attention": _all_block_sparse(),
}


MASKS = ("none", "all", "window", "keys", "rows")
DEFAULTS = {
    "routed_attention": [
        routed(part, dim, routed_pairs_triton.launches(part, dim, torch.bfloat16)[0], mask=mask)
        for part in ("prefill", "queries")
        for dim in (64, 80, 128, 256)
        for mask in MASKS
    ],
    "block_sparse_attention": [
        block_sparse(
            "query_gradients", dim, block_sparse_attention_backward_triton.launches(dim, torch.bfloat16)[0],
            mask=mask, listed=listed,
        )
        for dim in (64, 80, 128, 256)
        for mask in MASKS
        for listed in (False, True)
    ],
}  # fmt: skip


def compiled(kernels: list[Kernel]) -> list[dict[str, Any]]:
    """What `_compile` says of each, in a fresh process.

    Where Triton interprets, it can no longer compile in the same process.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(kernel) for kernel in kernels]),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernels: list[Kernel]) -> None:
    for kernel, found in zip(kernels, compiled(kernels), strict=True):
        assert found["shared"] <= SHARED[kernel.capability], kernel.id
        assert found["tensor_cores"] == (kernel.products and kernel.types["query"] != "*fp32"), kernel.id
        assert not found["narrow"], (kernel.id, found["narrow"])


def check_products(kernels: list[Kernel]) -> None:
    """None waits for the one before it, as ptxas has it where it cannot tell an accumulator's registers apart."""
    for kernel, found in zip(kernels, compiled(kernels), strict=True):
        assert not found["serialized"], (kernel.id, kernel.constants)


@pytest.mark.parametrize("operation", QUICK)
def test_kernels_compile(operation: str) -> None:
    check(QUICK[operation])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("operation", ALL)
def test_all_launch_settings_compile(operation: str) -> None:
    check(ALL[operation])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("operation", DEFAULTS)
def test_products_of_the_default_settings_overlap(operation: str) -> None:
    check_products(DEFAULTS[operation])


def narrow_strides(code: str) -> list[str]:
    """Strides that Triton's code multiplies by something in 32 bits; those of bounds and lists stay small."""
    found = []
    arguments = re.search(r"tt\.func public @\w+\((.*)", code)
    assert arguments is not None
    for name in re.findall(r"%(\w+_(?:batch|head|row|token|column)): i32", arguments[1]):
        if name.startswith(("bound", "list", "order")):
            continue
        same = {f"%{name}"}
        for result, operation, operands in re.findall(r"(%\S+) = (tt\.splat|tt\.broadcast|arith\.muli) (.*)", code):
            if same.isdisjoint(re.findall(r"%[\w#]+", operands)):
                continue
            if operation != "arith.muli":
                same.add(result)
            elif re.search(r"i32>? ", operands):
                found.append(name)
    return found


def _compile(launch: dict[str, Any], name: str, **kernel: Any) -> dict[str, Any]:
    """Shared memory in bytes, whether products are on tensor cores and wait for each other, and `narrow_strides`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = name.split(".")
    source = getattr(importlib.import_module(f"patchattn_kernels.{module}"), function)
    tiles = {size: value for size, value in launch["blocks"].items() if size in source.arg_names}
    constants = {key: value for key, value in (kernel["constants"] | tiles).items() if key in source.arg_names}
    signature, attributes = {}, {}
    for number, argument in enumerate(source.arg_names):
        kind = "constexpr" if argument in constants else kernel["types"].get(argument, "i32")
        signature[argument] = kind
        if kind.startswith("*") or (kind != "constexpr" and argument in kernel["multiples"]):
            attributes[(number,)] = [["tt.divisibility", 16]]
    with contextlib.redirect_stdout(io.StringIO()) as log:
        result = triton.compile(
            ASTSource(fn=source, signature=signature, constexprs=constants, attrs=attributes),
            target=GPUTarget("cuda", kernel["capability"], 32),
            options={"num_warps": launch["num_warps"], "num_stages": launch["num_stages"]},
        )
    assert "registers" in log.getvalue(), "ptxas has no log to read"
    code = result.asm["ptx"]
    return {
        "shared": result.metadata.shared,
        "tensor_cores": "wgmma.mma_async" in code or "mma.sync" in code,
        "serialized": "serialized" in log.getvalue(),
        "narrow": narrow_strides(result.asm["ttir"]),
    }


if __name__ == "__main__":
    for kernel in json.load(sys.stdin):
        print(json.dumps(_compile(**kernel)), flush=True)
