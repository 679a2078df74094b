"""Windows over heads and layers (MSWA, arXiv 2501.01039) against loops."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.core.kv_caches import cache_argument

from .evictions import HOW, allocated, dense, extended, fed, padded, registered, stored
from .families import FAMILIES
from .reference import tiny_llama
from .selecting import assert_reads, recorded

TOKENS = torch.arange(3, 23)[None]


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({"by_layer": False}, [4, 8, 16, 32]),
        ({}, [1, 2, 4, 8]),  # the first of four groups of layers
        ({"by_layer": False, "by_head": False}, [16] * 4),
        ({"by_head": False}, [4] * 4),
    ],
)
def test_windows_of_heads(settings: dict[str, bool], windows: list[int]) -> None:
    model = patchattn.patch_model(tiny_llama(), "mswa", window=16, **settings)
    assert_reads(model, TOKENS, lambda head, i, j: i - j < windows[head])


def test_windows_grow_with_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_llama(num_hidden_layers=8), recorded(monkeypatch)
    patchattn.patch_model(model, "mswa", window=16)
    with torch.no_grad():
        model(TOKENS)
    largest = [[int(seen[0, head].sum(-1).max()) for head in range(4)] for _, seen, _ in calls]
    wanted = []
    for layer in range(8):
        base = 16 * 2.0 ** (layer // 2 - 2)
        wanted.append([min(20, int(base * 2.0 ** (head - 2))) for head in range(4)])
    assert largest == wanted


def test_a_window_that_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        patchattn.patch_model(tiny_llama(), "mswa", window=24)
    with pytest.raises(NotImplementedError, match="does not support bidirectional or cross"):
        patchattn.patch_model(FAMILIES["vit"].make(), "mswa")


# --- keys that no later token reads are dropped -----------------------------------------------------------------------

DROPS = {"window": 64, "drop_keys": True, "slack": 3}
WINDOWS = [[4, 8, 16, 32], [16, 32, 64, 128]]  # of heads, in the first of two layers and in the second


def forgetful(**settings: Any) -> Any:
    return patchattn.patch_model(FAMILIES["llama"].make_exact(), "mswa", **{**DROPS, **settings})


def text(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, real = padded()
    more = torch.randint(3, 60, (3, length - 12), generator=torch.Generator().manual_seed(1))
    return torch.cat([ids, more], dim=1), extended(real, length)


@pytest.mark.parametrize(
    "sizes", [[60, *[1] * 20], [25, 35, *[1] * 12, 8], [1] * 80], ids=["whole", "chunks", "single"]
)
def test_calls_are_one_forward_under_the_windows(sizes: list[int]) -> None:
    ids, real = text(80)
    order = real.long().cumsum(-1)
    away = order[:, None, :, None] - order[:, None, None, :]
    causal = real[:, None, None] & torch.ones(80, 80, dtype=torch.bool).tril()
    seen = [causal & (away < torch.tensor(of_layer)[:, None, None]) for of_layer in WINDOWS]
    with registered():
        expected = dense([one | torch.eye(80, dtype=torch.bool) for one in seen], ids, real)
    cache = DynamicCache()
    found = fed(forgetful(), cache, ids, real, sizes)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)
    assert stored(cache.layers[0]) < 40 < 80 == cache.layers[0].get_seq_length()


def test_heads_with_shorter_windows_store_fewer_keys() -> None:
    """By layer and kv head, in bytes of their tensors; a row that is dropped waits until one in sixteen can go."""
    model, cache = forgetful(slack=0), DynamicCache()
    ids = torch.randint(3, 60, (1, 400), generator=torch.Generator().manual_seed(0))
    fed(model, cache, ids, torch.ones(1, 400, dtype=torch.bool), [398, 1, 1])
    token = 2 * cache.layers[0].keys.shape[3] * cache.layers[0].keys.element_size()
    for layer, windows, memory in zip(cache.layers, WINDOWS, patchattn.cache_report(cache).layers, strict=True):
        wanted = [windows[1] - 1, windows[3] - 1]  # two query heads share a kv head
        behind = layer.keys.shape[2]
        assert layer.first.keys.shape[1] + 2 * behind <= 17 / 16 * sum(wanted) + 2
        assert layer.first.keys.shape[1] + 2 * behind >= sum(wanted)
        spare = allocated(layer) // token
        columns, counts = 4 * 2 * layer.stored * len(layer.kept.tensors()), 8 * 2
        assert memory.stored_bytes == (layer.first.keys.shape[1] + spare) * token + columns + counts
    equal = forgetful(by_head=False, slack=0)
    cache = DynamicCache()
    fed(equal, cache, ids, torch.ones(1, 400, dtype=torch.bool), [400])
    assert [layer.first for layer in cache.layers] == [None, None]
    assert [layer.keys.shape[2] for layer in cache.layers] == [15, 63]


def test_tokens_are_taken_back_and_beams_go_on() -> None:
    ids, real = text(80)
    model, cache, straight = forgetful(), DynamicCache(), DynamicCache()
    fed(model, cache, ids, real, [60, *[1] * 6])
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    rows = torch.tensor([2, 0, 1])
    found = fed(model, cache, ids[rows], real[rows], [4, 1, 1])
    expected = fed(model, straight, ids, real, [69])[:, 63:]
    torch.testing.assert_close(found, expected[rows], rtol=1e-9, atol=1e-9)
    with pytest.raises(
        NotImplementedError, match=r"mswa\(.* cannot take back the last 30 tokens: it has forgotten keys"
    ):
        cache.crop(-30)
    plain = model.generate(ids[:1, :40], max_new_tokens=30, **HOW).sequences
    assert torch.equal(
        model.generate(ids[:1, :40], max_new_tokens=30, prompt_lookup_num_tokens=3, **HOW).sequences, plain
    )


def test_caches_that_cannot_drop_keys_are_refused() -> None:
    ids, real = text(80)
    model = forgetful()
    with pytest.raises(NotImplementedError, match="which StaticLayer cannot follow: use a dynamic kv cache"):
        model(ids, **cache_argument(model, StaticCache(model.config, max_cache_len=90)))
    cache = DynamicCache()
    fed(model, cache, ids, real, [70])
    with pytest.raises(NotImplementedError, match=r"mswa\(.* has dropped keys of this kv cache"):
        fed(patchattn.unpatch_model(model), cache, ids, real, [1])
    patchattn.patch_model(model, ["snapkv", "mswa"], {"mswa": DROPS})
    with pytest.raises(NotImplementedError, match=r"mswa\(.* was to drop keys of a kv cache from which snapkv"):
        fed(model, DynamicCache(), ids, real, [70])
