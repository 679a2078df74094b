"""Sinks and recent keys by `call.rule()`, in prefill, decoding and static caches, against loops in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.core.registry import temporarily_registered
from patchattn_kernels import block_sparse_attention, sink_and_recent

from .test_masks_of_users import HEADS, llama

SINKS, RECENT, LENGTH = [1, 2, 0, 1], [3, 1, 2, 4], 9
TOKENS = torch.randint(1, 64, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def by_loops(call: patchattn.AttentionCall, real: np.ndarray, first: int) -> np.ndarray:
    """`(B, H, Tq, D)` attention to sinks and recent keys of real tokens, whose first query is token `first`."""
    query, key, value = (t.double().numpy() for t in (call.query, call.key, call.value))
    output = np.zeros_like(query)
    for b, h, i in np.ndindex(*query.shape[:3]):
        own, group = first + i, h // (HEADS // key.shape[1])
        seen = [j for j in range(own + 1) if real[b, j]]
        kept = [j for n, j in enumerate(seen) if n < SINKS[h] or n >= len(seen) - RECENT[h]]
        if kept:
            powers = np.exp(key[b, group, kept] @ query[b, h, i] * call.scaling)
            output[b, h, i] = powers @ value[b, group, kept] / powers.sum()
    return output


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("tapped", [True, False])
def test_windows_end_at_the_own_key(tapped: bool, kind: str, padding: int, implementation: str) -> None:
    model = llama(kv_heads=2, attn_implementation=implementation)
    cache: Any = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=LENGTH + 4)
    shown = torch.ones(2, LENGTH, dtype=torch.long)
    shown[0, :padding] = 0
    real = shown.bool().numpy()
    calls: list[patchattn.AttentionCall] = []

    class Looking(patchattn.Variant):
        config_class = patchattn.VariantConfig
        keeps_state = tapped

        def attend(self, call: patchattn.AttentionCall, inner: Any) -> Any:
            calls.append(call)
            return inner(call)

    keep, done = sink_and_recent(SINKS, RECENT, HEADS), 0
    words = {"title": "", "summary": "", "extra_parameters": ""}
    facts = {**words, "arxiv_id": None, "year": 2026, "needs_training": False}
    info = patchattn.VariantInfo(name="looking", variant=Looking, **facts)
    with torch.no_grad(), temporarily_registered(info), patchattn.patched(model, "looking"):
        for rows in (LENGTH - 3, 2, 1):
            done += rows
            how = {"attention_mask": shown[:, :done]} if padding or kind == "static" else {}
            model(TOKENS[:, done - rows : done], **cache_argument(model, cache), **how)
            call = calls[-1]
            got = block_sparse_attention(call.query, call.key, call.value, keep, call.rule())
            want = by_loops(call, real, done - rows)
            mine = real[:, done - rows : done]
            np.testing.assert_allclose(
                got.transpose(1, 2).numpy()[mine], want.transpose(0, 2, 1, 3)[mine], rtol=1e-4, atol=1e-4
            )
