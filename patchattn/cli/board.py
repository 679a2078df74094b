"""`patchattn board`: every variant on the same work, a row at a time."""

import os
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from .common import quiet

board = typer.Typer(no_args_is_help=True, help="One model under many variants and settings, on the same work.")


@board.command("run")
def run_(
    plan: Annotated[Path, typer.Argument(help="Folder with board.yaml, full.yaml and rows/*.yaml.")],
    output: Annotated[Path, typer.Option(help="Folder for answers and rows.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a model; the plan's without.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder that the tasks' data lies in; the Hub without.")] = None,
    row: Annotated[list[str] | None, typer.Option(help="Row to measure; may be repeated. All without.")] = None,
    only: Annotated[
        str | None,
        typer.Option(help="One part: quality, without times, or speed, on a machine that does nothing else."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="The work of full.yaml, for a GPU, into an output folder of its own.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Device; a GPU by default where there is one.")] = None,
) -> None:
    """Measure the unpatched model and rows; those that are there are left alone, and a killed run goes on.

    Under accelerate launch, processes share the samples of each task.
    """
    import torch

    from ..evaluation.board.plan import read_board
    from ..evaluation.board.run import Part, run_board
    from ..evaluation.run.compare import processes
    from ..evaluation.run.loading import find_source
    from .devices import choose_device

    if only not in (None, *get_args(Part)):
        raise ValueError(f"--only must be quality or speed, got {only!r}.")
    made, rows = read_board(plan, row or [], full=full)
    source = find_source(model or made.model)
    if source.kind != "causal_lm" or source.is_patched:
        raise ValueError(f"{source.name}: a board needs a causal language model that is not patched.")
    made.made_tasks(data)  # whatever is wrong with them shows before the weights are loaded
    state = processes(cpu=device == "cpu")
    chosen = state.device if device is None else choose_device(device)
    quiet()
    console = Console(highlight=False)
    say = (lambda text: console.print(text, soft_wrap=True)) if state.is_main_process else (lambda text: None)
    loaded = source.load(chosen)
    if made.dtype != "checkpoint":
        loaded = loaded.to(getattr(torch, made.dtype))
    part = cast(Part | None, only)
    run_board(loaded, source.load_tokenizer(), made, rows, output, only=part, data=data, say=say)
    state.destroy_process_group()


@board.command("show")
def show_(
    output: Annotated[Path, typer.Argument(help="Folder that `patchattn board run` wrote to.")],
    plan: Annotated[Path | None, typer.Option(help="Folder with rows/*.yaml: those not measured are named.")] = None,
    page: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="Folder for a picture of every family of methods, in or beside that of the page."),
    ] = None,
    how: Annotated[str, typer.Option(help="Command that the page says the rows were measured by.")] = "",
) -> None:
    """Show the rows that were measured."""
    from ..evaluation.board.measured import read_rows
    from ..evaluation.board.pictures import board_picture, family_costs
    from ..evaluation.board.plan import read_board
    from ..evaluation.board.show import COLUMNS, board_page, board_table

    rows, console = read_rows(output), Console(highlight=False)
    missing = [] if plan is None else [name for name in read_board(plan)[1] if name not in rows]
    written = []
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for family, cost in family_costs(rows).items():
            path = pictures / f"{family.replace(' ', '_')}.png"
            board_picture(rows, cost, family).savefig(path, dpi=110)
            written.append((f"{family}: mean difference to dense over {cost}", path))
    if page is not None:
        beside = [(title, Path(os.path.relpath(path, page.parent)).as_posix()) for title, path in written]
        page.write_text(board_page(rows, beside, missing, how), encoding="utf-8")
    head, lines = board_table(rows)
    last = len(head) - len(COLUMNS)
    for columns in ([0, 1, 2, *range(last, len(head))], [0, *range(3, last)]):
        table = Table(*(head[column] for column in columns))
        for line in lines:
            table.add_row(*(line[column] for column in columns))
        console.print(table)
    if missing:
        console.print(f"Not run: {', '.join(missing)}", soft_wrap=True)
    for path in [*(path for _, path in written), *([] if page is None else [page])]:
        console.print(f"Wrote {path}", soft_wrap=True)
