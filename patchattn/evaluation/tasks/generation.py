"""Greedy answers of a causal language model to prompts, timed, and prompts that are made to fit it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...cache.memory import cache_report
from ...core.kv_caches import find_cache
from .cost import measured
from .prefixes import Prefixes
from .stopping import Said


@dataclass(frozen=True)
class FittedPrompt:
    """What a model is given.

    Attributes:
        tokens: with special tokens and chat template.
        truncated: whether tokens were left out in the middle.
    """

    tokens: list[int]
    truncated: bool


def fit_prompt(
    tokenizer: Any, prompt: str, *, max_length: int | None = None, room: int | None = None, chat: bool = False
) -> FittedPrompt:
    """Cut a prompt as LongBench does, in the middle, and put it into the chat template.

    Of a prompt of more than `max_length` tokens the first and the last half of so many are decoded, without special
    tokens, and joined. If the result in its template takes more than `room`, less is kept until it does not.

    Args:
        tokenizer: of the model.
        prompt: the whole one.
        max_length: tokens of the prompt to keep, one less if odd; all without.
        room: most tokens that the model can be given; no limit without.
        chat: whether to use the chat template.

    Raises:
        ValueError: there is room for less than two tokens of the prompt.
    """
    tokens = tokenizer(prompt)["input_ids"]
    kept = min(length for length in (len(tokens), max_length, room) if length is not None)
    while kept >= min(2, len(tokens)):
        text, half = prompt, kept // 2
        if kept < len(tokens):
            ends = (tokens[:half], tokens[-half:])
            text = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in ends)
        if chat:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # templates write the special tokens themselves
        found = tokenizer(text, add_special_tokens=not chat)["input_ids"]
        if room is None or len(found) <= room:
            return FittedPrompt(found, kept < len(tokens))
        # characters cut in two can make many tokens: half of what was kept is enough of a step
        kept = max(kept - (len(found) - room), kept // 2)
    raise ValueError(f"There is no room for a prompt: the model can be given {room} tokens.")


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stops_at_newline: bool = False,
    wanted: Sequence[Sequence[str]] | None = None,
    prefixes: Prefixes | None = None,
) -> list[dict[str, Any]]:
    """Greedy answers to a batch of prompts, padded on the left.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: of the model, with a padding token.
        prompts: tokens of each, at least one.
        max_new_tokens: longest answer.
        stops_at_newline: whether a line break ends an answer, too.
        wanted: texts of each prompt's answer: one that holds them all, letters of either case, ends there.
        prefixes: what the unpatched model has read of the prompts stands there, and is not read again: for patches that
            change nothing while a prompt is read, but for its last tokens.

    Returns:
        Per prompt `pred`, the answer without special tokens, `prompt_tokens`, `new_tokens`, what the batch cost (see
        `patchattn.evaluation.tasks.cost.Cost.row`), and, where there is a kv cache, what that of the batch takes up in
        the end and would without forgetting: `cache_bytes` and `cache_dense_bytes`.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id, device=model.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ends = _end_tokens(model, tokenizer, stops_at_newline)
    read = {} if prefixes is None else prefixes.of(model, ids, mask)
    said = None if wanted is None else Said(tokenizer, width, wanted)
    with torch.inference_mode(), measured(model) as cost:
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            min_new_tokens=1 if stops_at_newline else None,
            do_sample=False,
            num_beams=1,
            eos_token_id=ends or None,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=[cost, *([] if said is None else [said])],
            return_dict_in_generate=True,
            **read,
        )
    cache = find_cache(found.values())
    memory = None if cache is None else cache_report(cache)
    of_cache = {} if memory is None else {"cache_bytes": memory.stored_bytes, "cache_dense_bytes": memory.dense_bytes}
    rows = []
    for row, (prompt, answer) in enumerate(zip(prompts, found.sequences[:, width:].tolist(), strict=True)):
        if said is not None:
            answer = answer[: said.lengths[row]]
        rows.append(
            {
                "pred": tokenizer.decode(answer, skip_special_tokens=True),
                "prompt_tokens": len(prompt),
                "new_tokens": next((place for place, token in enumerate(answer, 1) if token in ends), len(answer)),
                **cost.row(),
                **of_cache,
            }
        )
    return rows


def check_generates(model: Any, tokenizer: Any) -> None:
    """Refuse what `generate` cannot take.

    Raises:
        ValueError: a model with an encoder, or a tokenizer without padding token.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has an encoder; expected a model with a decoder alone.")
    if tokenizer.pad_token is None:
        raise ValueError("The tokenizer has no padding token: set tokenizer.pad_token, for example to its eos_token.")


def positions(model: Any) -> int | None:
    """How many tokens a model was made for; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _end_tokens(model: Any, tokenizer: Any, stops_at_newline: bool) -> list[int]:
    """The model's and the tokenizer's, and a line break where it ends the answer."""
    known = model.generation_config.eos_token_id
    ends = known if isinstance(known, list) else [known]
    line = tokenizer.encode("\n", add_special_tokens=False)[-1:] if stops_at_newline else []
    return sorted({token for token in (*ends, tokenizer.eos_token_id, *line) if token is not None})
