"""The report of `patchattn eval`: scores and costs of a model without patches and with them, side by side."""

import base64
import io
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...core.selection import base_model
from ...files.documents import quoted, read_json
from ...version import __version__
from ..tasks.cost import cuda_devices, memory_kind
from ..tasks.task import EvalTask, Row
from .errors import standard_error
from .report_figures import COSTS, plot_costs, plot_scores

SCHEMA_VERSION = 1
UNPATCHED = "unpatched"
REPORT = "report.json"
_MEMORY = {
    "cuda_allocated": "Peak memory is that of tensors allocated on the GPUs, weights included.",
    "process_resident": "Peak memory is the resident size of the whole process.",
    None: "Peak memory cannot be measured here.",
}


def summary(task: EvalTask, batches: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Scores and costs of a task from the rows of all batches.

    Args:
        task: that gave the rows.
        batches: rows of each batch, in the order of the samples.

    Returns:
        `scores`, as the task names them, None where one is not a number, and `costs`: `prompt_tokens` and `new_tokens`
        (mean of the samples), `first_token_seconds` (median of the batches), `tokens_per_second` (all tokens but the
        first ones, over the time after those), `samples_per_second`, `peak_memory` in bytes, and `cache_ratio` (bytes
        of kv caches for each byte of keys and values of all tokens). What rows do not hold is left out.
    """
    rows = [row for batch in batches for row in batch]
    scores = {name: value if math.isfinite(value) else None for name, value in task.score(rows).items()}
    timed = [batch for batch in batches if batch[0].get("seconds")]
    first = [batch for batch in timed if batch[0].get("first_token_seconds") is not None]
    later = sum(max(row.get("new_tokens", 0) - 1, 0) for batch in first for row in batch)
    decoding = sum(batch[0]["seconds"] - batch[0]["first_token_seconds"] for batch in first)
    memory = [batch[0]["peak_memory"] for batch in batches if batch[0].get("peak_memory") is not None]
    cached = [batch[0] for batch in batches if batch[0].get("cache_dense_bytes")]
    dense = sum(row["cache_dense_bytes"] for row in cached)
    costs = {
        **{
            key: statistics.mean(row[key] for row in rows)
            for key in ("prompt_tokens", "new_tokens")
            if all(row.get(key) is not None for row in rows)
        },
        "first_token_seconds": statistics.median(batch[0]["first_token_seconds"] for batch in first) if first else None,
        "tokens_per_second": later / decoding if later and decoding > 0 else None,
        "samples_per_second": sum(map(len, timed)) / sum(batch[0]["seconds"] for batch in timed) if timed else None,
        "peak_memory": max(memory, default=None),
        "cache_ratio": sum(row["cache_bytes"] for row in cached) / dense if cached else None,
    }
    return {"scores": scores, "costs": {name: value for name, value in costs.items() if value is not None}}


def make_report(
    model: Any,
    tasks: Sequence[EvalTask],
    found: Mapping[str, Mapping[str, Any]],
    patches: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Sequence[Row]]],
) -> dict[str, Any]:
    """Everything that `report.json` holds.

    Args:
        model: that was evaluated, on its device.
        tasks: in order.
        found: name of each run, the unpatched one first, to what `evaluate` returned.
        patches: name of each run to `patch_info` of its model, with the number of all its `parameters` and, besides,
            of those that an adapter holds.
        settings: of the runner.
        rows: name of each task to that of each run to its answers to all samples.

    Returns:
        `schema_version`, `model`, `versions`, `device`, `settings`, `runs` (per run its patches, the number of
        parameters they add, that of all, and that of an adapter), `tasks` (per task how it is scored and asked, and
        under `runs` per run `scores`, `costs`, `error` (standard error of the main score), `difference`, the scores
        minus those of the unpatched model, and `difference_error`, of the main score's in pairs; None where they cannot
        be stated), and `averages` (per benchmark with several tasks scored in percent, the mean of the main scores per
        run).
    """
    content = {}
    for task in tasks:
        base = found[UNPATCHED][task.name]["scores"]
        runs: dict[str, Any] = {}
        for name, results in found.items():
            row, answers = results[task.name], rows[task.name]
            error = standard_error(task, answers[name])
            runs[name] = {"scores": row["scores"], "costs": row["costs"], "error": error}
            if name != UNPATCHED:
                runs[name]["difference"] = {key: _minus(value, base[key]) for key, value in row["scores"].items()}
                runs[name]["difference_error"] = standard_error(task, answers[name], answers[UNPATCHED])
        content[task.name] = {
            "kind": task.kind,
            "samples": found[UNPATCHED][task.name]["samples"],
            "main_score": task.main_score,
            "unit": task.unit,
            "higher_is_better": task.higher_is_better,
            "identity": dict(task.identity()),
            "runs": runs,
        }
    return {
        "schema_version": SCHEMA_VERSION,
        **surroundings(model),
        "settings": dict(settings),
        "runs": {
            name: {
                key: info[key]
                for key in ("patches", "extra_parameters", "parameters", "adapter_parameters")
                if key in info
            }
            for name, info in patches.items()
        },
        "tasks": content,
        "averages": _averages(content, list(found)),
    }


def surroundings(model: Any) -> dict[str, dict[str, Any]]:
    """What was measured, with what and on what: `model`, `versions` and `device`."""
    devices = cuda_devices(model)
    return {
        "model": {
            "name": model.config.name_or_path,
            "class": type(base_model(model)).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
        },
        "versions": {
            "python": platform.python_version(),
            "patchattn": __version__,  # also in a checkout that is not installed
            **{name: version(name) for name in ("torch", "transformers", "accelerate")},
        },
        "device": {
            "type": model.device.type,
            "name": torch.cuda.get_device_name(devices[0]) if devices else platform.machine(),
            "threads": torch.get_num_threads(),
            "memory": memory_kind(model),
        },
    }


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a `report.json` holds.

    Args:
        path: the file, or the folder that it is in.

    Raises:
        ValueError: no such file, or it is none of this schema version.
    """
    file = Path(path) / REPORT if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"There is no report {str(file)!r}: expected the output folder of `patchattn eval`.")
    content = read_json(file)
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != SCHEMA_VERSION:
        raise ValueError(f"{file} has the schema version {quoted(found)}; this patchattn reads {SCHEMA_VERSION}.")
    return content


