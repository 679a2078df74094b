"""Calls under continuous batching: one row of new tokens of several texts, and the keys of all those texts."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs

# What an attention function is called with: there alone, as it is not given the cache; and with packed sequences, too.
PAGED, _QUERIES, _KEYS = "write_index", "cu_seq_lens_q", "cu_seq_lens_k"


def tells_paged_calls() -> bool:
    """Whether attention modules store new keys in the paged cache themselves, and hand on whose they are.

    In earlier releases the function that computes attention stores them, behind all variants.
    """
    stores = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters
    return stores and {PAGED, _QUERIES, _KEYS} <= set(PagedAttentionArgs.__annotations__)


def refuse_chain(chain: Any) -> None:
    """NotImplementedError if the variants of an attention module cannot be batched continuously."""
    site, advice = chain.site, "Use generate, or patchattn.unpatch_model(model) first."
    if not tells_paged_calls():
        raise NotImplementedError(
            "Continuous batching of a patched model needs a release of transformers whose attention modules store keys "
            f"in the paged cache themselves, as 5.24 does. {advice}"
        )
    if site.inline:
        raise NotImplementedError(
            f"{site.module_class} ({site.name}) computes attention in its own code, where nothing tells which keys are "
            f"of which text: it cannot be batched continuously with a patch. {advice}"
        )
    if chain.needs_own_cache:
        raise NotImplementedError(
            f"{', '.join(map(repr, chain.needs_own_cache))} in {site.name} cannot be batched continuously: it goes by "
            f"what is remembered with the kv cache of a text, or by which tokens a call brings. {advice}"
        )


def holds_pages(arguments: Mapping[str, Any]) -> bool:
    """Whether an attention module is called with a paged cache, by its type."""
    return PagedAttentionCache in map(type, arguments.values())  # no call of Python for each of them


def as_causal(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What variants are told of such a call: its mask hides later keys, so that it is as causal as its module."""
    return {name: value for name, value in kwargs.items() if name != "is_causal"}


def places_of_texts(kwargs: Mapping[str, Any], queries: int, keys: int) -> dict[str, torch.Tensor]:
    """Whose the queries and keys of such a call are.

    Args:
        kwargs: of the attention function, with `PAGED`.
        queries: Tq, those included that compiled code adds behind the last text.
        keys: Tk, likewise.

    Returns:
        `own` `(1, Tq)`, the place of each query's own key; `starts` `(1, Tk)` bool, which keys are the first of a text.
    """
    rows, ends = kwargs[_QUERIES].long(), kwargs[_KEYS].long()
    row = torch.arange(queries, device=rows.device)
    text = torch.searchsorted(rows[1:], row, right=True).clamp(max=len(rows) - 2) + 1
    own = (ends[text] - rows[text] + row).clamp(0, keys - 1)
    starts = torch.zeros(keys + 1, dtype=torch.bool, device=rows.device)
    starts[ends[:-1].clamp(max=keys)] = True
    return {"own": own[None], "starts": starts[None, :keys]}
