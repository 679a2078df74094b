"""Caches that forget say that they can be cropped, and refuse what they cannot bring back in words of their own."""

import pytest
import torch
from transformers import DynamicCache

from .behaviour import Case, cases
from .evictions import extended, fed, padded
from .families import FAMILIES


@pytest.mark.parametrize(
    "case", [case for case in cases("cache") if not case.example and case.refusal("llama") is None], ids=str
)
def test_a_crop_into_what_was_dropped_is_refused_by_name(case: Case) -> None:
    model, (ids, real) = case.patch(FAMILIES["llama"].make_exact()), padded()
    ids, real = torch.cat([ids, ids.clamp(min=3)], dim=1), extended(real, 24)
    cache = DynamicCache()
    assert cache.is_croppable
    fed(model, cache, ids, real, [12, *[1] * 12])
    assert cache.is_croppable
    before = [layer.get_seq_length() for layer in cache.layers]
    with pytest.raises(NotImplementedError, match=rf"^{case.variant}\(.* in model\.layers\.\d\.self_attn "):
        cache.crop(-21)
    assert cache.get_seq_length() == before[0] == 24