def write_report(report: Mapping[str, Any], folder: Path, more: Sequence[tuple[str, Any]] = ()) -> None:
    """Write `report.json`, `report.md` and `report.html`.

    Args:
        report: of `make_report`.
        folder: made if missing.
        more: title and figure of pictures for the page, beside scores and costs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    figures = [("Scores", plot_scores(report)), ("Costs", plot_costs(report)), *more]
    pictures = [(title, _png(figure)) for title, figure in figures if figure is not None]
    (folder / "report.html").write_text(to_html(report, pictures), encoding="utf-8")


def table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the main table: a row per task and run, the averages at its end.

    Costs that nothing was measured of have no column.
    """
    lines = []
    measured = {key for task in report["tasks"].values() for run in task["runs"].values() for key in run["costs"]}
    shown = [cost for cost in COSTS if cost[0] in measured]
    for name, task in report["tasks"].items():
        score = f"{task['main_score'].replace('_', ' ')}{', ' if task['unit'] else ''}{task['unit']}"
        for run, values in task["runs"].items():
            change = values.get("difference", {}).get(task["main_score"])
            costs = [values["costs"].get(key) for key, *_ in shown]
            lines.append(
                [
                    name,
                    score + ("" if task["higher_is_better"] else " (lower is better)"),
                    run,
                    _with_error(number(values["scores"][task["main_score"]]), values.get("error")),
                    "" if run == UNPATCHED else _with_error(number(change, sign=True), values.get("difference_error")),
                    *(
                        number(None if value is None else value / divisor)
                        for value, (*_, divisor) in zip(costs, shown, strict=True)
                    ),
                ]
            )
    for name, means in report["averages"].items():
        for run, value in means.items():
            change = "" if run == UNPATCHED else number(_minus(value, means[UNPATCHED]), sign=True)
            lines.append([f"{name}, mean", "main scores, %", run, number(value), change, *[""] * len(shown)])
    titles = [f"{title}, {unit}" for _, title, unit, _ in shown]
    return ["task", "score", "model", "value", "difference", *titles], lines


