"""A-VL against loops in float64 over images, text and tokens, on tiny vision-language models."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.core.kv_caches import cache_argument, find_cache

from . import vlms
from .behaviour import assert_same, cases, snapshot
from .evictions import HOW, Told, Watch, extended, registered, seen_by_row

SETTINGS = [dict(case.settings) for case in cases("cache") if case.variant == "a_vl"]
LANGUAGE = r"language_model.*self_attn$"
NEUTRAL = {"image_dropped": 0.0, "text_dropped": 0.0}
PROMPT = [24]  # tokens of the longer of llava's two prompts
more = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def given_to(name: str, count: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Images, ids with so many random ones behind the prompt, and bool which of them are text or image."""
    found = vlms.inputs(name, dtype=torch.float64)
    ids, real = found.pop("input_ids"), found.pop("attention_mask").bool()
    new = torch.randint(3, 60, (len(ids), count), generator=torch.Generator().manual_seed(5))
    return found, torch.cat([ids, new], dim=1), extended(real, ids.shape[1] + count)


def fed(model: Any, cache: Any, images: Any, ids: torch.Tensor, real: torch.Tensor, sizes: Any) -> torch.Tensor:
    """Logits of calls of these sizes, behind what the cache has seen; images come with the first token."""
    start, parts = cache.get_seq_length(), []
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    for size in sizes:
        now = {"attention_mask": real[:, : start + size].long(), "position_ids": positions[:, start : start + size]}
        with torch.no_grad():
            now |= {**({} if start else images), **cache_argument(model, cache)}
            parts.append(model(ids[:, start : start + size], **now).logits)
        start += size
    return torch.cat(parts, dim=1)


def watched(settings: dict[str, Any], sizes: list[int], name: str = "llava") -> Any:
    """Logits, what attention saw by layer and call, the cache, and what it was given."""
    images, ids, real = given_to(name)
    images, ids, real = given_to(name, sum(sizes) - ids.shape[1])
    model = vlms.make(name, dtype=torch.float64)
    patchattn.patch_model(model, "a_vl", settings)
    patchattn.patch_model(model, "watch", modules=LANGUAGE)
    Watch.calls.clear()
    cache = DynamicCache()
    logits = fed(model, cache, images, ids, real, sizes)
    return logits, [[c for c in Watch.calls if c["layer"] == n] for n in (0, 1)], cache, (images, ids, real)


def weights_of(query: torch.Tensor, keys: torch.Tensor, columns: list[int]) -> dict[int, float]:
    logits = torch.stack([query @ keys[column] for column in columns]) * query.shape[-1] ** -0.5
    return dict(zip(columns, logits.softmax(0).tolist(), strict=True))


def highest(scores: dict[int, float], count: int) -> set[int]:
    return set(sorted(scores, key=lambda column: -scores[column])[:count])


