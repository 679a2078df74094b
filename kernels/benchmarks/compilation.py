"""What Triton's kernels need of a GPU: registers, spills and shared memory, compiled ahead of time without one.

    python kernels/benchmarks/compilation.py --records compiled.jsonl --output docs/results/kernels-compiled.md

compiles every kernel with the launch settings that a device gets first, for every head dim, dtype and kind of mask, and
writes a table. What `--records` holds already is not compiled again, so that a run that is cut off goes on.
"""

import argparse
import contextlib
import datetime
import importlib
import inspect
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
from patchattn_kernels.tuning import Launch, fitting, tile_width

KIB = 1024
SHARED = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB}  # that a program may have, by compute capability
SPILLS = 64  # bytes of registers that a thread may spill in half precision
MASKS = ("none", "rows", "keys", "window", "all")
DIMS = (64, 80, 96, 128, 256)
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32, "*fp16": torch.float16}


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
        label: what it is called in the table, with its mask.
    """

    name: str
    launch: Launch
    constants: dict[str, Any]
    types: dict[str, str]
    multiples: list[str] = field(default_factory=list)
    capability: int = 90
    products: bool = True
    label: tuple[str, str] = ("", "")

    @property
    def id(self) -> str:
        settings = "x".join(map(str, [*self.launch.blocks.values(), self.launch.num_warps, self.launch.num_stages]))
        what = f"{self.name}-{self.types.get('query')}-{self.constants.get('DIM')}-{settings}-{self.capability}"
        return f"{what}-{'-'.join(self.label)}"


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
    label = (f"routed, {part}", mask)
    return Kernel(f"{module}._{part}", launch, constants, types, strides, capability, label=label)


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
    constants: dict[str, Any] = {"DIM": dim, "DIM_V": dim, "BLOCK_D": tile_width(dim), "BLOCK_V": tile_width(dim)}
    constants |= {"CAUSAL": mask not in ("rows", "all"), "WINDOWED": mask == "window"}
    constants |= {"MASKED": mask in ("keys", "rows"), "PER_ROW": mask == "rows"}
    constants |= {"OUTPUT": True, "LISTED": False, "PADDED": False, **how}
    states = ["query", "key", "value", "given", "query_gradient", "key_gradient", "value_gradient"]
    types = dict.fromkeys(states, dtype) | dict.fromkeys(["output", "lse", "extra", "mass", "mass_of"], "*fp32")
    types |= dict.fromkeys(["index", "rank", "first", "last", "counts", "nearest", "seeing", "longest"], "*i32")
    types |= dict.fromkeys(["mask", "real", "chosen", "leading"], "*u8") | dict.fromkeys(["scale", "scaling"], "fp32")
    strides = [f"{tensor}_{axis}" for tensor in [*states, "output"] for axis in ("batch", "head", "token")]
    module = KEY_SETS[name].__name__.split(".")[-1]
    label = " ".join([name.removesuffix("_kernel").replace("_", " "), *(k.lower() for k, v in how.items() if v)])
    label = "log-sum-exp" if not constants["OUTPUT"] and name == "attention_kernel" else label
    return Kernel(
        f"{module}.{name}", launch, constants, types, strides, capability, label=(f"split, {label}", mask)
    )  # fmt: skip


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
    constants: dict[str, Any] = {"DIM": dim, "PAD": width, "VDIM": dim, "VPAD": width}
    constants |= {"CAUSAL": mask not in ("rows", "all"), "WINDOWED": mask == "window"}
    constants |= {"BLOCK_Q": block, "BLOCK_K": block, "LISTED": listed}
    constants |= {"MASKED": mask in ("keys", "rows"), "PER_ROW": mask == "rows", "SINKS": sinks}
    constants |= {"PADDED": mask in ("keys", "rows") and not listed, "ADDED": not listed and not sinks}
    states = ["query", "key", "value", "gradient", "output", "result", "key_result", "value_result"]
    types = dict.fromkeys(states, dtype) | dict.fromkeys(["lse", "power", "delta", "key_part", "value_part"], "*fp32")
    types |= dict.fromkeys(["first", "second", "order", "places"], "*i32")
    types |= {"mask": "*i1", "scale": "fp32", "scaling": "fp32"}
    strides = [f"{name}_{axis}" for name in "qkvgor" for axis in ("batch", "head", "row")]
    few = " few rows" if launch.blocks["BLOCK_M"] == 16 and name == "attend" else ""
    label = f"sparse, {name.replace('_', ' ')}{few}, {'lists' if listed else 'of sinks' if sinks else 'windows'}"
    module = BLOCK_SPARSE[name].__name__.split(".")[-1]
    return Kernel(f"{module}.{name}", launch, constants, types, strides, capability, label=(label, mask))


Build = Callable[..., Kernel]
_Choice = tuple[Build, Callable[..., Sequence[Launch]]]


def choices() -> Iterator[_Choice]:
    """All kernels that multiply matrices, and the launch settings of each."""

    def of(build: Callable[..., Kernel], name: str, **how: Any) -> Build:
        return lambda dim, launch, **more: build(name, dim, launch, **how, **more)

    for part in ("prefill", "decode", "queries", "keys"):
        yield of(routed, part), lambda dim, dtype, part=part: routed_pairs_triton.launches(part, dim, dtype)  # type: ignore[misc]

    def forward_launches(dim: int, dtype: torch.dtype, per_row: bool = False) -> Sequence[Launch]:
        return split_attention_triton.launches(dtype, dim, per_row)

    for name, module in KEY_SETS.items():
        launches = lambda dim, dtype, module=module: module.launches(dtype, dim)  # type: ignore[misc]  # noqa: E731
        yield of(key_set, name), forward_launches if name == "attention_kernel" else launches
        if name == "attention_kernel":
            yield of(key_set, name, OUTPUT=False), forward_launches
        if "gradient" in name:
            yield of(key_set, name, LISTED=True), launches
        if name == "column_mass_kernel":
            yield of(key_set, name, PADDED=True), launches
    forward, backward = block_sparse_attention_triton.launches, block_sparse_attention_backward_triton.launches
    for listed in (False, True):
        for few in (False, True):

            def sparse(dim: int, dtype: torch.dtype, per_row: bool = False, few: bool = few) -> Sequence[Launch]:
                return forward(dim, dtype, few, per_row)

            yield of(block_sparse, "attend", listed=listed), sparse
        yield of(block_sparse, "query_gradients", listed=listed), backward
        yield of(block_sparse, "key_gradients", listed=listed), backward
    yield of(block_sparse, "key_gradients", sinks=True), backward


def _for_mask(launches: Callable[..., Sequence[Launch]], dim: int, dtype: str, mask: str) -> Sequence[Launch]:
    """Some kernels have settings of their own for masks with a row per query."""
    own = "per_row" in inspect.signature(launches).parameters
    return launches(dim, DTYPES[dtype], **({"per_row": mask == "rows"} if own else {}))


def first_candidates(
    dims: Iterable[int] = DIMS,
    masks: Iterable[str] = MASKS,
    dtypes: Iterable[str] = ("*bf16", "*fp32"),
    capabilities: Iterable[int] = tuple(SHARED),
) -> list[Kernel]:
    """Every kernel as a device would launch it first."""
    return [
        build(
            dim, fitting(_for_mask(launches, dim, dtype, mask), capability // 10, SHARED[capability])[0],
            dtype=dtype, mask=mask, capability=capability,
        )
        for dtype in dtypes for capability in capabilities for mask in masks for dim in dims
        for build, launches in choices()
    ]  # fmt: skip


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


def compile_kernel(launch: dict[str, Any], name: str, **kernel: Any) -> dict[str, Any]:
    """What ptxas and Triton say of a kernel.

    Args:
        launch: fields of a `Launch`.
        name: as of `Kernel`.
        kernel: the other fields of a `Kernel`.

    Returns:
        `registers` of a thread, `spills` in bytes a thread, `shared` memory in bytes, which `products` there are
        (`wgmma`, `mma` or none), whether they are `serialized`, and `narrow` strides.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
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
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.search(r"(\d+) bytes spill stores", log.getvalue())
    if registers is None or spills is None:
        raise RuntimeError(f"Expected registers and spills in the log of ptxas, got {log.getvalue()!r}.")
    code = result.asm["ptx"]
    return {
        "registers": int(registers[1]),
        "spills": int(spills[1]),
        "shared": result.metadata.shared,
        "products": "wgmma" if "wgmma.mma_async" in code else "mma" if "mma.sync" in code else "",
        "serialized": "serialized" in log.getvalue(),
        "narrow": narrow_strides(result.asm["ttir"]),
    }


