"""Kernels compile for a GPU, without one: Triton's interpreter, which other tests use, accepts more than its compiler.

To add a kernel, add it to QUICK, in a shape that compiles within a few seconds, and to `choices` of
`benchmarks/compiled_kernels.py`: the table of `compilation.py` has its first launch settings.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import patchattn_kernels
from patchattn_kernels import decoding_triton
from patchattn_kernels.tuning import Launch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
PAGE = Path(__file__).parents[2] / "docs" / "results" / "kernels-compiled.md"
compilation = importlib.import_module("compilation")
compiled_kernels = importlib.import_module("compiled_kernels")
Kernel, routed, key_set, block_sparse = (
    *(compiled_kernels.Kernel, compiled_kernels.routed),
    *(compiled_kernels.key_set, compiled_kernels.block_sparse),
)


def routed_without_products() -> list[Any]:
    """The lists of pairs, and the parts of decoding put together."""
    few = Launch({}, num_warps=4)
    lists = {"gate": "*fp32", "pairs": "*i32", "starts": "*i32"}
    merged = dict.fromkeys(["parts", "sums", "gate", "lse"], "*fp32") | {"output": "*bf16"}
    return [
        Kernel("routed_pairs_triton.list_pairs", few, {"REPEATS": 4, "BLOCK": 2048}, lists, products=False),
        Kernel("routed_attention_triton._merge", few, {"SPLITS": 8, "VDIM": 80, "VPAD": 128}, merged, products=False),
    ]


SMALL = Launch({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2)
QUICK = {
    "routed_attention": [
        *(routed(part, 32, SMALL, mask="rows") for part in ("prefill", "queries", "decode")),
        *(routed("prefill", 32, SMALL), routed("keys", 32, SMALL, mask="all")),
        *routed_without_products(),
    ],
    "split_attention": [
        *(key_set(name, 32, SMALL, LISTED=True) for name in ("attention_kernel", "key_gradient_kernel")),
        key_set("column_mass_kernel", 32, SMALL, mask="rows"),
    ],
    "block_sparse_attention": [
        block_sparse(name, 32, SMALL, listed=listed)
        for name, listed in [("attend", False), ("attend", True), ("query_gradients", True), ("key_gradients", False)]
    ]
    + [block_sparse("attend", 32, Launch({"BLOCK_M": 16, "BLOCK_N": 32}), pack=4)],
}


def all_settings() -> list[Any]:
    """Every candidate of every kernel, for the compute capability that it is meant for."""
    return [
        build(dim, launch, capability=90)
        for build, launches in compiled_kernels.choices()
        for dim in (64, 80, 128, 256)
        for launch in launches(dim, compiled_kernels.DTYPES["*bf16"])
    ]


def compiled(kernels: list[Any]) -> list[dict[str, Any]]:
    """What `compile_kernel` says of each, in a fresh process.

    Where Triton interprets, it can no longer compile in the same process.
    """
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(kernel) for kernel in kernels]),
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernels: list[Any]) -> None:
    for kernel, found in zip(kernels, compiled(kernels), strict=True):
        assert found["shared"] <= compiled_kernels.SHARED[kernel.capability], kernel.id
        assert bool(found["products"]) == (kernel.products and kernel.types["query"] != "*fp32"), kernel.id
        assert not found["narrow"], (kernel.id, found["narrow"])


def settled(groups: list[list[Any]]) -> list[tuple[Any, dict[str, Any]]]:
    """The launch settings that a device settles on, of the candidates of each kernel, and what is found of them."""
    known: dict[str, dict[str, Any]] = {}
    while kernels := [one for options in groups if (one := compilation.unsettled(options, known)) is not None]:
        known |= {
            json.dumps(compilation.record(kernel)): found
            for kernel, found in zip(kernels, compiled(kernels), strict=True)
        }
    return [compilation.settled(options, known) for options in groups]


def check_settled(groups: list[list[Any]]) -> None:
    """Nothing that the table of compiled kernels would have in bold, but for what it lists."""
    kernels, found = zip(*settled(groups), strict=True)
    settings = [
        (kernel.label[0], kernel.types["query"], kernel.constants["DIM"], kernel.capability) for kernel in kernels
    ]
    unmasked = {
        which: one
        for which, kernel, one in zip(settings, kernels, found, strict=True)
        if kernel.label[1] == "all"
    }  # fmt: skip
    wrong = {
        kernel.id: faults
        for which, kernel, one in zip(settings, kernels, found, strict=True)
        if (faults := compilation.faults(one, unmasked.get(which), dtype=which[1], capability=which[3]))
    }
    known = compilation.accepted(PAGE.read_text(encoding="utf-8"))
    titles = {kernel.id: compilation.title(compilation.record(kernel)) for kernel in kernels}
    never = ("serialized", "no wgmma")
    assert not {
        titles[each]: faults for each, faults in wrong.items() if titles[each] not in known or {*faults} & {*never}
    }


def test_the_table_is_of_these_kernels_and_accepts_no_product_that_waits() -> None:
    page = PAGE.read_text(encoding="utf-8")
    kernels = compiled_kernels.candidates()
    done, planned = map(int, re.findall(r"(\d+) of (\d+) are compiled", page)[0])
    assert planned == len(kernels)
    cells = re.findall(r"\d+(?:, \d+ B)?, \d+ KiB, [\dx]+", page.split("## All")[1])
    assert len(cells) == done
    rows = len(kernels) // 2 // len(compiled_kernels.SHARED)  # of a dtype
    assert len(re.findall(r"\| bf16 \|(?:[^|]+\|){2}(?: \**\d[^|]*\|){4}", page)) == rows, "all of bf16 is compiled"
    on_two = r"\| fp32 \|(?:[^|]+\|){2}[^|]*\| \**\d[^|]*\|[^|]*\| \**\d[^|]*\|"
    assert len(re.findall(on_two, page)) == rows, "and all of fp32 for sm_86 and sm_90"
    settings = {compilation.title(compilation.record(kernel)) for options in kernels for kernel in options}
    known = compilation.accepted(page)
    assert known <= settings, "what is listed is no longer launched"
    assert len(known) == page.count("\n- ")


def test_devices_of_a_kind_need_the_same_shared_memory() -> None:
    """So that fp32, which is compiled in part for sm_80 and sm_89, fits there where it fits sm_86."""
    page = PAGE.read_text(encoding="utf-8")
    counts = re.findall(r"in (\d+) of the (\d+) (?:cells|with)", page)
    assert len(counts) == 2
    assert all(same == of for same, of in counts), counts
    for of_80, of_86, of_89 in zip(
        *(compiled_kernels.candidates(dtypes=["*fp32"], capabilities=[each]) for each in (80, 86, 89)), strict=True
    ):
        first, *others = ([kernel.launch for kernel in options] for options in (of_86, of_89, of_80))
        assert first == others[0]
        assert first == others[1][: len(first)]  # more fits sm_80


def test_alike_counts_pairs() -> None:
    row = {80: (9, 0, 48, "a"), 86: (8, 4, 48, "a"), 89: (8, 4, 48, "a")}
    text = compilation.alike(
        [row, row | {80: (9, 0, 48, "b")}, row | {80: (9, 0, 49, "a"), 89: (8, 0, 48, "a")}, {90: ()}]
    )
    assert re.findall(r"in (\d+) of the (\d+)", text) == [("2", "3"), ("1", "2")]


def test_products_that_wait_are_never_accepted() -> None:
    page = "\n- a, bf16: 70 bytes spilled\n- b, bf16: serialized, 70 bytes spilled\n- c: no wgmma\n## All\n- d: e\n"
    assert compilation.accepted(page) == {"a, bf16"}


def test_kernels_compile() -> None:
    check([kernel for kernels in QUICK.values() for kernel in kernels])


@pytest.mark.slow
def test_some_first_settings_are_as_they_should_be() -> None:
    """The largest and the smallest of shared memory, one head dim that is padded, the mask that costs most."""
    small = compiled_kernels.candidates(dims=[128], masks=["all"], dtypes=["*bf16"], capabilities=[86])
    large = compiled_kernels.candidates(dims=[80], masks=["all", "rows"], dtypes=["*bf16"], capabilities=[90])
    check_settled(small + large)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(
    ("capability", "dtype"), [*((each, "*bf16") for each in compiled_kernels.SHARED), (86, "*fp32"), (90, "*fp32")]
)
def test_all_first_settings_are_as_they_should_be(capability: int, dtype: str) -> None:
    check_settled(compiled_kernels.candidates(dtypes=[dtype], capabilities=[capability]))


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_all_launch_settings_compile() -> None:
    check(all_settings())


@pytest.mark.slow
def test_descriptors_are_compiled_beside_pointers() -> None:
    """As docs/performance.md has it."""
    script = Path(compilation.__file__).with_name("descriptors_triton.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [(row[2], row[-1].split()[1]) for row in rows] == [("pointers", "cp.async"), ("descriptors", "TMA")] * 5
    assert done.stdout.splitlines()[0] in (PAGE.parents[1] / "performance.md").read_text(encoding="utf-8")


GOOD = {"registers": 255, "spills": 64, "shared": 99 * 1024, "products": "wgmma", "serialized": False, "narrow": []}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, None),
        ({"serialized": True}, "serialized"),
        ({"spills": 65}, "spilled"),
        ({"shared": 99 * 1024 + 1}, "shared memory"),
        ({"products": "mma"}, "no wgmma"),
    ],
)
def test_what_is_not_as_it_should_be(change: dict[str, Any], word: str | None) -> None:
    found = compilation.faults(GOOD | change, GOOD, dtype="*bf16", capability=86)
    assert len(found) == (word is not None)
    assert word is None or word in found[0]


def test_table_says_what_is_missing_and_what_is_wrong() -> None:
    (kernel,) = [
        one
        for one in compiled_kernels.first_candidates([64], ["rows"], ["*bf16"], [90])
        if one.label[0] == "routed, prefill"
    ]
    text = compilation.table([compilation.record(kernel) | GOOD | {"spills": 1000}], planned=7)
    assert "1 of 7 are compiled" in text
    assert "routed, prefill, bf16, mask rows, D 64, sm_90, 128x64x8x3: 1000 bytes spilled" in text
    assert "| routed, prefill | bf16 | rows | 64 |  |  |  | **255, 1000 B, 99 KiB, 128x64x8x3** |" in text


@pytest.mark.parametrize(
    ("spills", "settles", "next_one"),
    [
        ([None, 0, 0], None, 0),
        ([64, 0, 0], 0, None),
        ([65, None, 0], 0, 1),
        ([65, 300, None], 0, 2),
        ([300, 66, 64], 2, None),
        ([300, 66, 70], 1, None),
    ],
)
def test_device_settles_on_the_first_that_does_not_spill_or_on_the_least(
    spills: list[int | None], settles: int | None, next_one: int | None
) -> None:
    (options,) = [
        one
        for one in compiled_kernels.candidates([64], ["rows"], ["*bf16"], [90])
        if one[0].label[0] == "routed, prefill"
    ]
    known = {
        json.dumps(compilation.record(kernel)): GOOD | {"spills": bytes_of}
        for kernel, bytes_of in zip(options, spills, strict=True)
        if bytes_of is not None
    }
    one, left = compilation.settled(options, known), compilation.unsettled(options, known)
    assert (None if one is None else options.index(one[0])) == settles
    assert (None if left is None else options.index(left)) == next_one


def test_no_kernel_with_products_is_missing_from_the_table() -> None:
    planned = {kernel.name for kernel in compiled_kernels.first_candidates([64], ["none"], ["*bf16"], [90])}
    used = {function for name in planned for function in compilation.sources_of(name)}
    code = "".join(file.read_text() for file in Path(patchattn_kernels.__file__).parent.glob("*_triton.py"))
    functions = re.findall(r"\ndef (\w+)\((.*?)(?=\n\n\n|\Z)", code, re.DOTALL)
    products = {name for name, body in functions if "tl.dot(" in body}
    assert len(products) >= 13
    assert products <= used


def test_records_of_other_code_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel, *_) = compiled_kernels.first_candidates([64], ["none"], ["*bf16"], [90])
    now = compilation.record(kernel)
    records, output = tmp_path / "records.jsonl", tmp_path / "table.md"
    lines = [{"what": what, "found": GOOD} for what in (now, now | {"code": "0" * 12}, now | {"triton": "3.0.0"})]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(
        sys, "argv", ["compilation", "--records", str(records), "--output", str(output), "--table-only"]
    )
    compilation.main()
    planned = len(compiled_kernels.first_candidates())
    assert f"1 of {planned} are compiled" in output.read_text()


def test_code_of_a_kernel_includes_what_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "decoding_triton.decode_kernel"
    before = compilation.code_of(name)
    monkeypatch.setattr(decoding_triton, "load_rows", decoding_triton.columns_of)
    compilation.code_of.cache_clear()
    other = compilation.code_of(name)
    monkeypatch.undo()
    compilation.code_of.cache_clear()
    assert other != before == compilation.code_of(name)


if __name__ == "__main__":
    for kernel in json.load(sys.stdin):
        print(json.dumps(compilation.compile_kernel(**kernel)), flush=True)
