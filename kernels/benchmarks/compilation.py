"""What Triton's kernels need of a GPU: registers, spills and shared memory, compiled ahead of time without one.

    python kernels/benchmarks/compilation.py --records compiled.jsonl --output docs/results/kernels-compiled.md

compiles every kernel with the launch settings that a device settles on, for every head dim, dtype and kind of mask, and
writes a table: the first that spill no more than 64 bytes a thread, or those that spill least, as `tuning.run_chosen`
takes them. What `--records` holds already is not compiled again, so that a run that is cut off goes on.
"""

import argparse
import contextlib
import datetime
import functools
import hashlib
import importlib
import inspect
import io
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from compiled_kernels import KIB, MASKS, SHARED, Kernel, candidates
from triton import language as tl

from patchattn_kernels.tuning import SPILLS

Found = dict[str, Any]


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
    options = {"num_warps": launch["num_warps"], "num_stages": launch["num_stages"]}
    result, log = assembled(
        ASTSource(fn=source, signature=signature, constexprs=constants, attrs=attributes), kernel["capability"], options
    )
    code = result.asm["ptx"]
    return {
        **needs(result, log),
        "products": "wgmma" if "wgmma.mma_async" in code else "mma" if "mma.sync" in code else "",
        "serialized": "serialized" in log,
        "narrow": narrow_strides(result.asm["ttir"]),
    }


def assembled(source: Any, capability: int, options: dict[str, int]) -> tuple[Any, str]:
    """What Triton makes of a function for a GPU, and what ptxas logs meanwhile.

    Args:
        source: an `ASTSource` of Triton.
        capability: of the GPU.
        options: warps and stages.
    """
    from triton.backends.compiler import GPUTarget

    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return result, log.getvalue()


def needs(result: Any, log: str) -> dict[str, Any]:
    """Registers of a thread, spills in bytes a thread, shared memory in bytes; arguments are what `assembled` gives."""
    registers, spills = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    if registers is None or spills is None:
        raise RuntimeError(f"Expected registers and spills in the log of ptxas, got {log!r}.")
    return {"registers": int(registers[1]), "spills": int(spills[1]), "shared": result.metadata.shared}


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


def sources_of(name: str) -> dict[str, str]:
    """Sources of a kernel and of the functions and constants that it uses, by name; `name` as of `Kernel`."""
    module, function = name.split(".")
    found, left = {}, [getattr(importlib.import_module(f"patchattn_kernels.{module}"), function).fn]
    while left:
        one = left.pop()
        found[one.__qualname__] = inspect.getsource(one)
        for used in one.__code__.co_names:
            value = one.__globals__.get(used)
            if isinstance(value, tl.constexpr):
                found[used] = repr(value.value)
            elif used not in found and hasattr(value, "fn"):
                left.append(value.fn)
    return found


@functools.cache
def code_of(name: str) -> str:
    """A digest of `sources_of`."""
    return hashlib.sha256(json.dumps(sources_of(name), sort_keys=True).encode()).hexdigest()[:12]


def record(kernel: Kernel) -> dict[str, Any]:
    """What is compiled, and by what: once the kernel's code or Triton is another, so is the record."""
    label, mask = kernel.label
    launch = "x".join(map(str, [*kernel.launch.blocks.values(), kernel.launch.num_warps, kernel.launch.num_stages]))
    return {
        "kernel": label, "mask": mask, "dtype": kernel.types["query"], "dim": kernel.constants["DIM"],
        "capability": kernel.capability, "launch": launch, "code": code_of(kernel.name), "triton": triton.__version__,
    }  # fmt: skip


def title(one: dict[str, Any]) -> str:
    """What of a `record` stands in the table's list of what is not as it should be."""
    what = f"{one['kernel']}, {one['dtype'][1:]}, mask {one['mask']}, D {one['dim']}"
    return f"{what}, sm_{one['capability']}, {one['launch']}"


def accepted(page: str) -> set[str]:
    """Titles of a table whose spills and shared memory are known of; other faults never are.

    Settings whose tiles do not fit fall to smaller ones when they are launched, and what spills is slow but right.
    """
    faulty = re.findall(r"^- (.*?): (.*)$", page.split("## All")[0], re.MULTILINE)
    return {what for what, faults in faulty if "serialized" not in faults and "wgmma" not in faults}


