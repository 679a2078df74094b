"""The command line: `patchattn list | info | coverage | check | demo`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Replace the attention of a Hugging Face model by a published variant, in place and reversibly.",
)


def main(arguments: list[str] | None = None) -> None:
    """Entry of the console script: a user's mistake is one line on stderr and exit code 2."""
    try:
        app(arguments)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {_one_line(error)}", soft_wrap=True, highlight=False)
        sys.exit(2)


@app.command("list")
def list_() -> None:
    """The variants that can be patched in."""
    from rich.table import Table

    from .variant import list_variants, variant_info

    table = Table("name", "what it does", "paper", "year", "needs training")
    for name in list_variants():
        info = variant_info(name)
        paper = f"arXiv {info.arxiv_id}" if info.arxiv_id else info.title
        table.add_row(name, info.summary, paper, str(info.year), "yes" if info.needs_training else "no")
    Console().print(table)


@app.command()
def demo(
    task: Annotated[
        str | None, typer.Option(help="recall (a tiny Llama, trained here) or sst2 (with --model).")
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
    import warnings

    from transformers.utils import logging

    from .demo import make_task, run_demo

    logging.set_verbosity_error()  # the new head of an encoder is no news here
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    run_demo(make_task(task, model, data, quick), seed or [0], output, steps)


def _one_line(error: Exception) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
