"""Landmark tokens in texts: one behind every so many tokens, before training and while text is generated."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessor

IGNORED = -100  # a label that the losses of transformers leave out


class LandmarkedText(NamedTuple):
    """A text with landmarks, as a model takes it.

    Attributes:
        input_ids: its tokens.
        labels: the same, but that no landmark is to be foretold: what comes behind one is foretold from it.
    """

    input_ids: list[int]
    labels: list[int]


def insert_landmarks(input_ids: Sequence[int], *, token: int, every: int = 50) -> LandmarkedText:
    """Put a landmark behind every so many tokens of a text, but for the last ones: none ends it.

    To be done with what a tokenizer gives, before padding, of prompts as of training texts.

    Args:
        input_ids: of one text, special tokens included.
        token: id of the landmark.
        every: how many tokens are a section: 50 in the paper's language models, 63 in its code for LLaMA.

    Raises:
        ValueError: `every` is below 1, or the text has landmarks already.
    """
    _check(every)
    ids = [int(each) for each in input_ids]
    if token in ids:
        raise ValueError(f"The text has the landmark token {token} already, at {ids.index(token)}: insert it once.")
    found: list[int] = []
    for start in range(0, len(ids), every):
        found += [token] * (start > 0) + ids[start : start + every]
    return LandmarkedText(found, [IGNORED if each == token else each for each in found])


class LandmarkProcessor(LogitsProcessor):
    """Have `generate` write a landmark behind every so many tokens, and nowhere else.

        model.generate(..., logits_processor=[LandmarkProcessor(token=token, every=50)])

    Its tokens count as new ones (`max_new_tokens`); decode with `skip_special_tokens=True` leaves them out.

    Args:
        token: id of the landmark.
        every: how many tokens are a section, as in `insert_landmarks`.
        padding: id of the tokens in front of shorter prompts, which do not count. It must be of no other token.

    Raises:
        ValueError: `every` is below 1, or padding is the landmark.
    """

    def __init__(self, *, token: int, every: int = 50, padding: int | None = None) -> None:
        _check(every)
        if padding == token:
            raise ValueError(f"Padding and the landmark are the same token, {token}.")
        self.token, self.every, self.padding = token, every, padding

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        last = input_ids[:, -self.every :]
        counts = last != self.token
        if self.padding is not None:
            counts &= last != self.padding
        is_due = (counts.sum(-1, keepdim=True) == self.every).to(scores.device)
        is_landmark = torch.arange(scores.shape[-1], device=scores.device) == self.token
        forced = scores.new_full((), float("-inf")).where(~is_landmark, 0.0)
        return torch.where(is_due, forced, scores.masked_fill(is_landmark, float("-inf")))


def _check(every: int) -> None:
    if every < 1:
        raise ValueError(f"every must be 1 or more tokens, got {every}.")
