"""Under sdpa the rows of left padding see no key: every variant gives zeros there, as the unpatched model does."""

import pytest
import torch

import patchattn

from .behaviour import Case, accepted, randomise
from .families import FAMILIES

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
PADDING = 3
# Of no token: slots that have values give these, and GIN's network takes what the row's token is itself.
GIVE_SOMETHING = ("attention_bias", "meta_tokens", "gin")


@pytest.mark.parametrize("case", accepted("llama", "attention"), ids=str)
def test_rows_of_padding_give_zeros_and_all_is_finite(case: Case) -> None:
    model = FAMILIES["llama"].make()
    model.set_attn_implementation("sdpa")
    case.patch(model)
    randomise(model)
    mask = torch.cat([torch.zeros(2, PADDING, dtype=torch.long), torch.ones_like(TOKENS)], dim=1)
    padded = torch.cat([torch.ones(2, PADDING, dtype=torch.long), TOKENS], dim=1)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: seen.append(output), layers=0):
        model(padded, attention_mask=mask)
    assert bool(seen[0][:, :PADDING].any()) == (case.variant in GIVE_SOMETHING)
    assert bool(seen[0].isfinite().all())
