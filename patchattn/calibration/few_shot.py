"""Prompts of demonstrations, as task vectors and function vectors are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


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
    template: str = "Q: {}\nA: {}\n\n",
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
    if template.count("{}") != 2:
        raise ValueError(f"The template has two places, {{}} and {{}}, got {template!r}.")
    if tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no padding token: tokenizer.pad_token = tokenizer.eos_token.")
    draw, open_end = np.random.default_rng(seed), template[: template.rindex("{}")].rstrip(" ")
    gap = template[len(open_end) : template.rindex("{}")]
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
        whole, start = (tokenizer(text)["input_ids"] for text in (texts[-1] + gap + answer, texts[-1]))
        same = next(
            (i for i, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b), min(len(whole), len(start))
        )
        answers.append(int(whole[same]))
    batches = []
    for begin in range(0, count, batch_size):
        some = [tokenizer(text)["input_ids"] for text in texts[begin : begin + batch_size]]
        width = max(map(len, some))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(one)) + one for one in some])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in some])
        stop = begin + batch_size
        batches.append(FewShotBatch({"input_ids": ids, "attention_mask": mask}, answers[begin:stop], texts[begin:stop]))
    return batches