def table(records: list[dict[str, Any]], planned: int) -> str:
    """Markdown: a row per kernel, dtype, mask and head dim, a column per compute capability."""
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
                wrong.append(f"- {title(one)}: {', '.join(faulty)}")
        lines.append(f"| {kernel} | {dtype[1:]} | {MASKS[mask]} | {dim} | {' | '.join(cells)} |")
    assembler = re.search(r"V(\d[\d.]*)", get_ptxas_version())
    versions = f"Triton {triton.__version__}, ptxas {assembler[1] if assembler else '?'}, torch {torch.__version__}"
    command = "python kernels/benchmarks/compilation.py --records compiled.jsonl --output kernels-compiled.md"
    return f"""# Kernels, compiled

{datetime.date.today().isoformat()}, {versions}. `{command}`

Triton's kernels compiled ahead of time with the launch settings that a device settles on: the first that spill no more
than {SPILLS} bytes, or of those that are compiled the ones that spill least. No GPU ran them: this says what they need,
and not how fast they are. {len(records)} of {planned} are compiled; an empty cell is one that is not.
{alike([{capability: figures(one) for capability, one in found.items()} for found in rows.values()])}

A cell: registers of a thread, bytes that it spills where there are any, shared memory of a program, and BLOCK_M,
BLOCK_N, warps and stages. Masks: `none` is causal without any, `all` sees all keys, `window` is causal, `keys` has one
row for all queries, `rows` one for each. In bold is what is not as it should be: products that wait for each other
(`serialized`), more than {SPILLS} bytes of spills in half precision, more shared memory than there is, or no wgmma
where the kernel has it without a mask.

## Not as it should be

{summary(wrong)}

{chr(10).join(wrong) or "Nothing."}

## All

| kernel | dtype | mask | D | {" | ".join(f"sm_{capability}" for capability in capabilities)} |
|---|---|---|---|{"---|" * len(capabilities)}
{chr(10).join(lines)}
"""


def figures(one: Found) -> tuple[Any, ...]:
    """Of a cell: registers, spills, shared memory, launch settings."""
    return one["registers"], one["spills"], round(one["shared"] / KIB), one["launch"]


def alike(rows: list[dict[int, tuple[Any, ...]]]) -> str:
    """How far the devices of compute capability 8 need the same, so that one tells of another; of `figures`."""
    both = [row for row in rows if {86, 89} <= row.keys()]
    older = [row for row in rows if {80, 86} <= row.keys() and row[80][3] == row[86][3]]
    same = sum(row[86] == row[89] for row in both), sum(row[80][2] == row[86][2] for row in older)
    return (
        f"sm_89 needs what sm_86 does in {same[0]} of the {len(both)} cells that are compiled for both; sm_80 needs as "
        f"much\nshared memory as sm_86 in {same[1]} of the {len(older)} with the same settings."
    )


def summary(wrong: list[str]) -> str:
    """How many there are of each fault."""
    kinds = {
        "products that wait": "serialized",
        "missing wgmma": "no wgmma",
        "spills": "bytes spilled",
        "shared memory": "bytes of shared memory",
    }
    counts = [f"{sum(word in line for line in wrong)} with {kind}" for kind, word in kinds.items()]
    return (
        f"Of those that are compiled: {', '.join(counts)}.\nTiles that do not fit are halved when they are launched; "
        "what spills is slower, and not wrong. The slow tests, which\ncompile all in bf16, and in fp32 for sm_86 and "
        "sm_90, fail on any fault that is not listed here."
    )


def settled(options: list[Kernel], compiled: dict[str, Found]) -> tuple[Kernel, Found] | None:
    """The launch settings that a device settles on, as far as they are compiled, and what was found of them.

    Args:
        options: one of `candidates`.
        compiled: what `compile_kernel` says, by `record` in JSON.
    """
    least: tuple[Kernel, Found] | None = None
    for kernel in options:
        found = compiled.get(json.dumps(record(kernel)))
        if found is None:
            break
        if least is None or _worth(found, kernel) < _worth(least[1], least[0]):
            least = kernel, found
        if found["spills"] <= SPILLS and found["shared"] <= SHARED[kernel.capability]:
            break
    return least


def _worth(found: Found, kernel: Kernel) -> tuple[bool, int]:
    return found["shared"] > SHARED[kernel.capability], max(SPILLS, found["spills"])


def unsettled(options: list[Kernel], compiled: dict[str, Found]) -> Kernel | None:
    """Which launch settings must be compiled to know on which ones a device settles."""
    for kernel in options:
        found = compiled.get(json.dumps(record(kernel)))
        if found is None:
            return kernel
        if found["spills"] <= SPILLS and found["shared"] <= SHARED[kernel.capability]:
            return None
    return None


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
    planned = sorted(candidates(), key=lambda options: _order(options[0]))
    known = given.records.read_text().splitlines() if given.records.exists() else []
    records = {json.dumps(one["what"]): one["found"] for one in map(json.loads, known)}
    for number, options in enumerate([] if given.table_only else planned, start=1):
        while (kernel := unsettled(options, records)) is not None:
            what = record(kernel)
            found = records[json.dumps(what)] = compile_kernel(**asdict(kernel))
            with given.records.open("a") as file:
                file.write(json.dumps({"what": what, "found": found}) + "\n")
            print(f"{number}/{len(planned)} {what}", file=sys.stderr)
    kept = [record(one[0]) | one[1] for options in planned if (one := settled(options, records)) is not None]
    given.output.write_text(table(kept, len(planned)))


if __name__ == "__main__":
    main()
