"""Variants that mix heads, where a kv cache holds keys of other tokens in each head."""

import pytest

import patchattn

from .behaviour import close, decoded, text
from .families import FAMILIES

EVICTIONS = [("knorm", {"budget": 5, "event": "call"}), ("snapkv", {"budget": 5, "window": 2})]


@pytest.mark.parametrize("mixes", ["talking_heads", "differential"])
@pytest.mark.parametrize(("drops", "settings"), EVICTIONS)
def test_keys_of_other_tokens_are_refused(mixes: str, drops: str, settings: dict) -> None:
    model = FAMILIES["llama"].make_exact()
    patchattn.patch_model(model, [drops, mixes], {drops: settings})
    with pytest.raises(NotImplementedError, match=f"{mixes} mixes heads key by key, and in model.layers.0.self_attn"):
        decoded(model, text(12), [8, 1, 1, 1, 1])


@pytest.mark.parametrize("mixes", ["talking_heads", "differential"])
def test_one_set_of_keys_for_all_heads_is_taken(mixes: str) -> None:
    tokens, settings = text(12), {"streaming_llm": {"sinks": 1, "recent": 4, "slack": 0}}
    forgets = FAMILIES["llama"].make_exact()
    patchattn.patch_model(forgets, ["streaming_llm", mixes], settings)
    hides = FAMILIES["llama"].make_exact()
    patchattn.patch_model(hides, ["streaming", mixes], {"streaming": {"sinks": 1, "recent": 5}})
    found = [decoded(model, tokens, [1] * 12) for model in (forgets, hides)]
    close(*found)