def expected(calls: list[dict[str, Any]], ids: torch.Tensor, real: torch.Tensor, settings: dict[str, Any]) -> Any:
    """`(B, H, T, T)` bool: what every row sees, by loops over one layer's queries and keys."""
    config = {"image_dropped": 0.5, "image_hidden": 0.5, "interval": None, "text_dropped": 0.5, **settings}
    keys = torch.cat([call["key"][:, :, -call["query"].shape[2] :] for call in calls], dim=2)
    query = torch.cat([call["query"] for call in calls], dim=2)
    total, heads, rate = ids.shape[1], query.shape[1], config["text_dropped"]
    seen = torch.zeros(len(ids), heads, total, total, dtype=torch.bool)
    for row in range(len(ids)):
        first = int(real[row].nonzero()[0])
        image = [column for column in range(total) if ids[row, column] == vlms.IMAGE]
        front, text = list(range(first, image[0])), list(range(image[-1] + 1, total))
        images, core, end, steps = list(image), set(image), 0, 0
        texts: list[dict[int, float]] = [{}, {}]  # by kv head
        for call in calls:
            begin, end = end, end + call["query"].shape[2]
            single = end - begin == 1
            steps = steps + 1 if single else 0
            is_whole = not single or config["interval"] is None or steps % config["interval"] == 0
            shown = images if is_whole else [column for column in images if column in core]
            for own in range(max(begin, first), end):
                last = [0.0] * total
                gains: list[list[dict[int, float]]] = [[], []]
                for head in range(heads):
                    group = texts[head // 2]
                    held = [column for column in [*front, *shown, *group] if column <= own]
                    held = sorted({*held, own})
                    seen[row, head, own, held] = True
                    weights = weights_of(query[row, head, own], keys[row, head // 2], held)
                    for column in image:
                        last[column] += weights.get(column, 0.0) / heads
                    others = [column for column in group if column < own]
                    of = [weights[column] for column in (*others, *([own] if single else []))]
                    level = float(np.quantile(of, rate)) if of else 0.0
                    gains[head // 2].append({own: weights[own], **{c: weights[c] - level for c in others}})
                if own in text:
                    for group, gain in zip(texts, gains, strict=True):
                        for column in (*group, own):
                            group[column] = group.get(column, 0.0) + (gain[0][column] + gain[1][column]) / 2
            ranks = {column: last[column] for column in images}
            if not single:
                images = sorted(highest(ranks, int(round((1 - config["image_dropped"]) * len(image), 6))))
            if not single or (config["interval"] is not None and is_whole):
                core = highest({c: ranks[c] for c in images}, int(round((1 - config["image_hidden"]) * len(image), 6)))
            if rate:
                count = max(1, round((1 - rate) * sum(column < end for column in text)))
                for number, group in enumerate(texts):
                    near = sorted(group)[max(0, len(group) - count // 2) :] if count // 2 else []
                    rest = {column: group[column] for column in group if column not in near}
                    left = {*near, *highest(rest, count - len(near))}
                    texts[number] = {column: group[column] for column in group if column in left}
    return seen


@pytest.mark.parametrize("sizes", [[24, *[1] * 8], [24, 1, 1, 3, *[1] * 6]], ids=["tokens", "turns"])
@more
def test_what_every_token_sees(settings: dict[str, Any], sizes: list[int]) -> None:
    with registered():
        logits, layers, cache, (images, ids, real) = watched(settings, sizes)
        seen = [seen_by_row(calls) for calls in layers]
        for calls, one in zip(layers, seen, strict=True):
            rows = real[:, None, :, None]
            assert torch.equal(one & rows, expected(calls, ids, real, settings) & rows)
        Told.seen = dict(enumerate(seen))
        model = patchattn.patch_model(vlms.make("llava", dtype=torch.float64), "told", modules=LANGUAGE)
        dense = fed(model, DynamicCache(), images, ids, real, [ids.shape[1]])
    torch.testing.assert_close(logits[real], dense[real], rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == ids.shape[1]
    assert all(layer.keys.shape[2] < ids.shape[1] for layer in cache.layers)
    if not settings.get("text_dropped", 0.5):
        assert all(layer.keys.shape[1:3] == (2, 2 + 8 + 6 + sum(sizes[1:])) for layer in cache.layers)


@pytest.mark.parametrize("name", ["llava", "llava_next", "instructblip", "qwen2_5_vl"])
def test_where_everything_is_kept_nothing_changes_to_the_bit(name: str) -> None:
    given, found = vlms.inputs(name), []
    for settings in (None, NEUTRAL, {**SETTINGS[0], "image_hidden": 0.0, "image_dropped": 0.0, "text_dropped": 0.0}):
        model = vlms.make(name)
        if settings is not None:
            patchattn.patch_model(model, "a_vl", settings)
        found.append(model.generate(**given, **HOW, max_new_tokens=6, num_beams=2, output_logits=True))
    for other in found[1:]:
        assert torch.equal(found[0].sequences, other.sequences)
        assert all(map(torch.equal, found[0].logits, other.logits))


@pytest.mark.parametrize("name", ["llava", "llava_next", "instructblip", "qwen2_5_vl"])
def test_a_row_is_what_it_is_alone_and_images_lose_their_share(name: str) -> None:
    model, given = vlms.make(name, dtype=torch.float64), vlms.inputs(name, dtype=torch.float64)
    patchattn.patch_model(model, "a_vl", SETTINGS[0])
    how = {**HOW, "max_new_tokens": 9, "output_logits": True}
    together = model.generate(**given, **how)
    for row in range(2):
        alone_given = vlms.single(given, row)
        alone = model.generate(**alone_given, **how)
        for one, of_all in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(one[0], of_all[row], rtol=1e-5, atol=1e-5)
        image = int((alone_given["input_ids"] == vlms.IMAGE).sum())
        text = alone_given["input_ids"].shape[1] - image - 2 + 8
        stored = [layer.keys.shape[2] for layer in find_cache(alone.values()).layers]
        least = 2 + image // 2 + max(1, round(0.5 * text))
        assert all(least <= keys <= least + keys // 16 for keys in stored)  # a few are not worth moving all others


@more
def test_copies_beams_and_pickles_go_on(settings: dict[str, Any]) -> None:
    images, ids, real = given_to("llava", 8)
    model = vlms.make("llava", dtype=torch.float64)
    patchattn.patch_model(model, "a_vl", settings)
    cache = DynamicCache()
    fed(model, cache, images, ids, real, [24, 1, 1])
    twins = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)]
    twins[2].batch_repeat_interleave(2)
    twins[2].reorder_cache(torch.tensor([3, 1, 2, 0]))
    twins[2].batch_select_indices(torch.tensor([1, 0]))
    found = [fed(model, twin, images, ids, real, [1, 2, 1, 1, 1]) for twin in (*twins[:2], cache)]
    swapped = fed(model, twins[2], images, ids.flip(0), real.flip(0), [1, 2, 1, 1, 1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    assert not torch.equal(swapped, found[2])
    cache.reset()
    whole = fed(model, DynamicCache(), images, ids, real, [24, 1])
    assert torch.equal(fed(model, cache, images, ids, real, [24, 1]), whole)


def test_pieces_of_a_prompt_change_nothing() -> None:
    images, ids, real = given_to("llava", 5)
    found = []
    for sizes in ([24, *[1] * 5], [22, 2, *[1] * 5]):
        model = patchattn.patch_model(vlms.make("llava", dtype=torch.float64), "a_vl", SETTINGS[0])
        found.append(fed(model, DynamicCache(), images, ids, real, sizes)[real])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_patch_is_saved_and_taken_off(tmp_path: Any) -> None:
    model, given = vlms.make("llava"), vlms.inputs("llava")
    model.generate(**given, max_new_tokens=1, **HOW)  # transformers leaves marks of its own
    before = snapshot(model)
    patchattn.patch_model(model, "a_vl", SETTINGS[0])
    wanted = model.generate(**given, max_new_tokens=6, **HOW).sequences
    patchattn.save_patch(model, tmp_path)
    loaded = patchattn.load_patch(vlms.make("llava"), tmp_path)
    assert torch.equal(loaded.generate(**given, max_new_tokens=6, **HOW).sequences, wanted)
    patchattn.unpatch_model(model)
    assert_same(before, snapshot(model))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image_hidden .* is at least that: got 0\.2 and 0\.5"):
        patchattn.patch_model(vlms.make("llava"), "a_vl", image_hidden=0.2)
    with pytest.raises(ValueError, match="none of the chosen attention modules is in it"):
        patchattn.patch_model(vlms.make("llava"), "a_vl", modules="vision_tower")
    images, ids, real = given_to("llava", 3)
    model = patchattn.patch_model(vlms.make("llava", dtype=torch.float64), "a_vl", SETTINGS[0])
    one = {"input_ids": ids[1:, :24], "pixel_values": images["pixel_values"][1:]}
    for way in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": copy.deepcopy(model)}):
        with pytest.raises(NotImplementedError, match=r"a_vl.* no assisted decoding"):
            model.generate(**one, max_new_tokens=5, **HOW, **way)
    cache = DynamicCache()
    fed(model, cache, images, ids, real, [24, 1])
    with pytest.raises(NotImplementedError, match=r"a_vl.* no cropped cache"):
        cache.crop(-1)
    plain = patchattn.unpatch_model(model)
    with pytest.raises(NotImplementedError, match=r"a_vl.* has dropped keys of this kv cache"):
        fed(plain, cache, images, ids, real, [1])
    model = patchattn.patch_model(vlms.make("llava"), ["a_vl", "knorm"], {"knorm": {"budget": 8}})
    with pytest.raises(NotImplementedError, match=r"knorm.* from which a_vl.* drops some already"):
        model.generate(**vlms.inputs("llava"), max_new_tokens=2, **HOW)
    model = patchattn.patch_model(vlms.make("llava"), ["fastv", "a_vl"], {"fastv": {"layer": 1}})
    with pytest.raises(NotImplementedError, match=r"fastv in .* from which a_vl\(\) in .* drops some already"):
        model.generate(**vlms.inputs("llava"), max_new_tokens=2, **HOW)
    model = patchattn.patch_model(vlms.make("llava"), "a_vl")
    static = StaticCache(model.config.get_text_config(), max_cache_len=40)
    with pytest.raises(NotImplementedError, match="'a_vl' does not support static_cache"):
        model(**vlms.inputs("llava"), **cache_argument(model, static))
