"""Rows of `recall.py`, and the part of a page on them."""

from pathlib import Path

from paired_rows import paired, read_rows
from scipy import stats

from patchattn.evaluation.report.report import markdown_table

NAME = "recall.jsonl"
READ = 12  # keys that each method reads


def lines(folder: Path) -> list[str]:
    """Of every method: right answers and their difference to dense, over seeds."""
    rows = read_rows(folder / NAME)
    if not rows:
        return []
    found: dict[str, dict[tuple[int, int], float]] = {}
    for key, row in rows.items():
        name, seed, steps = key.split("/")
        found.setdefault(name, {})[int(seed), int(steps)] = row["right"]
    table, claims = [], []
    for name, own in found.items():
        shared = sorted(set(own) & set(found.get("dense", {})))
        values = [own[seed] for seed in shared]
        cells = [f"{sum(values) / len(values):.1f}" if values else "", f"{min(values):.1f}" if values else "", ""]
        if name != "dense" and len(shared) > 1:
            difference, error = paired(values, [found["dense"][seed] for seed in shared])
            cells[2] = f"{difference:+.1f} ± {error:.1f}"
            if name != "streaming":
                size = f"{cells[2]} points, {len(shared)} seeds"
                around = float(stats.t.ppf(0.975, len(shared) - 1)) * error
                said = "shown" if difference - around > -1.0 else "not shown"
                if difference + around < -1.0:
                    said = "not shown, the opposite is"
                claims.append(
                    f"- `{name}`, trained from the start, recalls as dense attention does: **{said}** ({size})."
                )
        table.append([name, *cells, str(len(shared))])
    steps = ", ".join(sorted({key.split("/")[2] for key in rows}))
    return [
        "## Trained from the start",
        "",
        "`python benchmarks/recall.py --folder docs/results/selection`: a Llama of two layers and eight heads, patched "
        f"before its first step, learns associative recall in {steps} steps: eight pairs, then every key again in "
        f"another order, to be answered with its value; 32 tokens. Each method reads at most {READ} keys; streaming, "
        "the first one and the last ones, is what cannot do it. Start and batches of a seed are the same for all; "
        "right answers in percent of 8192 new questions, the mean and the worst of the seeds. As dense is called what "
        "loses less than one point by its 95 % interval.",
        "",
        *claims,
        "",
        *markdown_table(["method", "right, %", "worst seed", "minus dense", "seeds"], table, texts=1),
    ]