def faults(found: dict[str, Any], unmasked: dict[str, Any] | None, *, dtype: str, capability: int) -> list[str]:
    """What is wrong with a compiled kernel, in words.

    Args:
        found: of `compile_kernel`.
        unmasked: the same of the kernel without a mask.
        dtype: of the operands, in Triton's words.
        capability: of the GPU.
    """
    wrong = []
    if found["serialized"]:
        wrong.append("serialized")
    if found["spills"] > SPILLS and dtype != "*fp32":
        wrong.append(f"{found['spills']} bytes spilled")
    if found["shared"] > SHARED[capability]:
        wrong.append(f"{found['shared']} of {SHARED[capability]} bytes of shared memory")
    if unmasked is not None and unmasked["products"] == "wgmma" and found["products"] != "wgmma":
        wrong.append("no wgmma")
    return wrong


def record(kernel: Kernel) -> dict[str, Any]:
    """What is compiled, without how."""
    label, mask = kernel.label
    launch = "x".join(map(str, [*kernel.launch.blocks.values(), kernel.launch.num_warps, kernel.launch.num_stages]))
    return {
        "kernel": label, "mask": mask, "dtype": kernel.types["query"], "dim": kernel.constants["DIM"],
        "capability": kernel.capability, "launch": launch,
    }  # fmt: skip


