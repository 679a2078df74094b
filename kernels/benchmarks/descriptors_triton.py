"""What tensor descriptors (TMA) of keys and values would change in the code of a kernel for sm_90.

    python kernels/benchmarks/descriptors_triton.py

compiles causal flash attention of one head twice for each of a few launch settings, as pointers load keys and values
and as descriptors do, and prints a table. Nothing runs.
"""

# mypy: disable-error-code="no-untyped-def"
import re
from typing import Any

import triton
import triton.language as tl
from compilation import assembled, needs

# head dim, BLOCK_M, BLOCK_N, warps, stages: prefills, then decoding
SETTINGS = [(64, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 128, 8, 2), (64, 16, 128, 4, 3), (128, 16, 64, 4, 3)]


@triton.jit
def attend(
    query, key, value, output, tokens, row, scale,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """A tile of queries over the keys up to them."""
    first = tl.program_id(0) * BLOCK_M
    rows, dims = first + tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    places = rows.to(tl.int64)[:, None] * row + dims[None, :]
    some = tl.load(query + places, mask=(rows < tokens)[:, None], other=0.0)
    described_key, described_value = key, value
    if DESCRIBED:
        described_key = tl.make_tensor_descriptor(key, [tokens, DIM], [row, 1], [BLOCK_N, DIM])
        described_value = tl.make_tensor_descriptor(value, [tokens, DIM], [row, 1], [BLOCK_N, DIM])
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for begin in range(0, tl.minimum(first + BLOCK_M, tokens), BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        steps = columns.to(tl.int64)[:, None] * row + dims[None, :]
        inside = (columns < tokens)[:, None]
        tile = described_key.load([begin, 0]) if DESCRIBED else tl.load(key + steps, mask=inside, other=0.0)
        logits = tl.dot(some, tl.trans(tile)) * scale
        logits = tl.where(columns[None, :] <= rows[:, None], logits, float("-inf"))
        peak = tl.maximum(top, tl.max(logits, axis=1))
        weights, shrink = tl.exp2(logits - peak[:, None]), tl.exp2(top - peak)
        total = total * shrink + tl.sum(weights, axis=1)
        tile = described_value.load([begin, 0]) if DESCRIBED else tl.load(value + steps, mask=inside, other=0.0)
        acc = tl.dot(weights.to(tile.dtype), tile, acc * shrink[:, None])
        top = peak
    tl.store(output + places, (acc / total[:, None]).to(output.dtype.element_ty), mask=(rows < tokens)[:, None])


def compiled(dim: int, block_m: int, block_n: int, warps: int, stages: int, *, described: bool) -> dict[str, Any]:
    """Registers, spills, shared memory, and how many copies from global to shared memory there are of either kind."""
    from triton.compiler import ASTSource

    constants = {"DIM": dim, "BLOCK_M": block_m, "BLOCK_N": block_n, "DESCRIBED": described}
    types = dict.fromkeys(["query", "key", "value", "output"], "*bf16") | {"scale": "fp32"}
    names = attend.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in (*types, "row")}
    aligned.pop((names.index("scale"),))
    source = ASTSource(fn=attend, signature=signature, constexprs=constants, attrs=aligned)
    result, log = assembled(source, 90, {"num_warps": warps, "num_stages": stages})
    copies = {"cp.async": r"cp\.async\.c[ag]", "TMA": r"cp\.async\.bulk\.tensor"}
    return needs(result, log) | {name: len(re.findall(code, result.asm["ptx"])) for name, code in copies.items()}


def main() -> None:
    """Print the table."""
    print("| D | tile, warps, stages | keys and values by | registers | spills, B | shared, KiB | copies in code |")
    print("|---|---|---|---|---|---|---|")
    for setting in SETTINGS:
        for described in (False, True):
            found = compiled(*setting, described=described)
            copies = ", ".join(f"{found[kind]} {kind}" for kind in ("cp.async", "TMA") if found[kind])
            what = f"| {setting[0]} | {'x'.join(map(str, setting[1:]))} | {('pointers', 'descriptors')[described]} |"
            print(what, f"{found['registers']} | {found['spills']} | {found['shared'] / 1024:.0f} | {copies} |")


if __name__ == "__main__":
    main()
