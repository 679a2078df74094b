"""Sinks and recent keys by `call.rule()`, in prefill, decoding and static caches, against loops in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.core.registry import temporarily_registered
from patchattn_kernels import block_sparse_attention, sink_and_recent

from .families import FAMILIES
from .test_masks_of_users import HEADS, llama

SINKS, RECENT, LENGTH = [1, 2, 0, 1], [3, 1, 2, 4], 9
TOKENS = torch.randint(1, 64, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def by_loops(
    call: patchattn.AttentionCall, real: np.ndarray, first: int, dropped: int = 0, window: int = LENGTH
) -> np.ndarray:
    """`(B, H, Tq, D)` attention to sinks and recent keys of real tokens, whose first query is token `first`."""
    query, key, value = (t.double().numpy() for t in (call.query, call.key, call.value))
    output = np.zeros_like(query)
    for b, h, i in np.ndindex(*query.shape[:3]):
        own, group = first + i, h // (HEADS // key.shape[1])
        seen = [j for j in range(own + 1) if real[b, j]]
        kept = [j - dropped for n, j in enumerate(seen) if n < SINKS[h] or n >= len(seen) - RECENT[h]]
        kept = [j for j in kept if j + dropped > own - window]
        if kept:
            powers = np.exp(key[b, group, kept] @ query[b, h, i] * call.scaling)
            output[b, h, i] = powers @ value[b, group, kept] / powers.sum()
    return output


@contextmanager
def looking(tapped: bool) -> Iterator[tuple[str, list[patchattn.AttentionCall]]]:
    """The name of a variant that changes nothing, and the calls that it sees."""
    calls: list[patchattn.AttentionCall] = []

    class Looking(patchattn.Variant):
        config_class = patchattn.VariantConfig
        keeps_state = tapped

        def attend(self, call: patchattn.AttentionCall, inner: Any) -> Any:
            calls.append(call)
            return inner(call)

    words = {"title": "", "summary": "", "extra_parameters": ""}
    facts = {**words, "arxiv_id": None, "year": 2026, "needs_training": False}
    with temporarily_registered(patchattn.VariantInfo(name="looking", variant=Looking, **facts)) as name:
        yield name, calls


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
    keep, done = sink_and_recent(SINKS, RECENT, HEADS), 0
    with torch.no_grad(), looking(tapped) as (name, calls), patchattn.patched(model, name):
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


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_sinks_that_a_sliding_window_has_left_behind_are_none_any_more(kind: str, implementation: str) -> None:
    """The first keys that are left are not the first ones there were."""
    model = FAMILIES["mistral"].make(implementation=implementation)
    window = model.config.sliding_window
    made = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(model.config, LENGTH + 4),
    }
    cache, done = made[kind](), 0
    keep, real = sink_and_recent(SINKS, RECENT, HEADS), np.ones((2, LENGTH), dtype=bool)
    with torch.no_grad(), looking(True) as (name, calls), patchattn.patched(model, name):
        for rows in (LENGTH - 4, 2, 1, 1):
            done += rows
            model(TOKENS[:, done - rows : done], **cache_argument(model, cache))
            call = calls[-1]
            dropped = call.mask.dropped
            got = block_sparse_attention(call.query, call.key, call.value, keep, call.rule())
            want = by_loops(call, real, done - rows, dropped, window)
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-4)
    assert dropped == done - call.key.shape[2] > 0


def test_sinks_are_refused_where_nobody_counted_what_a_sliding_cache_has_let_go_of() -> None:
    model = FAMILIES["mistral"].make()
    cache = DynamicCache(config=model.config)
    keep, recent = sink_and_recent(SINKS, RECENT, HEADS), sink_and_recent(0, RECENT, HEADS)
    with torch.no_grad(), looking(False) as (name, calls), patchattn.patched(model, name):
        for part in TOKENS.split([6, 2, 1], dim=1):
            model(part, **cache_argument(model, cache))
    first, *later = calls[::2]
    first.seeing(keep).mask.counts()
    for call in later:
        tensors = (call.query, call.key, call.value)
        with pytest.raises(NotImplementedError, match="must say keeps_state"):
            block_sparse_attention(*tensors, keep, call.rule())
        with pytest.raises(NotImplementedError, match="must say keeps_state"):
            call.seeing(keep).mask.counts()
        seen = call.seeing(recent).mask.seen()
        block_sparse_attention(*tensors, recent, call.rule())
        assert seen.sum(-1)[..., -1].tolist() == [[min(size, 4) for size in RECENT]] * len(seen)
