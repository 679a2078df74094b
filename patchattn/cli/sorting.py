"""The command `patchattn sort-context`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .calibrate import Device, Model


def sort_context(
    model: Model,
    question: Annotated[str, typer.Argument(help="What follows the documents.")],
    documents: Annotated[list[Path], typer.Argument(help="Text files, one document each, in their first order.")],
    before: Annotated[str, typer.Option(help="What stands in front of the documents.")] = "",
    separator: Annotated[str, typer.Option(help="What is put behind each document.")] = "\n\n",
    rounds: Annotated[int, typer.Option(help="How often to sort at most; once is the paper's first step.", min=1)] = 1,
    answer: Annotated[int, typer.Option(help="Write so many tokens of an answer to the sorted prompt.", min=0)] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "--out", help="Write order, scores and answer into this JSON file.")
    ] = None,
    device: Device = None,
) -> None:
    """Attention Sorting: put documents in the order of the attention that a prompt's last token gives them."""
    import torch

    from ..files.documents import read_text, write_json
    from ..inspection.attention_sorting import attention_sorting
    from .common import language_model

    texts = [read_text(path) + separator for path in documents]
    tokenizer, loaded = language_model(model, device)
    found = attention_sorting(loaded, tokenizer, texts, question, before=before, rounds=rounds)
    console = Console(highlight=False)
    for number in found.order:
        console.print(f"{found.scores[number]:.2e}  {escape(str(documents[number]))}", soft_wrap=True)
    said = ""
    if answer:
        ids = torch.tensor([found.prompt.input_ids], device=loaded.device)
        written = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=answer, do_sample=False)
        said = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        console.print(escape(said), soft_wrap=True)
    if output is not None:
        order = [str(documents[number]) for number in found.order]
        scores = [found.scores[number] for number in found.order]
        write_json(output, {"order": order, "scores": scores, "rounds": found.rounds, "answer": said or None})
        console.print(f"Wrote {output}", soft_wrap=True)
