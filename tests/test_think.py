"""ThinK: which channels go, by loops, and one forward in which later rows read keys without them."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.registry import temporarily_registered

from .evictions import HOW, Watch, allocated, extended, fed, padded, registered
from .families import FAMILIES

SETTINGS = {"ratio": 0.5, "recent": 3, "window": 4}


class Thin(patchattn.Variant):
    """From some row on, earlier keys lack some channels."""

    config_class = patchattn.VariantConfig
    from_row, before = 0, 0
    kept: dict[int, torch.Tensor] = {}

    def attend(self, call: Any, inner: Any) -> Any:
        dropped = (
            ~self.kept[self.site.layer_index][:, :, None] & (torch.arange(call.key.shape[2]) < self.before)[:, None]
        )
        (first, _), (rest, _) = inner(call), inner(call.replace(key=call.key.masked_fill(dropped, 0.0)))
        return torch.cat([first[:, : self.from_row], rest[:, self.from_row :]], dim=1), None


@contextmanager
def thin() -> Iterator[None]:
    words = {"title": "", "summary": "", "extra_parameters": "", "arxiv_id": None, "year": 2026}
    with temporarily_registered(patchattn.VariantInfo(name="thin", variant=Thin, needs_training=False, **words)):
        yield


def kept_by_loops(
    query: torch.Tensor, key: torch.Tensor, real: list[bool], ratio: float, window: int
) -> list[set[int]]:
    """Of one row, by kv head, of queries `(H, T, D)` and keys `(Hkv, T, D)`."""
    places = [place for place, each in enumerate(real) if each]
    last = [place for place in places if place >= len(real) - window]
    group, found = len(query) // len(key), []
    for head in range(len(key)):
        weight = []
        for channel in range(key.shape[-1]):
            of_query = sum(
                float(query[head * group + member, place, channel]) ** 2 for member in range(group) for place in last
            )
            of_key = sum(float(key[head, place, channel]) ** 2 for place in places)
            weight.append(of_query * of_key)
        order = sorted(range(len(weight)), key=lambda channel: -weight[channel])
        found.append(set(order[: len(weight) - math.floor(ratio * len(weight) + 1e-9)]))
    return found


def test_the_example_of_two_channels() -> None:
    """Squares of 4 and 1 in queries, of 1 and 2 in keys."""
    query, key = torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[1.0, 2.0**0.5]]])
    assert kept_by_loops(query, key, [True], 0.5, 1) == [{0}]


def reference(
    family: str, ids: torch.Tensor, real: torch.Tensor, length: int, settings: dict[str, Any]
) -> torch.Tensor:
    """Logits of one forward, in which rows behind a prompt of that length read thin keys."""
    with registered():
        watched = patchattn.patch_model(FAMILIES[family].make_exact(), "watch")
        Watch.calls.clear()
        fed(watched, DynamicCache(), ids, real, [length])
        Thin.kept = {}
        for call in Watch.calls:
            kept = torch.zeros(*call["key"].shape[:2], call["key"].shape[-1], dtype=torch.bool)
            for row in range(len(ids)):
                of_row = (call["query"][row], call["key"][row], real[row, :length].tolist())
                for head, channels in enumerate(kept_by_loops(*of_row, settings["ratio"], settings["window"])):
                    kept[row, head, sorted(channels)] = True
            Thin.kept[call["layer"]] = kept
    Thin.from_row, Thin.before = length, length - settings["recent"]
    with thin():
        model = patchattn.patch_model(FAMILIES[family].make_exact(), "thin")
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            return model(ids, attention_mask=real.long(), position_ids=positions, use_cache=False).logits


def text(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, real = padded()
    more = torch.randint(3, 60, (3, length - 12), generator=torch.Generator().manual_seed(1))
    return torch.cat([ids, more], dim=1), extended(real, length)


@pytest.mark.parametrize(
    ("family", "sizes", "settings"),
    [
        ("llama", [12, *[1] * 6], SETTINGS),
        ("llama", [5, 4, 3, 1, 1, 4], SETTINGS),  # a prompt in chunks, and a second turn
        ("llama", [12, *[1] * 6], {"ratio": 0.3, "recent": 0, "window": 20}),
        ("qwen3", [12, *[1] * 6], SETTINGS),
        ("gpt2", [12, *[1] * 6], SETTINGS),
    ],
    ids=str,
)
def test_later_rows_read_keys_without_the_channels_that_matter_least(
    family: str, sizes: list[int], settings: dict[str, Any]
) -> None:
    ids, real = text(18)
    expected = reference(family, ids, real, 12, settings)
    model = patchattn.patch_model(FAMILIES[family].make_exact(), "think", settings)
    found = fed(model, DynamicCache(), ids, real, sizes)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)
    plain = fed(FAMILIES[family].make_exact(), DynamicCache(), ids, real, sizes)
    assert not torch.allclose(found[:, 12:], plain[:, 12:], rtol=1e-3, atol=1e-3)


def test_channels_that_are_dropped_take_up_nothing() -> None:
    model, cache = patchattn.patch_model(FAMILIES["llama"].make_exact(), "think", ratio=0.75, recent=8), DynamicCache()
    ids = torch.randint(3, 60, (2, 400), generator=torch.Generator().manual_seed(0))
    fed(model, cache, ids, torch.ones(2, 400, dtype=torch.bool), [398, 1, 1])
    heads, width, size = 2, cache.layers[0].keys.shape[3], cache.layers[0].keys.element_size()
    report = patchattn.cache_report(cache)
    for layer, memory in zip(cache.layers, report.layers, strict=True):
        behind = allocated(layer)
        narrow, channels = 2 * heads * 390 * (width // 4 + width) * size, 2 * heads * width // 4 * 8
        assert memory.stored_bytes == narrow + channels + behind + 2  # of two rows that it is done
        assert memory.dense_bytes == 2 * heads * 400 * 2 * width * size
        assert layer.keys.shape[2] == 8 + 2
        assert layer.get_seq_length() == 400


def test_tokens_behind_the_prompt_are_taken_back_and_no_others() -> None:
    ids, real = text(22)
    model, cache = patchattn.patch_model(FAMILIES["llama"].make_exact(), "think", SETTINGS), DynamicCache()
    fed(model, cache, ids, real, [12])
    with pytest.raises(NotImplementedError, match=r"think\(.* chooses channels at the end of a prompt"):
        cache.crop(-1)
    expected = fed(model, cache, ids, real, [1] * 10)
    cache.crop(-8)
    found = fed(model, cache, ids, real, [3, *[1] * 5])
    torch.testing.assert_close(found, expected[:, 2:], rtol=1e-9, atol=1e-9)
    with pytest.raises(
        NotImplementedError, match="cannot take back the last 14 tokens: it has dropped parts of the ke"
    ):
        cache.crop(-14)


def test_padding_behind_a_prompt_is_refused() -> None:
    ids, real = text(14)
    real[1, 10:12] = False
    model = patchattn.patch_model(FAMILIES["llama"].make_exact(), "think", SETTINGS)
    with pytest.raises(NotImplementedError, match="keeps the last 3 keys of a prompt whole, and padding stands among"):
        fed(model, DynamicCache(), ids, real, [12, 1])


def test_a_ratio_that_leaves_nothing_is_refused() -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make_exact(), "think", ratio=1.0, recent=3)
    with pytest.raises(ValueError, match=r"ratio=1.0 leaves no channel of keys of 8"):
        model.generate(padded()[0], max_new_tokens=3, **HOW)


def test_the_end_of_a_prompt_is_enough() -> None:
    """A cache that the unpatched model has filled goes on as one of its own, and is refused with less."""
    ids, real = text(18)
    filled = DynamicCache()
    fed(FAMILIES["llama"].make_exact(), filled, ids, real, [8])
    short, model = copy.deepcopy(filled), patchattn.patch_model(FAMILIES["llama"].make_exact(), "think", SETTINGS)
    found = fed(model, filled, ids, real, [4, *[1] * 6])
    expected = fed(model, DynamicCache(), ids, real, [12, *[1] * 6])[:, 8:]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="Give it at least the last 4 tokens of the prompt in one call"):
        fed(model, short, ids, real, [3])
