"""Texts that retrieval heads are found on: a statement hidden in a long text, asked for, and the answer."""

from collections.abc import Sequence
from typing import Any, Literal

from ..evaluation.tasks.haystack import PromptBuilder
from ..evaluation.tasks.ruler import NiahSingle
from ..inspection.retrieval import RetrievalTrial


def needle_trials(
    tokenizer: Any,
    *,
    lengths: Sequence[int] = (1024, 2048),
    samples: int = 20,
    values: Literal["words", "numbers", "uuids"] = "words",
    data: str | None = None,
    seed: int = 0,
    chat_template: Literal["auto", "always", "never"] = "auto",
) -> list[RetrievalTrial]:
    """Prompts of the task `ruler/niah_single`, each followed by its answer; the needle is that answer in the text.

    Args:
        tokenizer: of the model.
        lengths: of the prompts, in tokens.
        samples: prompts of each length, at depths that are drawn.
        values: what is hidden: two words, a number of seven digits, or a UUID.
        data: text that it is hidden in: a file, or a folder with `.txt` files; generated sentences by default.
        seed: of statements, depths, and where in the text a prompt begins.
        chat_template: use the tokenizer's; `auto`: if it has one.

    Raises:
        ValueError: a setting out of range, a text that cannot be read, prompts too short, or a tokenizer that cuts a
            value behind the question otherwise than in the text, so that it cannot be copied token by token.
    """
    settings = {"lengths": list(lengths), "samples": samples, "values": values, "data": data, "seed": seed}
    task = NiahSingle(**settings, chat_template=chat_template)
    builder = PromptBuilder(tokenizer, ["."], chat_template)
    trials = []
    for index in range(len(task)):
        tokens, (value,) = task.prompt(tokenizer, index).tokens, task.sample(index).expected
        (answer,) = builder.tokens([f" {value}"])
        places = [i for i in range(len(tokens) - len(answer) + 1) if tokens[i : i + len(answer)] == answer]
        if len(places) != 1:
            raise ValueError(
                f"The tokens of {value!r}, as an answer begins, are {len(places)} times in the text that says it once: "
                "take other values, such as words."
            )
        trials.append(RetrievalTrial([*tokens, *answer], (places[0], places[0] + len(answer)), len(answer)))
    return trials
