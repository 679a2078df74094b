"""ACT in float32 where sinks have nearly all attention, against float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchattn
from patchattn.core.chain import attention_call
from patchattn.core.module_call import ModuleCall

from .families import FAMILIES
from .test_act import calibrate


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_that_leave_little_beside_sinks_keep_full_precision(implementation: str) -> None:
    """The first key has all but some thousandths of every row: the rest, 60 % of which is added to it, is no difference
    of numbers that are a thousand times larger."""
    query, key, value = (torch.randn(1, 4, 64, 8, generator=torch.Generator().manual_seed(s)) / 4 for s in (0, 1, 2))
    query[..., 0], key[..., 0], key[:, :, 0, 0] = 4.0, 0.0, 5.2
    value[:, :, 0] = 8.0
    model = FAMILIES["llama"].make(implementation=implementation)
    settings = {"alpha": 1.0, "keep_first": False}
    patchattn.patch_model(model, "act", **settings, heads={1: [0, 1, 2, 3]})
    module = model.model.layers[1].self_attn
    act = module.patchattn._modules["act"]
    visible = torch.ones(64, 64, dtype=torch.bool).tril()
    mask = visible.expand(1, 1, -1, -1)
    call = attention_call(ModuleCall(module, query, key, value, mask, {}), act.site, implementation)
    call.context.sequence_state = lambda *args, **kwargs: None  # type: ignore[method-assign]

    def inner(call: Any) -> Any:
        out = nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, call.mask.given)
        return out.transpose(1, 2), None

    got = act.attend(call, inner)[0].transpose(1, 2).double()
    logits = query.double() @ key.double().mT * call.scaling
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).numpy()
    assert 4e-4 < 1 - weights[0, :, 1, 0].max() < 1e-2  # the second row is above the limit for "nowhere to move to"
    changed = [calibrate(w, visible.numpy(), [64], settings) for w in weights[0]]
    want = torch.from_numpy(np.stack(changed))[None] @ value.double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
