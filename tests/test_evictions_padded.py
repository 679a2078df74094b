"""What keeps keys by scores, on prompts that are padded on the right and go on."""

import pytest
import torch
from transformers import DynamicCache

from patchattn.reading.eviction import ScoredEviction

from .behaviour import Case, cases, close, text
from .families import FAMILIES, outputs

SCORED = [case for case in cases("cache") if issubclass(case.info.variant, ScoredEviction)]


@pytest.mark.parametrize("case", SCORED, ids=str)
def test_prompts_padded_on_the_right_go_on_as_they_do_alone_or_are_refused(case: Case) -> None:
    """What chooses by the last queries would go by those of padding."""
    model, mask, tokens = case.patch(FAMILIES["llama"].make_exact()), torch.ones(2, 12, dtype=torch.long), text(12)
    mask[1, 6:9] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)

    def fed_in(row: slice, columns: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        cache, found, done = DynamicCache(config=model.config), [], 0
        ids, own, real = (each[row][:, columns] for each in (tokens, places, mask))
        for size in sizes:
            part = slice(done, done + size)
            done += size
            given = {"attention_mask": real[:, :done], "position_ids": own[:, part]}
            found.append(outputs(model, input_ids=ids[:, part], **given, past_key_values=cache)[0])
        return torch.cat(found, dim=1)

    every = torch.arange(12)
    if case.info.variant.window is not ScoredEviction.window:
        with pytest.raises(NotImplementedError, match="pad them on the left"):
            fed_in(slice(0, 2), every, [9, 1, 2])
        return
    together, alone = fed_in(slice(0, 2), every, [9, 1, 2]), fed_in(slice(1, 2), every[mask[1].bool()], [6, 1, 2])
    close(together[1:, mask[1].bool()], alone)
