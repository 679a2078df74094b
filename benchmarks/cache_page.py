"""The page of `caches.py`: its rows as tables, and the goals beside what was measured."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from patchattn.evaluation.report.report import markdown_table

Row = Mapping[str, Any]
NOT_YET = "not measured yet"


def written(rows: Mapping[str, Row]) -> str:
    """The whole page."""
    parts = ["# What caches that forget save", "", *_intro(rows), "## Goals", "", *goals(rows)]
    for title, kind, lines in (
        ("Memory", "memory", memory_table(rows)),
        ("Decoding", "decode", decode_table(rows)),
        ("Deciding what to keep", "prefill", prefill_table(rows)),
    ):
        about = sorted({row["about"] for key, row in rows.items() if key.startswith(f"{kind}/")})
        parts += ["", f"## {title}", "", *(lines if about else [f"{NOT_YET.capitalize()}."]), "", *about]
    return "\n".join(parts).rstrip() + "\n"


def _intro(rows: Mapping[str, Row]) -> list[str]:
    return [
        "`python benchmarks/caches.py memory DIR`, `decode DIR`, `prefill DIR`, then `page`; rows in "
        "`docs/results/caches/cost.jsonl`. Batch 1; 25 % of the keys stay, under ThinK half of the bytes, which "
        "is its floor; `2k` is a budget of 2,048 keys, `duo half` lets half of the kv heads stream (64 and 256 keys). "
        "`buffered` keeps everything and appends in place; plain transformers copies its cache at every token. Caches "
        "hold random keys up to a text's last 64 tokens; those of `h2o` and `expected_attention`, which need every "
        "query, come from a forward whose attention and feed-forward layers give zero. Gates are random. Peaks are of "
        "the cache and what a decoding step makes besides. The formula counts keys, values, spare places and what says "
        "which keys they are; it asks the cache for the longest head under `adakv` and the layers' shares under "
        "`pyramidkv`, which scores and the text decide.",
        "",
    ]


def times_faster(row: Row) -> tuple[float, float, float]:
    """Quartiles of plain transformers over a method, turn by turn."""
    ratios = [plain / own for own, plain in zip(row["ms"], row["plain_ms"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def goals(rows: Mapping[str, Row]) -> list[str]:
    """Every goal, what was measured, and whether it is met."""
    found = []
    apart = {key: abs(row["bytes"] / row["formula"] - 1.0) for key, row in rows.items() if key.startswith("memory/")}
    worst = max(apart.values(), default=None)
    found.append(_goal("bytes beside the formula, largest difference", "at most 5 %", worst, 0.05, "{:.1%}"))
    for name in ("streaming_llm 2k", "snapkv 2k", "knorm 2k"):
        faster = _faster(rows, f"decode/16384/{name}")
        found.append(_goal(f"{name}, 16k: decoding over plain", "at least 2.5", faster, 2.5, "{:.2f}", least=True))
    faster = _faster(rows, "decode/16384/duo half")
    found.append(_goal("duo half, 16k: decoding over plain", "at least 1.7", faster, 1.7, "{:.2f}", least=True))
    half = rows.get("memory/16384/duo half")
    share = None if half is None else half["bytes"] / half["dense"]
    found.append(_goal("duo half, 16k: bytes of dense", "at most 0.56", share, 0.56, "{:.3f}"))
    for key, row in rows.items():
        kind, length, name = key.split("/")
        if kind == "prefill" and name != "h2o":
            spent = statistics.median(row["shares"])
            found.append(_goal(f"{name}: deciding, of a prompt of {length}", "at most 5 %", spent, 0.05, "{:.2%}"))
    return markdown_table(["what", "goal", "measured", ""], found, texts=2)


def _faster(rows: Mapping[str, Row], key: str) -> float | None:
    return times_faster(rows[key])[1] if key in rows else None


def _goal(what: str, goal: str, value: float | None, bound: float, form: str, *, least: bool = False) -> Sequence[str]:
    if value is None:
        return [what, goal, NOT_YET, ""]
    met = value >= bound if least else value <= bound
    return [what, goal, form.format(value), "met" if met else "**missed**"]


def memory_table(rows: Mapping[str, Row]) -> list[str]:
    lines = []
    for key, row in rows.items():
        kind, length, name = key.split("/")
        if kind == "memory":
            figures = [f"{row[what] / 2**20:.1f}" for what in ("bytes", "formula")]
            apart = f"{row['bytes'] / row['formula'] - 1.0:+.2%}"
            lines.append([length, name, *figures, apart, f"{row['bytes'] / row['dense']:.3f}"])
    lines.sort(key=lambda line: int(line[0]))
    return markdown_table(["tokens", "method", "MiB", "formula, MiB", "apart", "of dense"], lines, texts=2)


def decode_table(rows: Mapping[str, Row]) -> list[str]:
    lines = []
    for key, row in sorted(rows.items(), key=lambda item: int(item[0].split("/")[1])):
        kind, length, name = key.split("/")
        if kind == "decode":
            low, middle, high = times_faster(row)
            own, plain = (statistics.median(row[what]) for what in ("ms", "plain_ms"))
            buffered = rows.get(f"decode/{length}/buffered")
            beside = "" if buffered is None else f"{statistics.median(buffered['ms']) / own:.2f}"
            faster = f"**{middle:.2f}** ({low:.2f} to {high:.2f})"
            peaks = [f"{row[what] / 2**20:.1f}" for what in ("peak", "plain_peak")]
            lines.append([length, name, f"{plain:.1f}", f"{own:.1f}", f"{1e3 / own:.1f}", faster, beside, *peaks])
    head = ["tokens", "method", "plain, ms", "ms", "tokens/s", "over plain", "over buffered"]
    return markdown_table([*head, "peak, MiB", "plain peak, MiB"], lines, texts=2)


def prefill_table(rows: Mapping[str, Row]) -> list[str]:
    lines = []
    for key, row in rows.items():
        kind, length, name = key.split("/")
        if kind == "prefill":
            own, whole = (statistics.median(each) for each in zip(*row["seconds"], strict=True))
            share = f"{100 * statistics.median(row['shares']):.2f} %"
            lines.append([length, name, f"{whole:.2f}", f"{1e3 * own:.1f}", share])
    return markdown_table(["tokens", "method", "prompt, s", "deciding, ms", "of the rest"], lines, texts=2)
