"""A report of a model that SHRP compressed beside its teacher, which `patchattn eval` cannot make.

    python benchmarks/eval/shrp_trained.py TEACHER COMPRESSED --data glue --output runs/eval/MiniLM/shrp_trained

The command compares one set of weights with and without patches. Here every weight was trained after the conversion,
and what compression takes out is in no file, so that two models are evaluated and put into one report.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from patchattn import patch_info
from patchattn.evaluation.report.report import UNPATCHED, make_report, write_report
from patchattn.evaluation.run.compare import answers, evaluate
from patchattn.evaluation.run.loading import find_source
from patchattn.evaluation.tasks.registry import make_tasks


def main(
    teacher: Annotated[str, typer.Argument(help="Folder of the classifier that was compressed.")],
    compressed: Annotated[str, typer.Argument(help="Folder of what came of it.")],
    output: Annotated[Path, typer.Option(help="Folder for answers and report.")],
    data: Annotated[str, typer.Option(help="Folder of GLUE's tasks.")],
    task: Annotated[str, typer.Option(help="The task it was fine-tuned on.")] = "glue/sst2",
    batch: Annotated[int, typer.Option(help="Rows of a forward.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Only so many rows.")] = None,
) -> None:
    """Evaluate both and write the report."""
    tasks = make_tasks([task], "classifier", data=data)
    folders = {UNPATCHED: teacher, "trained": compressed}
    models: dict[str, Any] = {name: find_source(folder).load("cpu") for name, folder in folders.items()}
    tokenizer = find_source(teacher).load_tokenizer()
    settings = {"batch": batch, "seed": 0, "limit": limit}
    found, patches = {}, {}
    for name, model in models.items():
        found[name] = evaluate(model, tokenizer, tasks, output / name, **settings)
        patches[name] = {**patch_info(model), "parameters": sum(weight.numel() for weight in model.parameters())}
    (made,) = tasks
    rows = {
        made.name: {n: answers(output / n, made.name, run[made.name]["samples"], batch) for n, run in found.items()}
    }
    report = make_report(models[UNPATCHED], tasks, found, patches, {**settings, "processes": 1}, rows)
    write_report(report, output)
    print((output / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
