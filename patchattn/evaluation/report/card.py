"""What a report says of one patch, for a model card: a table, and the scores as the Hub reads them."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from huggingface_hub import EvalResult

from ...files.documents import as_json, laid_out
from .report import UNPATCHED, facts, markdown_table, read_report, table

_HUB_TASKS = {
    "causal_lm": "text-generation",
    "classifier": "text-classification",
    "vision_language": "image-text-to-text",
}


def eval_results(path: str | PathLike[str], patches: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """Every score of the run with these patches.

    Args:
        path: a report, or the folder that it is in.
        patches: as `patch_info` lists them.

    Raises:
        ValueError: no report, or none of its runs has these patches.
    """
    report = read_report(path)
    with laid_out(path):
        run = _run(report, patches, path)
        return [
            EvalResult(
                task_type=_HUB_TASKS[task["kind"]],
                dataset_type=name.split("/")[0],
                dataset_name=name,
                dataset_config=name.partition("/")[2] or None,
                metric_type=score,
                metric_value=value,
            )
            for name, task in report["tasks"].items()
            for score, value in task["runs"][run]["scores"].items()
            if value is not None
        ]


def card_section(path: str | PathLike[str], patches: Sequence[Mapping[str, Any]]) -> str:
    """A section in Markdown with scores and costs of the run with these patches, beside the unpatched model.

    Takes and raises what `eval_results` does.
    """
    report = read_report(path)
    with laid_out(path):
        return _section(report, _run(report, patches, path))


def _section(report: Mapping[str, Any], run: str) -> str:
    two = {**report, "runs": {name: report["runs"][name] for name in (UNPATCHED, run)}}
    two["tasks"] = {
        name: {**task, "runs": {key: task["runs"][key] for key in (UNPATCHED, run)}}
        for name, task in report["tasks"].items()
    }
    two["averages"] = {
        group: {key: means[key] for key in (UNPATCHED, run)} for group, means in report["averages"].items()
    }
    known = facts(two)
    notes = [f"- {name}: {known[name]}" for name in ("Samples", "Settings", "Device", "Versions", "Times")]
    return "\n".join(["## Evaluation", "", *markdown_table(*table(two), texts=3), "", *notes])


def _run(report: Mapping[str, Any], patches: Sequence[Mapping[str, Any]], path: str | PathLike[str]) -> str:
    plan = as_json(list(patches))
    for name, run in report["runs"].items():
        if name != UNPATCHED and run["patches"] == plan:
            return name
    raise ValueError(
        f"{path} has no run with the patches of this model; its runs are {', '.join(report['runs'])}. Evaluate it."
    )
