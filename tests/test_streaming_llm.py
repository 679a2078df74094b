"""StreamingLLM against masks written by loops from the definition."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import find_cache
from patchattn.reading import selection

from .evictions import HOW, dense, extended, fed, padded, registered
from .families import FAMILIES
from .reference import DIM, HEADS, KV_HEADS, layer_in_and_out, rotate, tiny_llama

SINKS, RECENT, SLACK = 2, 4, 3
SETTINGS = {"sinks": SINKS, "recent": RECENT, "slack": SLACK}


def visible(real: torch.Tensor, sinks: int = SINKS, recent: int = RECENT) -> torch.Tensor:
    """`(B, 1, T, T)` bool: the first real keys, the last ones before a row, and its own."""
    batch, length = real.shape
    seen = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for row, tokens in enumerate(real.tolist()):
        places = [place for place in range(length) if tokens[place]]
        for query in range(length):
            before = [place for place in places if place < query]
            for key in {*places[:sinks], *before[-recent:], query} & set(range(query + 1)):
                seen[row, 0, query, key] = True
    return seen


@pytest.mark.parametrize("sizes", [[36], [12, *[1] * 24], [5, 7, 1, 6, *[1] * 17], [1] * 36])
def test_any_calls_are_one_forward_under_that_mask(sizes: list[int]) -> None:
    ids, real = padded()
    ids, real = torch.cat([ids, ids.clamp(min=3), ids.clamp(min=3)], dim=1), extended(real, 36)
    model = patchattn.patch_model(FAMILIES["llama"].make_exact(), "streaming_llm", SETTINGS)
    cache = DynamicCache()
    found = fed(model, cache, ids, real, sizes)
    with registered():
        expected = dense([visible(real)] * 2, ids, real)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)
    for layer in cache.layers:
        assert layer.keys.shape[2] == SINKS + RECENT + SLACK


@pytest.mark.parametrize("positions", ["original", "reindexed"])
def test_what_a_long_call_does_not_see_is_not_read(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an operation that leaves it out, which is none for sinks at other positions."""
    ids, settings = padded()[0].clamp(min=3).repeat(1, 3), {**SETTINGS, "positions": positions}
    real, exact = torch.ones_like(ids, dtype=torch.bool), FAMILIES["llama"].make_exact
    masked = fed(patchattn.patch_model(exact(), "streaming_llm", settings), DynamicCache(), ids, real, [36])
    used, original = [], selection.block_sparse_attention
    monkeypatch.setattr(selection, "_PAYS_FROM", 1)
    monkeypatch.setattr(selection, "block_sparse_attention", lambda *given: used.append(1) or original(*given))
    for sizes in ([36], [20, 1, 1, 14]):
        model = patchattn.patch_model(exact(), "streaming_llm", settings)
        found = fed(model, DynamicCache(), ids, real, sizes)
        torch.testing.assert_close(found, masked, rtol=1e-9, atol=1e-9)
    assert bool(used) == (positions == "original")


def test_a_row_sees_sinks_recent_and_its_own() -> None:
    real = torch.ones(1, 30, dtype=torch.bool)
    assert visible(real).sum(-1).max() == SINKS + RECENT + 1
    model, ids = FAMILIES["llama"].make_exact(), torch.arange(3, 33)[None]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits[0]
        found = patchattn.patch_model(model, "streaming_llm", SETTINGS)(ids, use_cache=False).logits[0]
    same = [torch.equal(one, other) for one, other in zip(plain.float(), found.float(), strict=True)]
    assert same[: SINKS + RECENT + 1] == [True] * (SINKS + RECENT + 1)
    assert not any(same[SINKS + RECENT + 1 :])


def test_as_many_as_the_slack_are_taken_back() -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make_exact(), "streaming_llm", SETTINGS)
    ids, real = torch.arange(3, 43)[None], torch.ones(1, 40, dtype=torch.bool)
    cache, straight = DynamicCache(), DynamicCache()
    fed(model, cache, ids, real, [1] * 25)
    cache.crop(-SLACK)
    other = torch.cat([ids[:, : 25 - SLACK], ids[:, :9]], dim=1)
    found = fed(model, cache, other, real, [4, 1, 2])
    fed(model, straight, other, real, [1] * (25 - SLACK))
    torch.testing.assert_close(found, fed(model, straight, other, real, [1] * 7), rtol=1e-9, atol=1e-9)
    with pytest.raises(NotImplementedError, match=r"streaming_llm\(.*cannot take back the last 6 tokens"):
        cache.crop(-6)


def test_right_padding_is_not_among_the_recent_keys() -> None:
    ids, real = padded()
    ids, real = torch.cat([ids.clamp(min=3), ids.clamp(min=3)], dim=1), torch.ones(3, 24, dtype=torch.bool)
    real[0, 20:] = real[1, 13:15] = False
    model = patchattn.patch_model(FAMILIES["llama"].make_exact(), "streaming_llm", SETTINGS)
    found = fed(model, DynamicCache(), ids, real, [12, 8, *[1] * 4])
    with registered():
        expected = dense([visible(real)] * 2, ids, real)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)


