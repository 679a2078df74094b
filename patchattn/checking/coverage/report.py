"""The sweep as a page: counts, then a table with a row per model type."""

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import transformers

from .checks import Findings
from .sweep import Row, Status

COMMAND = "patchattn coverage --markdown docs/coverage.md"

_MEANING: dict[Status, str] = {
    "patchable": "a small model with random weights ran unpatched and patched, and every check below held",
    "failed": "it ran, and a check did not hold",
    "refused": "every variant raises NotImplementedError, nearly always from `patch_model`, which leaves the model as "
    "it was",
    "structure only": "attention sites were found in the model without weights (meta build), but no small one ran: "
    "the sweep found no configuration or inputs; nothing is claimed",
    "not built": "no model could be built here",
    "no attention": "no attention module at all",
}


def current_versions() -> dict[str, str]:
    """What a sweep's result depends on, and when it was made."""
    today = datetime.date.today().isoformat()
    return {"transformers": transformers.__version__, "torch": torch.__version__, "date": today}


def to_markdown(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """The page.

    Args:
        rows: of `sweep`.
        versions: name to version of what it was run with, and the date; see `current_versions`.
    """
    counts = Counter(row.status for row in rows)
    ran = [row.findings for row in rows if row.findings is not None]
    exact = sum(findings.neutral_difference == 0 for findings in ran)
    lines = [
        "# Coverage",
        "",
        f"Every model type of the installed transformers, by `{COMMAND}`.",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
        "| status | types | meaning |",
        "|---|---|---|",
        *(f"| {status} | {counts[status]} | {meaning} |" for status, meaning in _MEANING.items()),
        f"| all | {len(rows)} | |",
        "",
        f"Of {len(ran)} types that ran, {exact} are equal to the unpatched model to the last bit under the neutral "
        "configuration of every variant that takes them. Dropping half of the heads (MoH) changes the output in "
        f"{_count(ran, 'half_the_heads')} (a single head has no half). MoH's learned router runs in "
        f"{_count(ran, 'learned_router')} and SSA with random parameters in {_count(ran, 'ssa')}; what does not run "
        "there is refused with NotImplementedError, named in the table. Taking a head out of the weights "
        f"gives what masking it gives in {sum(found.pruning.startswith('exact') for found in ran)}. Unpatching "
        "restores output, state dict, configuration and hooks.",
        "",
        "A type counts as it ran: *reached* says how many attention sites of the small model its forward went through, "
        "or that of its parts, called alone, where the guessed inputs did not lead to all of them. *Geometry* compares "
        "query heads, kv heads, head dim and input width as stated with the shapes of the call. *Sites* are those of "
        "the default configuration, self + cross. *Gate* says how variants come in: by the `registry` that attention "
        "functions are looked up in, or into the `own code` of modules that compute attention themselves, which is "
        "followed while it runs; attention that is computed again from what variants see there is the model's own "
        "(1e-5).",
        "",
        "| model type | class | status | sites | gate | reached | geometry | neutral | half | learned | ssa "
        "| pruned | reason |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in rows if row.status != "no attention"]
    without = [row.model_type for row in rows if row.status == "no attention"]
    lines += ["", "Without attention: " + (", ".join(without) or "none") + "."]
    return "\n".join(lines) + "\n"


def patchable_types(markdown: str) -> set[str]:
    """The patchable model types that a page lists."""
    cells = [[cell.strip() for cell in line.split(" | ")] for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0].removeprefix("| ") for row in cells if len(row) > 3 and row[2] == "patchable"}


def _count(ran: Sequence[Findings], name: str) -> int:
    return sum(getattr(findings, name) == "runs" for findings in ran)


def _line(row: Row) -> str:
    found = row.findings
    sites = f"{row.self_sites} + {row.cross_sites}" if row.self_sites or row.cross_sites else ""
    cells = [row.model_type, row.model_class, row.status, sites, row.gate]
    if found is None:
        cells += [""] * 7 + [row.reason]
    else:
        difference = found.neutral_difference
        variants = (found.half_the_heads, found.learned_router, found.ssa, found.pruning)
        remarks = dict.fromkeys([row.reason, *(v for v in variants if "refused: " in v)])
        if found.geometry != "right":
            remarks = dict.fromkeys([*remarks, found.geometry])
        cells += [
            f"{found.reached} of {row.ran_sites}" + ("" if found.whole_model else ", parts"),
            "right" if found.geometry == "right" else "see reason",
            "" if difference is None else f"{difference:.0e}" if difference else "0",
            *(value.partition(":")[0] for value in variants),
            "; ".join(filter(None, remarks)),
        ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
