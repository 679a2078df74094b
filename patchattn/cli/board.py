"""`patchattn board`: every variant on the same work, a row at a time."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .common import quiet

board = typer.Typer(no_args_is_help=True, help="One model under many variants and settings, on the same work.")


@board.command("run")
def run_(
    plan: Annotated[Path, typer.Argument(help="Folder with board.yaml and rows/*.yaml.")],
    output: Annotated[Path, typer.Option(help="Folder for answers and rows.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a model; the plan's without.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder that the tasks' data lies in; the Hub without.")] = None,
    row: Annotated[list[str] | None, typer.Option(help="Row to measure; may be repeated. All without.")] = None,
    device: Annotated[str | None, typer.Option(help="Device; a GPU by default where there is one.")] = None,
) -> None:
    """Measure the unpatched model and rows; those that are there are left alone, and a killed run goes on.

    Under accelerate launch, processes share the samples of each task.
    """
    from ..evaluation.board.plan import read_board
    from ..evaluation.board.run import run_board
    from ..evaluation.run.compare import processes
    from ..evaluation.run.loading import find_source
    from .devices import choose_device

    made, rows = read_board(plan, row or [])
    source = find_source(model or made.model)
    if source.kind != "causal_lm" or source.is_patched:
        raise ValueError(f"{source.name}: a board needs a causal language model that is not patched.")
    made.made_tasks(data)  # whatever is wrong with them shows before the weights are loaded
    state = processes(cpu=device == "cpu")
    chosen = state.device if device is None else choose_device(device)
    quiet()
    console = Console(highlight=False)
    say = (lambda text: console.print(text, soft_wrap=True)) if state.is_main_process else (lambda text: None)
    run_board(source.load(chosen), source.load_tokenizer(), made, rows, output, data=data, say=say)
    state.destroy_process_group()


@board.command("show")
def show_(
    output: Annotated[Path, typer.Argument(help="Folder that `patchattn board run` wrote to.")],
    page: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG or SVG file to write, beside the page.")] = None,
    cost: Annotated[str, typer.Option(help="What the picture's scores stand over: kv cache, density or decode.")] = (
        "kv cache"
    ),
) -> None:
    """Show the rows that were measured."""
    from ..core.settings import nearest
    from ..evaluation.board.show import COSTS, board_page, board_picture, board_table, read_rows

    if cost not in COSTS:
        raise ValueError(f"There is no cost {cost!r}{nearest(cost, list(COSTS))}")
    rows, console = read_rows(output), Console(highlight=False)
    if picture is not None:
        board_picture(rows, cost).savefig(picture, dpi=150)
    if page is not None:
        page.write_text(board_page(rows, None if picture is None else picture.name), encoding="utf-8")
    head, lines = board_table(rows)
    tasks = len(head) - 8
    for columns in ([0, 1, 2, *range(len(head) - 5, len(head))], [0, *range(3, 3 + tasks)]):
        table = Table(*(head[column] for column in columns))
        for line in lines:
            table.add_row(*(line[column] for column in columns))
        console.print(table)
    for written in filter(None, (page, picture)):
        console.print(f"Wrote {written}", soft_wrap=True)
