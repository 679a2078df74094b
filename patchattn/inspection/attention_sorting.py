"""Attention Sorting: documents of a prompt are put in the order of the attention that they get. arXiv 2310.01427."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from patchattn_kernels.rows import full_precision, log_sum_exp, row_logits, weights_of

from ..core.call import AttentionCall
from ..core.probing import probed
from ..core.selection import base_model, causal_sites, evaluating, expect_model, input_device, select_sites
from ..positions.marking import MarkedText, mark_segments


@dataclass(frozen=True)
class SortedContext:
    """Documents in the order that was found.

    Attributes:
        order: numbers of the documents as they were given, the one that gets most attention last.
        scores: of the documents as they were given, in the last prompt that was looked at: attention that its last
            token gives to a token of each, the mean over layers, heads and its tokens.
        rounds: how many prompts were looked at.
        prompt: the prompt in the order that was found, with the spans of its documents.
    """

    order: tuple[int, ...]
    scores: tuple[float, ...]
    rounds: int
    prompt: MarkedText


def sorted_by(order: Sequence[int], scores: Sequence[float]) -> tuple[int, ...]:
    """Documents by score, the highest last; of equal ones the order stays."""
    return tuple(sorted(order, key=lambda number: scores[number]))


def attention_sorting(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    question: str,
    *,
    before: str = "",
    rounds: int = 1,
) -> SortedContext:
    """Put the documents of a prompt in the order of the attention that the next token gives to them, highest last.

    The prompt is what stands before the documents, these, and the question. Its last token's attention is looked at,
    the documents are sorted, and so on until they stay where they are, or the rounds are over.

    Args:
        model: a decoder, patched or not.
        tokenizer: its tokenizer.
        documents: with whatever separates them, such as an empty line at the end of each.
        question: what follows them.
        before: what stands in front of them.
        rounds: how often at most.

    Raises:
        TypeError: no model, or something else than texts.
        ValueError: no document or no question, a document of no token, or less than one round.
        NotImplementedError: the model has no causal self-attention, or a variant of its patch computes attention
            itself, or attends to keys of no token.
    """
    expect_model("attention_sorting", model)
    if isinstance(documents, str) or not all(isinstance(text, str) for text in (*documents, question, before)):
        raise TypeError(f"Documents are a list of texts, the question and what comes before are texts: {documents!r}.")
    if not documents or not question:
        raise ValueError(f"Expected documents and a question, got {len(documents)} documents and {question!r}.")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be an integer from 1 on, got {rounds!r}.")
    layers = [site.name for site in causal_sites(model, select_sites(base_model(model)))]
    if not layers:
        raise NotImplementedError(f"{type(model).__name__} has no causal self-attention, whose last token reads all.")
    order, scores, done = tuple(range(len(documents))), (0.0,) * len(documents), 0
    while done < rounds:
        prompt = _prompt(tokenizer, [documents[number] for number in order], question, before)
        attention = _last_row(model, layers, prompt.input_ids)
        spans = [span for span in prompt.spans if span.kind == "document"]
        found = {
            number: float(attention[span.start : span.end].mean()) for number, span in zip(order, spans, strict=True)
        }
        scores, done = tuple(found[number] for number in range(len(documents))), done + 1
        before_sorting, order = order, sorted_by(order, scores)
        if order == before_sorting:
            break
    return SortedContext(
        order, scores, done, _prompt(tokenizer, [documents[number] for number in order], question, before)
    )


def _prompt(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], question: str, before: str) -> MarkedText:
    front: list[tuple[str | None, str]] = [("prefix", before)] if before else []
    return mark_segments(tokenizer, [*front, *(("document", text) for text in documents), (None, question)])


def _last_row(model: nn.Module, layers: Sequence[str], ids: Sequence[int]) -> torch.Tensor:
    """`(T,)` attention of the last token to each token, the mean over layers and heads, in float64."""
    rows: list[torch.Tensor] = []

    def see(call: AttentionCall, output: torch.Tensor) -> None:
        if call.mask.keys != len(ids) or call.mask.extra:
            raise NotImplementedError(
                f"{call.site.name} attends to {call.mask.keys} keys in a prompt of {len(ids)} tokens, so that they are "
                "not told apart: sort the documents with the unpatched model."
            )
        rule = call.rule()
        last = slice(call.query.shape[2] - 1, None)
        logits = row_logits(full_precision(call.query), full_precision(call.key), rule, last)
        rows.append(weights_of(logits, log_sum_exp(logits, rule))[0, :, 0].double().mean(0).cpu())

    accepted = inspect.signature(model.forward).parameters
    few: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    wanted = [f"^{name}$".replace(".", r"\.") for name in layers]
    tokens = torch.tensor([list(ids)], device=input_device(model))
    with torch.no_grad(), evaluating(model), probed(model, see, modules=wanted, at="base"):
        model(input_ids=tokens, use_cache=False, **few)
    return torch.stack(rows).mean(0)
