"""Prompts of demonstrations, as task vectors and function vectors are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

TEMPLATE = "Q: {}\nA: {}\n\n"


@dataclass(frozen=True)
class FewShotBatch:
    """Prompts that each end where an answer is asked for.

    Attributes:
        inputs: `input_ids` and `attention_mask`, padded on the left.
        answers: id of the right answer's first token, of each prompt.
        texts: the prompts.
    """

    inputs: dict[str, torch.Tensor]
    answers: list[int]
    texts: list[str]


def few_shot_prompts(
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    shots: int = 10,
    count: int = 100,
    shuffled: bool = False,
    template: str = TEMPLATE,
    seed: int = 0,
    batch_size: int = 8,
) -> list[FewShotBatch]:
    """Draw prompts of some demonstrations and another question, `Q: big\\nA: small\\n\\nQ: up\\nA:`.

    Args:
        tokenizer: of the model; with a padding token.
        pairs: questions and answers of a task.
        shots: demonstrations of a prompt; 0 of them leave the question alone.
        count: how many prompts.
        shuffled: the answers of each prompt's demonstrations are dealt out anew, so that none fits: of no use, as
            `indirect_effects` wants them.
        template: of a demonstration, with a place for the question and one for the answer; the last question ends
            where its answer would begin.
        seed: of what is drawn.
        batch_size: prompts of a batch.

    Raises:
        ValueError: not enough pairs for a prompt, fewer than two shuffled demonstrations, a template without its two
            places, or a tokenizer without padding.
    """
    if shots < 0 or min(count, batch_size) < 1 or len(pairs) < shots + 1 or (shuffled and shots < 2):
        raise ValueError(
            f"Prompts of {shots} demonstrations and a question need more than {shots} pairs, got {len(pairs)}, at "
            f"least 2 if shuffled, and at least 1 prompt and 1 in a batch, got {count} and {batch_size}."
        )
    draw, (open_end, gap) = np.random.default_rng(seed), _asking(template)
    texts, answers = [], []
    for _ in range(count):
        chosen = [pairs[int(i)] for i in draw.permutation(len(pairs))[: shots + 1]]
        given = [answer for _, answer in chosen[:-1]]
        if shuffled:
            step = int(draw.integers(1, shots))
            given = given[step:] + given[:step]
        shown = "".join(template.format(q, a) for (q, _), a in zip(chosen[:-1], given, strict=True))
        question, answer = chosen[-1]
        texts.append(shown + open_end.format(question))
        answers.append(first_answer_token(tokenizer, texts[-1], gap + answer))
    return prompt_batches(tokenizer, texts, answers, batch_size)


def question_prompts(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], *, template: str = TEMPLATE, batch_size: int = 8
) -> list[FewShotBatch]:
    """The question of every pair alone, `Q: up\\nA:`, in their order.

    Raises:
        ValueError: as `few_shot_prompts`.
    """
    open_end, gap = _asking(template)
    texts = [open_end.format(question) for question, _ in pairs]
    answers = [first_answer_token(tokenizer, text, gap + pair[1]) for text, pair in zip(texts, pairs, strict=True)]
    return prompt_batches(tokenizer, texts, answers, batch_size)


def prompt_batches(
    tokenizer: Any, texts: Sequence[str], answers: Sequence[int], batch_size: int = 8
) -> list[FewShotBatch]:
    """Batches of prompts and their answers' first tokens.

    Raises:
        ValueError: a tokenizer without padding.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no padding token: tokenizer.pad_token = tokenizer.eos_token.")
    batches = []
    for begin in range(0, len(texts), batch_size):
        some = [tokenizer(text)["input_ids"] for text in texts[begin : begin + batch_size]]
        part = slice(begin, begin + batch_size)
        batches.append(FewShotBatch(left_padded(some, tokenizer.pad_token_id), list(answers[part]), list(texts[part])))
    return batches


def left_padded(rows: Sequence[Sequence[int]], padding: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of texts that end together."""
    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def first_answer_token(tokenizer: Any, prompt: str, answer: str) -> int:
    """Id of the first token that is an answer's, which goes on where the prompt ends."""
    whole, start = (tokenizer(text)["input_ids"] for text in (prompt + answer, prompt))
    pairs = enumerate(zip(whole, start, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(whole), len(start)))
    if same == len(whole):
        raise ValueError(f"The answer {answer!r} adds no token to {prompt!r}.")
    return int(whole[same])


def _asking(template: str) -> tuple[str, str]:
    """A demonstration's beginning, up to where its answer would be, and the blanks in front of that."""
    if template.count("{}") != 2:
        raise ValueError(f"The template has two places, {{}} and {{}}, got {template!r}.")
    place = template.rindex("{}")
    open_end = template[:place].rstrip(" ")
    return open_end, template[len(open_end) : place]