def test_memory_does_not_grow() -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "streaming_llm", SETTINGS)
    caches = [find_cache(model.generate(padded()[0], max_new_tokens=length, **HOW).values()) for length in (20, 60)]
    assert patchattn.cache_report(caches[0]).stored_bytes == patchattn.cache_report(caches[1]).stored_bytes


@pytest.mark.parametrize(("setting", "value"), [("sinks", -1), ("recent", 0), ("slack", -1), ("recent", 1 << 40)])
def test_settings_out_of_range(setting: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{setting} must lie between"):
        patchattn.patch_model(FAMILIES["llama"].make(), "streaming_llm", **{setting: value})


def _reindexed(ids: torch.Tensor) -> torch.Tensor:
    """Output `(T, E)` of a layer, by loops in float64: each row's keys at their places among those it sees."""
    model = patchattn.patch_model(tiny_llama(), "streaming_llm", {**SETTINGS, "positions": "reindexed"})
    inputs, found = layer_in_and_out(model, ids)
    module = model.model.layers[0].self_attn
    weights = {name: getattr(module, f"{name}_proj").weight.detach().numpy() for name in "qkvo"}
    queries, keys, values = ((inputs[0] @ weights[name].T).reshape(ids.shape[1], -1, DIM) for name in "qkv")
    rows = []
    for row in range(ids.shape[1]):
        seen = [key for key in range(row + 1) if key < SINKS or row - key <= RECENT]
        heads = []
        for head in range(HEADS):
            own, query = head // (HEADS // KV_HEADS), rotate(queries[row, head], len(seen) - 1)
            logits = np.array([query @ rotate(keys[key, own], place) for place, key in enumerate(seen)]) / DIM**0.5
            share = np.exp(logits - logits.max())
            heads.append(share / share.sum() @ values[seen, own])
        rows.append(weights["o"] @ np.concatenate(heads))
    np.testing.assert_allclose(found[0], np.stack(rows), atol=2e-6)
    return torch.from_numpy(np.stack(rows))


def test_positions_within_the_cache_written_out() -> None:
    """Keys at places 0, 1, ... of those that are seen, the query at the last: not what original positions give."""
    ids = torch.arange(3, 23)[None]
    reindexed = _reindexed(ids)
    model = patchattn.patch_model(tiny_llama(), "streaming_llm", SETTINGS)
    _, original = layer_in_and_out(model, ids)
    same = SINKS + RECENT + 1  # tokens up to which nothing is dropped
    np.testing.assert_allclose(original[0, :same], reindexed[:same].numpy(), atol=2e-6)
    assert np.abs(original[0, same:] - reindexed[same:].numpy()).max() > 1e-3


@pytest.mark.parametrize("sizes", [[12, *[1] * 24], [5, 7, 1, 6, *[1] * 17]])
def test_reindexed_under_any_calls(sizes: list[int]) -> None:
    """Also with padding, and where the model rotates by column; the keys that are stored are those of the model."""
    ids, real = padded()
    ids, real = torch.cat([ids, ids.clamp(min=3), ids.clamp(min=3)], dim=1), extended(real, 36)
    model = patchattn.patch_model(
        FAMILIES["llama"].make_exact(), "streaming_llm", {**SETTINGS, "positions": "reindexed"}
    )
    cache, plain = DynamicCache(), DynamicCache()
    found = fed(model, cache, ids, real, sizes)
    with torch.no_grad():
        by_column = model(ids, attention_mask=real.long(), use_cache=False).logits
    torch.testing.assert_close(found[real], by_column[real], rtol=1e-5, atol=1e-5)
    fed(FAMILIES["llama"].make_exact(), plain, ids, real, [36])
    held, own = (each.layers[0].keys for each in (cache, plain))  # behind the first layer they differ
    assert held.shape[2] == SINKS + RECENT + SLACK
    torch.testing.assert_close(held[:, :, SINKS:], own[:, :, SINKS - held.shape[2] :], rtol=1e-9, atol=1e-9)


def test_reindexed_needs_rotary_positions() -> None:
    with pytest.raises(NotImplementedError, match=r"streaming_llm must know how GPT2Attention .* are learned"):
        patchattn.patch_model(FAMILIES["gpt2"].make(), "streaming_llm", positions="reindexed")


def test_reindexed_comes_last() -> None:
    """A norm of queries after it would be one of two queries side by side."""
    model, ids = FAMILIES["llama"].make(), torch.arange(3, 23)[None]
    patchattn.patch_model(
        model, ["streaming_llm", "ssmax"], {"streaming_llm": {**SETTINGS, "positions": "reindexed"}, "ssmax": {}}
    )
    with pytest.raises(NotImplementedError, match="name it last"):
        model(ids)
