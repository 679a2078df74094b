"""Where answers end before the model ends them: nothing more that they say would change their score."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria


class Said(StoppingCriteria):
    """Ends each answer of a batch that holds all texts that were asked for.

    Attributes:
        lengths: of each answer that was ended so, its tokens; None for the others.
    """

    def __init__(self, tokenizer: Any, width: int, wanted: Sequence[Sequence[str]]) -> None:
        self.lengths: list[int | None] = [None] * len(wanted)
        self._tokenizer, self._width = tokenizer, width
        self._wanted = [[text.lower() for text in texts] for texts in wanted]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, answer in enumerate(input_ids[:, self._width :].tolist()):
            if self.lengths[row] is None:
                text = self._tokenizer.decode(answer, skip_special_tokens=True).lower()
                if all(wanted in text for wanted in self._wanted[row]):
                    self.lengths[row] = len(answer)
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)
