"""The command line: `patchattn list | info | check | doctor | coverage | demo | calibrate | eval | board | export |
bench | carve | sort-context | plot | lm-eval`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..version import __version__
from .bases import calibrate_bases
from .bench import bench
from .board import board
from .calibrate import calibrate_curve, calibrate_flap, calibrate_heads, calibrate_massive
from .common import parse_settings, quiet
from .duo import calibrate_duo
from .evaluate import evaluate_model
from .export import export_model
from .heads import calibrate_head_roles, calibrate_lookback, calibrate_vectors
from .pictures import carve, image_flow
from .plot import plot
from .plot_heads import plot_directions, plot_entropy
from .retrieval import calibrate_retrieval
from .sorting import sort_context
from .squeezed import calibrate_squeezed
from .variants import AsJson, info_, list_variants_

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Replace the attention of a Hugging Face model by a published variant, in place and reversibly.",
)

calibrate = typer.Typer(no_args_is_help=True, help="Find on data what a training-free variant needs for a model.")
app.add_typer(calibrate, name="calibrate")
app.add_typer(plot, name="plot")
app.add_typer(board, name="board")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"patchattn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of patchattn itself."""


def main(arguments: list[str] | None = None) -> None:
    """Entry of the console script: a user's mistake is one line on stderr and exit code 2."""
    try:
        app(arguments)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {_one_line(error)}", soft_wrap=True, highlight=False)
        sys.exit(2)


