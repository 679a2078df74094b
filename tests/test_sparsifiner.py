"""Sparsifiner's oracle (arXiv 2303.13755): the tokens of the largest logits, against a loop over rows."""

import math

import pytest
import torch

import patchattn
from patchattn.softmax import rows

from .grid_masks import image
from .grids import make, vit


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.01])
@pytest.mark.parametrize("entries", [2**24, 60])
def test_patches_read_as_many_tokens_as_weigh_most(monkeypatch: pytest.MonkeyPatch, keep: float, entries: int) -> None:
    """Few rows at a time, too."""
    monkeypatch.setattr(rows, "_ENTRIES", entries)
    model, calls = patchattn.patch_model(make(vit), "sparsifiner", keep=keep), []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: calls.append((call, output))):
        model(**image(3, 4))
    assert len(calls) == 2
    for call, output in calls:
        query, key, value = (states.double() for states in (call.query, call.key, call.value))
        expected = torch.zeros(2, 13, 2, 16, dtype=torch.double)
        for sequence in range(2):
            for head in range(2):
                for i in range(13):
                    logits = key[sequence, head] @ query[sequence, head, i] * call.scaling
                    read = logits.argsort(descending=True)[: math.ceil(keep * 13) if i else 13]
                    expected[sequence, i, head] = logits[read].softmax(-1) @ value[sequence, head, read]
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


def test_nothing_to_read_is_no_setting() -> None:
    with pytest.raises(ValueError, match="keep must be above 0"):
        patchattn.patch_model(make(vit), "sparsifiner", keep=0.0)
