"""Which kernels `compilation.py` compiles, and with which launch settings."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from patchattn_kernels import (
    block_sparse_attention_backward_triton,
    block_sparse_attention_triton,
    column_mass_few_triton,
    column_mass_triton,
    decoding_triton,
    routed_pairs_triton,
    split_attention_backward_triton,
    split_attention_keys_triton,
    split_attention_triton,
)
from patchattn_kernels.tuning import Launch, fitting, tile_width, tile_widths

KIB = 1024
SHARED = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB}  # that a program may have, by compute capability
ROWS = (16, 32, 64)  # of the tiles that decode: queries times query heads of a kv head
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
    width, rest = tile_widths(dim) if part == "prefill" else (tile_width(dim), 0)
    module = "routed_attention_backward_triton" if part in ("queries", "keys") else "routed_attention_triton"
    floats = ["gate", "lse", "delta", "gate_gradient", "parts", "sums"]
    states = ["query", "key", "value", "output", "upstream", "query_gradient", "key_gradient", "value_gradient"]
    constants = {"REPEATS": 4, "DIM": dim, "PAD": width, "VDIM": dim, "VPAD": width, "REST": rest, "VREST": rest}
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
    listed: bool = False, sinks: bool = False, pack: int = 1,
) -> Kernel:  # fmt: skip
    """A kernel of `block_sparse_attention`; masks as of `routed`; of blocks of 128, or of windows; heads of a tile."""
    block, width = 128 if listed else 0, tile_width(dim)
    constants: dict[str, Any] = {"DIM": dim, "PAD": width, "VDIM": dim, "VPAD": width}
    constants |= {"CAUSAL": mask not in ("rows", "all"), "WINDOWED": mask == "window"}
    constants |= {"BLOCK_Q": block, "BLOCK_K": block, "LISTED": listed}
    constants |= {"MASKED": mask in ("keys", "rows"), "PER_ROW": mask == "rows", "SINKS": sinks}
    constants |= {"PADDED": mask in ("keys", "rows") and not listed, "ADDED": not listed and not sinks}
    rows = block_sparse_attention_triton.rows_of_tile(launch.blocks["BLOCK_M"], block, pack)
    constants |= {"PACK": pack, "ROWS": rows}
    states = ["query", "key", "value", "gradient", "output", "result", "key_result", "value_result"]
    types = dict.fromkeys(states, dtype) | dict.fromkeys(["lse", "power", "delta", "key_part", "value_part"], "*fp32")
    types |= dict.fromkeys(["first", "second", "order", "places"], "*i32")
    types |= {"mask": "*i1", "scale": "fp32", "scaling": "fp32"}
    strides = [f"{name}_{axis}" for name in "qkvgor" for axis in ("batch", "head", "row")]
    few = " few rows" if launch.blocks["BLOCK_M"] == 16 and name == "attend" else ""
    keep = "lists" if listed else "of sinks" if sinks else "windows"
    label = f"sparse, {name.replace('_', ' ')}{few}, {keep}{', packed' if pack > 1 else ''}"
    module = BLOCK_SPARSE[name].__name__.split(".")[-1]
    return Kernel(f"{module}.{name}", launch, constants, types, strides, capability, label=(label, mask))


def decoding(
    rows: int, dim: int, launch: Launch, *, dtype: str = "*bf16", mask: str = "none", capability: int = 90,
    page: int = 0, output: bool = True, split: bool = True,
) -> Kernel:  # fmt: skip
    """The kernel that decodes, over pages of some size or (0) all keys; masks as of `routed`."""
    launch = Launch({"BLOCK_M": rows, **launch.blocks}, launch.num_warps, launch.num_stages)
    like = key_set("attention_kernel", dim, launch, dtype=dtype, mask=mask, OUTPUT=output)
    constants = {**like.constants, "GROUP": 4, "PAGE": page or 1, "PAGED": page > 0, "SPLIT": split}
    types = {**like.types, **dict.fromkeys(["totals", "masses", "tops"], "*fp32")}
    types |= dict.fromkeys(["pages", "counts"], "*i32") | {"output": dtype if page else "*fp32"}
    what = f"pages of {page}" if page else "attention" if output else "log-sum-exp"
    label = (f"decoding, {what}, {rows} rows{'' if split else ', unsplit'}", mask)
    name = "decoding_triton.decode_kernel"
    return Kernel(name, launch, constants, types, like.multiples, capability, label=label)


def few_queries(
    dim: int, launch: Launch, *, dtype: str = "*bf16", mask: str = "none", capability: int = 90, padded: bool = False
) -> Kernel:
    """The kernel of `column_mass` of few queries; masks as of `routed`."""
    like = key_set("column_mass_kernel", dim, launch, dtype=dtype, mask=mask, PADDED=padded)
    label = (f"decoding, column mass{' padded' if padded else ''}", mask)
    name = "column_mass_few_triton.column_mass_few_kernel"
    constants = {**like.constants, "HEADS": 4}
    return Kernel(name, launch, constants, like.types, like.multiples, capability, label=label)


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
        for few, pack in ((False, 1), (True, 1), (True, 4)):

            def sparse(dim: int, dtype: torch.dtype, per_row: bool = False, few: bool = few) -> Sequence[Launch]:
                return forward(dim, dtype, few, per_row)

            yield of(block_sparse, "attend", listed=listed, pack=pack), sparse
        yield of(block_sparse, "query_gradients", listed=listed), backward
        yield of(block_sparse, "key_gradients", listed=listed), backward
    yield of(block_sparse, "key_gradients", sinks=True), backward
    for rows in ROWS:

        def few_rows(dim: int, dtype: torch.dtype, rows: int = rows) -> Sequence[Launch]:
            return decoding_triton.launches(dtype, dim, rows)

        yield of(decoding, rows), few_rows
        yield of(decoding, rows, output=False), few_rows
        yield of(decoding, rows, page=16), few_rows
    yield of(decoding, ROWS[0], split=False), partial(few_rows, rows=ROWS[0])
    for padded in (False, True):
        yield partial(few_queries, padded=padded), lambda dim, dtype: column_mass_few_triton.launches(dtype, dim)


def _for_mask(launches: Callable[..., Sequence[Launch]], dim: int, dtype: str, mask: str) -> Sequence[Launch]:
    """Some kernels have settings of their own for masks with a row per query."""
    own = "per_row" in inspect.signature(launches).parameters
    return launches(dim, DTYPES[dtype], **({"per_row": mask == "rows"} if own else {}))


def candidates(
    dims: Iterable[int] = DIMS,
    masks: Iterable[str] = MASKS,
    dtypes: Iterable[str] = ("*bf16", "*fp32"),
    capabilities: Iterable[int] = tuple(SHARED),
) -> list[list[Kernel]]:
    """Every kernel with the launch settings that a device would try, in their order."""
    return [
        [
            build(dim, launch, dtype=dtype, mask=mask, capability=capability)
            for launch in fitting(_for_mask(launches, dim, dtype, mask), capability // 10, SHARED[capability])
        ]
        for dtype in dtypes for capability in capabilities for mask in masks for dim in dims
        for build, launches in choices()
    ]  # fmt: skip


def first_candidates(*which: Any, **named: Any) -> list[Kernel]:
    """Every kernel as a device would launch it first; arguments as of `candidates`."""
    return [first for first, *_ in candidates(*which, **named)]