@app.command()
def coverage(
    types: Annotated[list[str] | None, typer.Argument(help="Model types such as llama; all by default.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the whole table to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Try every model type of the installed transformers: patchable, refused and why, or not built."""
    from collections import Counter

    from rich.progress import Progress
    from rich.table import Table

    from ..checking.coverage import current_versions, sweep, to_markdown

    console = Console()
    with Progress(console=Console(stderr=as_json)) as progress:
        bar = progress.add_task("model types", total=None)
        rows = sweep(types, progress=lambda row, done, total: progress.update(bar, completed=done, total=total))
    if markdown is not None:
        markdown.write_text(to_markdown(rows, current_versions()), encoding="utf-8")
        Console(stderr=as_json).print(f"Wrote {markdown}", soft_wrap=True)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    elif types:
        table = Table("model type", "status", "reason")
        for row in rows:
            table.add_row(row.model_type, row.status, row.reason)
    else:
        table = Table("status", "model types")
        for status, count in Counter(row.status for row in rows).most_common():
            table.add_row(status, str(count))
    if not as_json:
        console.print(table)
    if any(row.status == "failed" for row in rows):
        raise typer.Exit(1)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model.")],
    variant: Annotated[str, typer.Option(help="A variant, as `patchattn list` names it.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting, such as active_ratio=0.5 or preset=NAME; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a patch behaves on a model: neutral, undone exactly, with padding, with a cache; and its cost."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from ..checking.check import check_patch
    from ..core.registry import variant_info
    from ..saving.pretrained import load_pretrained

    config = variant_info(variant).configure(parse_settings(settings or []))
    quiet()
    architectures = load_pretrained(AutoConfig, model).architectures or []
    decodes = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    loaded = load_pretrained(AutoModelForCausalLM if decodes else AutoModel, model)
    report = check_patch(loaded, variant=variant, config=config)
    if as_json:
        print(json.dumps({**asdict(report), "passed": report.passed}, indent=2))
    else:
        Console().print(str(report), markup=False, highlight=False, soft_wrap=True)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Check this installation: the releases at hand, and every variant on tiny models. Run it after an upgrade."""
    import torch
    from rich.table import Table

    from ..checking.doctor import self_test
    from ..core.tested_releases import releases

    quiet()
    console, table = Console(highlight=False), Table("package", "at hand", "tested from", "to", "")
    problems = []
    for release in releases():
        table.add_row(release.name, release.installed or "-", release.oldest, release.newest, release.verdict)
        if release.verdict in ("too old", "too new"):
            problems.append(f"{release.name} {release.installed} is {release.verdict}: see `tested from` and `to`")
    console.print(table)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for finding in self_test(device):
            console.print(f"{'failed' if finding.problem else 'passed'}  {device}  {finding.what}", soft_wrap=True)
            if finding.problem:
                problems.append(f"{finding.what} ({device}): {finding.problem}")
    for problem in problems:
        console.print(f"[bold red]Problem:[/] {escape(problem)}", soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    console.print("Everything that was tried works.")


@app.command()
def demo(
    task: Annotated[
        str | None, typer.Option(help="Task: recall (a tiny Llama, trained here) or sst2 (with --model).")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of an encoder, for sst2.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with SST-2's train.tsv and dev.tsv; from the Hub without it.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeat it for several runs: --seed 0 --seed 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Fine-tuning steps of every variant.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for results.json, table.md and the picture.")] = Path(
        "patchattn_demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only: shows that it runs, teaches nothing.")
    ] = False,
) -> None:
    """Patch, fine-tune with LoRA, compare, undo: on a task of its own or on SST-2. Needs no network by default."""
    from ..demo import make_task, run_demo

    quiet()
    run_demo(make_task(task, model, data, quick), seed or [0], output, steps)


@calibrate.callback()
def _calibrate() -> None:
    """Without this, a group of one command would be that command."""


@calibrate.command("act")
def calibrate_act(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    data: Annotated[Path, typer.Option(help='JSON lines of {"prompt": ..., "choices": [...], "label": int}.')],
    output: Annotated[Path, typer.Option(help="Where to write the head list.")] = Path("heads.json"),
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of ACT, such as beta=0.4; may be repeated.")
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="A layer to search, from 0; may be repeated. All but the first two and the last by default."),
    ] = None,
    modules: Annotated[str | None, typer.Option(help="Regular expression that chooses one of several towers.")] = None,
    group_size: Annotated[
        int, typer.Option(help="Heads tried together first; a group that does not help is dropped. 1: each alone.")
    ] = 4,
    metric: Annotated[
        str,
        typer.Option(
            help="Metric: accuracy, or likelihood: mean log-probability of the right choice among the choices."
        ),
    ] = "accuracy",
    min_gain: Annotated[float, typer.Option(help="By how much the metric must rise for a head to be kept.")] = 0.0,
    normalise: Annotated[
        str, typer.Option(help="Divide a choice's log-likelihood by its tokens or characters, or by none.")
    ] = "none",
    batch_size: Annotated[int, typer.Option(help="Rows of a forward.")] = 8,
    device: Annotated[
        str | None, typer.Option(help="Device, such as cuda; a GPU by default where there is one.")
    ] = None,
) -> None:
    """Search the heads that ACT is to calibrate; a killed search goes on where it was.

    A head is kept if calibrating it alone raises the metric on the data by more than --min-gain. Heads are tried in
    groups of one layer first: a group that does not raise it is dropped, one that does is halved down to single heads.
    What was measured is kept in OUTPUT.state until the search is done.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..calibration.search import find_heads
    from ..evaluation.tasks.likelihood import read_choices
    from ..saving.pretrained import load_pretrained
    from .devices import choose_device

    examples, given, chosen = read_choices(data), parse_settings(settings or []), choose_device(device)
    quiet()
    loaded = load_pretrained(AutoModelForCausalLM, model, dtype="auto").eval().to(chosen)
    if type(loaded).__name__ not in (saved := loaded.config.architectures or []):  # its head would be random
        raise ValueError(f"calibrate act needs a causal language model, such as {type(loaded).__name__}; got {saved}.")
    tokenizer = load_pretrained(AutoTokenizer, model)
    console, state = Console(highlight=False), output.with_name(output.name + ".state")
    if state.exists():
        console.print(f"Going on from {state}", soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("groups of heads", total=None)
        found = find_heads(
            loaded,
            tokenizer,
            examples,
            settings=given,
            layers=layer,
            modules=modules,
            group_size=group_size,
            metric=metric,  # type: ignore[arg-type]
            min_gain=min_gain,
            normalise=normalise,  # type: ignore[arg-type]
            batch_size=batch_size,
            state=state,
            progress=lambda done, known, now: progress.update(bar, completed=done, total=known, description=now),
        )
    found.save(output, data=data.name, examples=len(examples), group_size=group_size, settings=given)
    state.unlink(missing_ok=True)
    console.print(
        f"{len(found.gains)} heads kept after {found.runs} runs; {metric} {found.baseline:.4f} without calibration, "
        f"{found.together:.4f} with all of them. Wrote {output}",
        soft_wrap=True,
    )


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def lm_eval(context: typer.Context) -> None:
    """The lm-evaluation-harness's own command line, with the model `patchattn`: see `patchattn lm-eval --help`."""
    from ..evaluation.run.harness import run_lm_eval

    run_lm_eval(context.args)


calibrate.command("heads")(calibrate_heads)
calibrate.command("curve")(calibrate_curve)
calibrate.command("flap")(calibrate_flap)
calibrate.command("massive")(calibrate_massive)
calibrate.command("retrieval")(calibrate_retrieval)
plot.command("directions")(plot_directions)
plot.command("entropy")(plot_entropy)
plot.command("image-flow")(image_flow)
calibrate.command("head-roles")(calibrate_head_roles)
calibrate.command("lookback")(calibrate_lookback)
calibrate.command("vectors")(calibrate_vectors)
calibrate.command("duo")(calibrate_duo)
calibrate.command("bases")(calibrate_bases)
calibrate.command("squeezed")(calibrate_squeezed)
app.command("list")(list_variants_)
app.command("info")(info_)
app.command("eval")(evaluate_model)
app.command("export")(export_model)
app.command("bench")(bench)
app.command("sort-context")(sort_context)
app.command("carve")(carve)


def _one_line(error: Exception) -> str:
    return escape(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