def all_scores(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table of every score, a column per run."""
    lines = [
        [name, key.replace("_", " "), *(number(values["scores"].get(key)) for values in task["runs"].values())]
        for name, task in report["tasks"].items()
        for key in task["runs"][UNPATCHED]["scores"]
    ]
    return ["task", "score", *report["runs"]], lines


def facts(report: Mapping[str, Any]) -> dict[str, str]:
    """What was measured, with what, on what: heading to text."""
    model, device, settings = report["model"], report["device"], report["settings"]
    runs = {}
    for name, run in report["runs"].items():
        variants = []
        for patch in run["patches"]:
            given = ", ".join(f"{key}={value}" for key, value in patch["config"].items() if value is not None)
            variants.append(f"{patch['variant']} ({given})")
        if held := run.get("adapter_parameters"):
            variants.append(f"a LoRA adapter ({held:,} values trained)")
        runs[f"Run {name}"] = f"{'; '.join(variants) or 'no patch'}; {run['parameters']:,} parameters"
    samples = ", ".join(f"{name} {task['samples']}" for name, task in report["tasks"].items())
    shared = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
    where = f"{device['name']} ({device['type']}), {device['threads']} threads per process"
    return {
        "Model": f"{model['name'] or 'unnamed'}, {model['class']}, {model['dtype']}, {model['attention']} attention",
        **runs,
        "Samples": samples,
        "Settings": shared,
        "Device": f"{where}. {_MEMORY[device['memory']]}",
        "Versions": ", ".join(f"{name} {value}" for name, value in report["versions"].items()),
        "Errors": "± is the standard error of a score, and of a difference that of the same samples in pairs.",
        "Times": "Time to the first token is the median over batches; tokens per second are those after the first. "
        "They compare within one report, on a machine that does nothing else.",
    }


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: the main table, every score, and how it was measured."""
    lines = [*markdown_table(*table(report), texts=3), "", *markdown_table(*all_scores(report), texts=2), ""]
    return "\n".join([*lines, *(f"- {name}: {text}" for name, text in facts(report).items())]) + "\n"


def to_html(report: Mapping[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
    """The report as one page that needs nothing else.

    Args:
        report: of `make_report`.
        pictures: title and PNG, in base64, of each.
    """
    from jinja2 import Environment

    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
        .from_string(template)
        .render(
            title=f"{', '.join(name for name in report['runs'] if name != UNPATCHED)} beside {UNPATCHED}",
            model=report["model"]["name"] or report["model"]["class"],
            tables=[(*table(report), 3), (*all_scores(report), 2)],
            pictures=pictures,
            facts=facts(report),
        )
    )


def number(value: float | None, *, sign: bool = False) -> str:
    """A number for a table: two digits behind the point, or three that count where it is small."""
    if value is None:
        return "-"
    digits = 2 if abs(value) >= 1 or value == 0 or sign else 2 - math.floor(math.log10(abs(value)))
    return f"{value:{'+' if sign else ''}.{min(digits, 6)}f}"


def _with_error(value: str, error: float | None) -> str:
    return value if error is None else f"{value} ± {number(error)}"


def _minus(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value - base


def _averages(tasks: Mapping[str, Any], runs: Sequence[str]) -> dict[str, dict[str, float | None]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, task in tasks.items():
        if "/" in name and task["unit"] == "%":
            groups.setdefault(name.split("/")[0], []).append(task)
    found: dict[str, dict[str, float | None]] = {}
    for group, members in groups.items():
        if len(members) > 1:
            values = {run: [task["runs"][run]["scores"][task["main_score"]] for task in members] for run in runs}
            found[group] = {run: None if None in given else statistics.mean(given) for run, given in values.items()}
    return found


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int) -> list[str]:
    """Lines of a table whose first columns hold texts, the others numbers."""
    rule = "|---" * texts + "|---:" * (len(head) - texts) + "|"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
