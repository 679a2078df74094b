"""Caches that forget keys and variants that read some, on whole models: against masks written by loops, in float64."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.core.kv_caches import cache_argument, find_cache

from .families import FAMILIES, outputs
from .forgetting import registered
from .toy import registered_toy

SINKS, RECENT, MORE = 2, 4, 2
LENGTHS = (12, 9, 7)  # of three left-padded prompts
HOW = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with registered():
        yield


def model_of(*variants: Any, family: str = "llama", **settings: Any) -> Any:
    model = FAMILIES[family].make_exact()
    return patchattn.patch_model(model, list(variants) or "forget", **settings)


def padded() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[place >= 12 - length for place in range(12)] for length in LENGTHS])
    return {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long()}


def visible(real: torch.Tensor, recents: tuple[int, ...] = (4, 4, 6, 6)) -> torch.Tensor:
    """`(B, H, T, T)` bool, by the definition: real keys among the first or the last of those up to the row."""
    heads = len(recents)
    batch, length = real.shape
    seen = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for row, tokens in enumerate(real.tolist()):
        ranks = [sum(tokens[: place + 1]) for place in range(length)]
        for head in range(heads):
            recent = recents[head]
            for query in range(length):
                seen[row, head, query, query] = True  # of padding, so that it has a value
                for key in range(query + 1):
                    if tokens[key] and (ranks[key] <= SINKS or ranks[query] - ranks[key] < recent):
                        seen[row, head, query, key] = True
    return seen


def dense(model: Any, ids: torch.Tensor, real: torch.Tensor, recents: tuple[int, ...] = (4, 4, 6, 6)) -> torch.Tensor:
    """Logits of the unpatched model in one forward under that mask."""
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    with patchattn.unpatched(model), torch.no_grad():
        return model(
            input_ids=ids, attention_mask=visible(real, recents), position_ids=positions, use_cache=False
        ).logits


def extended(real: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(real.bool(), (0, length - real.shape[1]), value=True)


def stored(cache: Any) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [None, 5, 1])
def test_decoding_equals_one_forward_under_the_mask(chunk: int | None, implementation: str) -> None:
    model = model_of("forget")
    if implementation == "eager":
        model.float()  # in float64 its padded rows are not numbers, in transformers too
    model.set_attn_implementation(implementation)
    inputs = padded()
    found = model.generate(**inputs, max_new_tokens=30, output_logits=True, prefill_chunk_size=chunk, **HOW)
    model.set_attn_implementation("sdpa")
    expected = dense(model, found.sequences[:, :-1], extended(inputs["attention_mask"], 41))[:, 11:]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), expected.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(expected.argmax(-1), found.sequences[:, 12:])
    assert max(stored(find_cache(found.values()))) <= SINKS + RECENT + MORE + 3 * 4


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3}, {"num_beams": 3, "prefill_chunk_size": 5}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=["beams", "beams_and_chunks", "several"],
)
def test_beams_equal_those_over_keys_that_are_hidden(settings: dict[str, Any]) -> None:
    found = [
        model_of("forget", drops=drops).generate(**padded(), max_new_tokens=20, output_scores=True, **HOW, **settings)
        for drops in (True, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].sequences_scores, found[1].sequences_scores)
    kept, everything = (find_cache(each.values()) for each in found)
    assert max(stored(kept)) < min(stored(everything)) == 31


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 3}, {"assistant": True, "num_assistant_tokens": 3}])
def test_tokens_that_are_taken_back_change_nothing(settings: dict[str, Any]) -> None:
    model, ids = model_of("forget"), padded()["input_ids"][:1]
    plain = model.generate(ids, max_new_tokens=30, **HOW)
    if settings.pop("assistant", False):
        settings["assistant_model"] = model_of("forget", recent=3)
    found = model.generate(ids, max_new_tokens=30, **HOW, **settings)
    assert torch.equal(found.sequences, plain.sequences)
    assert max(stored(find_cache(found.values()))) < 20


def test_more_than_the_slack_is_not_taken_back() -> None:
    model, cache = model_of("forget"), DynamicCache()
    with torch.no_grad():
        for token in padded()["input_ids"][:1].repeat(1, 2).split(1, dim=1):
            model(token, **cache_argument(model, cache))
    cache.crop(-4)
    before = copy.deepcopy(cache)
    with pytest.raises(NotImplementedError, match=r"forget in model.layers.0.self_attn cannot take back the last 6"):
        cache.crop(-6)
    assert cache.get_seq_length() == before.get_seq_length() == 20


def test_taking_back_within_the_slack_is_exact() -> None:
    model, ids = model_of("forget"), padded()["input_ids"][:1].repeat(1, 2)
    cache, straight = DynamicCache(), DynamicCache()
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            model(token, **cache_argument(model, cache))
        cache.crop(-4)
        found = model(ids[:, 3:9], **cache_argument(model, cache)).logits
        for token in ids[:, :20].split(1, dim=1):
            model(token, **cache_argument(model, straight))
        expected = model(ids[:, 3:9], **cache_argument(model, straight)).logits
    torch.testing.assert_close(found, expected)
    whole = torch.cat([ids[:, :20], ids[:, 3:9]], dim=1)
    torch.testing.assert_close(found, dense(model, whole, torch.ones_like(whole))[:, 20:], rtol=1e-5, atol=1e-5)


def test_a_second_turn_from_copies_and_in_chunks() -> None:
    model, inputs = model_of("forget"), padded()
    first = model.generate(**inputs, max_new_tokens=8, **HOW)
    turn = torch.cat([first.sequences, padded()["input_ids"][:, -5:].clamp(min=3)], dim=1)
    real = extended(inputs["attention_mask"], turn.shape[1])
    expected = dense(model, turn, real)[:, -1]
    cache = copy.deepcopy(find_cache(first.values()))
    again = {**HOW, "max_new_tokens": 1, "output_logits": True}
    found = model.generate(turn, attention_mask=real.long(), **again, **cache_argument(model, cache))
    torch.testing.assert_close(found.logits[0].double(), expected, rtol=1e-5, atol=1e-5)
    positions, cache = real.long().cumsum(-1) - 1, copy.deepcopy(find_cache(first.values()))
    with torch.no_grad():
        for start in range(19, turn.shape[1], 2):
            end = min(start + 2, turn.shape[1])
            given = {"attention_mask": real[:, :end].long(), "position_ids": positions[:, start:end]}
            found = model(turn[:, start:end], **given, **cache_argument(model, cache)).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    cache, new = find_cache(first.values()), turn[:, 19:]
    with torch.no_grad():
        given = {"attention_mask": real.long(), "position_ids": positions[:, 19:], **cache_argument(model, cache)}
        found = model(new, **given).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [["toy", "forget"], ["forget", "toy"]])
def test_it_composes(order: list[str]) -> None:
    with registered_toy(frozenset()):
        model, plain = model_of(*order), model_of("toy")
        inputs = padded()
        found = model.generate(**inputs, max_new_tokens=20, output_logits=True, **HOW)
        real = extended(inputs["attention_mask"], 31)
        with torch.no_grad():
            expected = plain(
                found.sequences[:, :-1],
                attention_mask=visible(real),
                position_ids=(real.long().cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
            ).logits[:, 11:]
    torch.testing.assert_close(torch.stack(found.logits, dim=1).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"prefill_chunk_size": 4}, {"num_beams": 3}], ids=["greedy", "chunks", "beams"]
)
def test_selected_pages_are_those_of_one_forward(settings: dict[str, Any]) -> None:
    """With a cache facts of pages are remembered and keys gathered; without, a loop looks at every key."""
    model, inputs = model_of("select"), padded()
    found = model.generate(**inputs, max_new_tokens=14, output_logits=True, **HOW, **settings)
    if "num_beams" in settings:
        uncached = model.generate(**inputs, max_new_tokens=14, use_cache=False, **HOW, **settings)
        assert torch.equal(found.sequences, uncached.sequences)
        return
    real = extended(inputs["attention_mask"], 25)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        given = {"attention_mask": real.long(), "position_ids": positions, "use_cache": False}
        expected = model(found.sequences[:, :-1], **given).logits[:, 11:]
    torch.testing.assert_close(torch.stack(found.logits, dim=1).double(), expected, rtol=1e-5, atol=1e-5)


def test_selected_pages_after_tokens_were_taken_back() -> None:
    model, ids = model_of("select"), padded()["input_ids"][:1]
    found = model.generate(ids, max_new_tokens=30, prompt_lookup_num_tokens=4, **HOW)
    assert torch.equal(found.sequences, model.generate(ids, max_new_tokens=30, use_cache=False, **HOW).sequences)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_heads_apart_forget_what_others_keep(chunk: int | None, implementation: str) -> None:
    model, inputs = model_of("apart").float(), padded()
    model.set_attn_implementation(implementation)
    found = model.generate(**inputs, max_new_tokens=30, output_logits=True, prefill_chunk_size=chunk, **HOW)
    model.set_attn_implementation("sdpa")
    real, recents = extended(inputs["attention_mask"], 41), (4, 4, 99, 99)
    expected = dense(model, found.sequences[:, :-1], real, recents)[:, 11:]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), expected, rtol=1e-4, atol=1e-4)
    for layer in find_cache(found.values()).layers:
        assert (*layer.keys.shape[1:3],) == (1, 41)
        assert layer.apart[1].keys.shape[2] <= SINKS + RECENT + 4 + 2


def test_heads_apart_follow_beams_and_tokens_taken_back() -> None:
    model, inputs = model_of("apart"), padded()
    beams = {**HOW, "num_beams": 3, "max_new_tokens": 20}
    found = [model.generate(**inputs, use_cache=cached, **beams).sequences for cached in (True, False)]
    assert torch.equal(*found)
    ids = inputs["input_ids"][:1]
    again = model.generate(ids, max_new_tokens=25, prompt_lookup_num_tokens=3, **HOW).sequences
    assert torch.equal(again, model.generate(ids, max_new_tokens=25, use_cache=False, **HOW).sequences)
    with pytest.raises(NotImplementedError, match="attention weights over other keys in some heads"):
        model.generate(ids, max_new_tokens=3, output_attentions=True, **HOW)
    with registered_toy(frozenset()), pytest.raises(NotImplementedError, match="patch one alone"):
        model_of("toy", "apart").generate(ids, max_new_tokens=3, **HOW)


def test_who_drops_keys_is_alone() -> None:
    for variants, reason in (
        (("forget", "forget_too"), "forget in model.layers.0.self_attn was to drop keys .* from which forget_too"),
        (("forget", "act"), "act in model.layers.0.self_attn remembers something of every key"),
        (("select", "act"), "'act' remembers something of every key and cannot run inside"),
        (("select", "forget"), "'forget' .*hands on only some|a variant outside of it hands on only some"),
    ):
        model = model_of(*variants)
        with pytest.raises(NotImplementedError, match=reason):
            model.generate(**padded(), max_new_tokens=3, **HOW)


def test_caches_and_families_that_cannot_forget_are_refused() -> None:
    model, ids = model_of("forget"), padded()["input_ids"]
    with pytest.raises(NotImplementedError, match="which StaticLayer cannot follow: use a dynamic kv cache"):
        model(ids, **cache_argument(model, StaticCache(model.config, max_cache_len=20)))
    model = model_of("forget", family="mistral")
    with pytest.raises(NotImplementedError, match="which DynamicSlidingWindowLayer cannot follow"):
        model(ids, **cache_argument(model, DynamicCache(config=model.config)))
    model = model_of("forget", family="t5")
    with pytest.raises(NotImplementedError, match="position bias from the number of keys"):
        outputs(model, **FAMILIES["t5"].inputs())


def test_a_cache_that_forgot_is_not_for_other_models() -> None:
    model, ids = model_of("forget"), padded()["input_ids"]
    cache = find_cache(model.generate(ids, max_new_tokens=12, **HOW).values())
    patchattn.unpatch_model(model)
    length = cache.get_seq_length()
    with pytest.raises(
        NotImplementedError, match=r"forget in model.layers.0.self_attn has dropped keys of this kv cache"
    ):
        model(ids[:, :1], **cache_argument(model, cache))
    assert cache.get_seq_length() == length
    cache.reset()
    with torch.no_grad():
        found = model(ids, **cache_argument(model, cache)).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits)