def table(records: list[dict[str, Any]], planned: int) -> str:
    """Markdown: a row per kernel, dtype, mask and head dim, a column per compute capability."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version

    capabilities = sorted(SHARED)
    rows: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for one in records:
        row = (one["dtype"], one["kernel"], MASKS.index(one["mask"]), one["dim"])
        rows.setdefault(row, {})[one["capability"]] = one
    lines, wrong = [], []
    for (dtype, kernel, mask, dim), found in sorted(rows.items()):
        cells = []
        for capability in capabilities:
            one = found.get(capability)
            if one is None:
                cells.append("")
                continue
            unmasked = rows.get((dtype, kernel, MASKS.index("all"), dim), {}).get(capability)
            faulty = faults(one, unmasked, dtype=dtype, capability=capability)
            spilled = f", {one['spills']} B" if one["spills"] else ""
            cell = f"{one['registers']}{spilled}, {one['shared'] / KIB:.0f} KiB, {one['launch']}"
            cells.append(f"**{cell}**" if faulty else cell)
            if faulty:
                what = f"{kernel}, {dtype[1:]}, mask {MASKS[mask]}, D {dim}, sm_{capability}, {one['launch']}"
                wrong.append(f"- {what}: {', '.join(faulty)}")
        lines.append(f"| {kernel} | {dtype[1:]} | {MASKS[mask]} | {dim} | {' | '.join(cells)} |")
    assembler = re.search(r"V(\d[\d.]*)", get_ptxas_version())
    versions = f"Triton {triton.__version__}, ptxas {assembler[1] if assembler else '?'}, torch {torch.__version__}"
    command = "python kernels/benchmarks/compilation.py --records compiled.jsonl --output kernels-compiled.md"
    return f"""# Kernels, compiled

{datetime.date.today().isoformat()}, {versions}. `{command}`

Triton's kernels compiled ahead of time with the launch settings that a device gets first. No GPU ran them: this says
what they need, and not how fast they are. {len(records)} of {planned} are compiled; an empty cell is one that is not.

A cell: registers of a thread, bytes that it spills where there are any, shared memory of a program, and BLOCK_M,
BLOCK_N, warps and stages. Masks: `none` is causal without any, `all` sees all keys, `window` is causal, `keys` has one
row for all queries, `rows` one for each. In bold is what is not as it should be: products that wait for each other
(`serialized`), more than {SPILLS} bytes of spills in half precision, more shared memory than there is, or no wgmma
where the kernel has it without a mask.

## Not as it should be

{chr(10).join(wrong) or "Nothing."}

## All

| kernel | dtype | mask | D | {" | ".join(f"sm_{capability}" for capability in capabilities)} |
|---|---|---|---|{"---|" * len(capabilities)}
{chr(10).join(lines)}
"""


def _order(kernel: Kernel) -> tuple[Any, ...]:
    """What says most first, should there be no time for all."""
    dtype, mask = kernel.types["query"], kernel.label[1]
    main = kernel.capability in (90, 86)
    return (not (main and dtype == "*bf16" and mask in MASKS[:2]), not (main and mask == "none"), dtype, not main, mask)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True, help="a line of JSON per kernel; goes on where it ends")
    parser.add_argument("--output", type=Path, required=True, help="the table, in Markdown")
    parser.add_argument("--table-only", action="store_true", help="compile nothing")
    given = parser.parse_args()
    planned = sorted(first_candidates(), key=_order)
    known = given.records.read_text().splitlines() if given.records.exists() else []
    records = {json.dumps(one["what"]): one for one in map(json.loads, known)}
    wanted = {json.dumps(record(kernel)): kernel for kernel in planned}
    for number, (what, kernel) in enumerate(wanted.items(), start=1):
        if what in records or given.table_only:
            continue
        one = {"what": json.loads(what), "found": compile_kernel(**asdict(kernel))}
        records[what] = one
        with given.records.open("a") as file:
            file.write(json.dumps(one) + "\n")
        print(f"{number}/{len(wanted)} {what}", file=sys.stderr)
    kept = [one["what"] | one["found"] for what, one in records.items() if what in wanted]
    given.output.write_text(table(kept, len(wanted)))


if __name__ == "__main__":
    main()
