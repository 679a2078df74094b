"""What every variant that drops keys of the kv cache must hold; a new one is in by being registered."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.cache.tracked import TrackedLayer
from patchattn.core.kv_caches import cache_argument, find_cache
from patchattn.reading.eviction import EvictionVariant, ScoredEviction

from .behaviour import Case, assert_same, cases, snapshot
from .evictions import HOW, LENGTHS, dense, extended, fed, fewest, padded, registered, seen_by_row, stored, watched
from .families import FAMILIES, outputs

CASES = [case for case in cases("cache") if "without_images" in case.info.capabilities]
SUMS = {"expected_attention", "h2o"}  # what it remembers of the rows so far cannot be taken back, whatever is kept
REFUSED = {
    ("expected_attention", "gpt2"): "must know how GPT2Attention .* its positions are learned",
    ("expected_attention", "gemma2"): "'expected_attention' does not support softcap",
}
OTHERS = {
    "duo",
    "think",
}  # store heads apart, where nobody can watch, or hide no key: their own tests show what they do
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 4, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
    "beams_and_chunks": {"num_beams": 2, "prefill_chunk_size": 7},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": True, "num_assistant_tokens": 3},
}


@pytest.fixture(autouse=True)
def helpers() -> Iterator[None]:
    with registered():
        yield


def model_of(case: Case) -> Any:
    return case.patch(FAMILIES["llama"].make_exact())


def decides_by_scores(case: Case) -> bool:
    return issubclass(case.info.variant, ScoredEviction) or case.variant == "think"


def knows_calls(case: Case) -> bool:
    """It depends on where one call ends what rows of the next see."""
    return decides_by_scores(case) or case.info.configure(dict(case.settings)).looks_ahead


def acts_after_the_prompt(case: Case) -> bool:
    """What it keeps does not depend on how the prompt is cut, as long as no piece is a single token."""
    own = "prompt" if case.variant == "think" else None
    return not knows_calls(case) or getattr(case.info.configure(dict(case.settings)), "event", own) == "prompt"


def asks_nothing(case: Case) -> bool:
    """All but ratios, which are refused where no key is left, and where texts or scores say how many keys stay."""
    return "compression_ratio" not in dict(case.settings) and case.variant not in ("adakv", "pyramidkv")


def of(some: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", some, ids=str)


every = of([pytest.param(c, marks=pytest.mark.full) if c.example else c for c in CASES])  # by default the first
first = of([case for case in CASES if not case.example])
# At places within the cache a key's angle changes from row to row, as under no mask: its own tests show what rows see.
IS_A_MASK = [c for c in CASES if c.variant not in OTHERS and ("positions", "reindexed") not in c.settings]
is_a_mask = of(IS_A_MASK)


def test_they_are_what_is_tested_here() -> None:
    assert CASES
    for case in CASES:
        assert issubclass(case.info.variant, EvictionVariant)
        assert case.info.variant.name == case.variant
        assert case.info.looks_ahead == decides_by_scores(case)


# --- everything is kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@first
def test_where_everything_is_kept_nothing_changes_to_the_bit(case: Case, way: str) -> None:
    alone = way in ("prompt_lookup", "assistant")
    ids, real = padded()
    ids, real = (ids[:1], real[:1]) if alone else (ids, real)
    how = {**HOW, **WAYS[way], "max_new_tokens": 10, "output_logits": not alone}
    found = []
    for patch in (False, True):
        model = FAMILIES["llama"].make_exact()
        given = {**how, "assistant_model": copy.deepcopy(model)} if "assistant_model" in how else how
        if patch:
            case.neutral.patch(model)
        if patch and alone and case.variant in SUMS:
            with pytest.raises(NotImplementedError, match="no assisted decoding"):
                model.generate(ids, attention_mask=real.long(), **given)
            return
        found.append(model.generate(ids, attention_mask=real.long(), **given))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert alone or all(map(torch.equal, found[0].logits, found[1].logits))
    assert find_cache(found[1].values()).get_seq_length() == find_cache(found[0].values()).get_seq_length()


@first
def test_a_second_turn_where_everything_is_kept(case: Case) -> None:
    ids, real = padded()
    found = []
    for patch in (False, True):
        model, cache = FAMILIES["llama"].make_exact(), DynamicCache()
        if patch:
            case.neutral.patch(model)
        first = model.generate(ids, attention_mask=real.long(), max_new_tokens=6, **HOW, **cache_argument(model, cache))
        turn = torch.cat([first.sequences, ids[:, -5:].clamp(min=3)], dim=1)
        mask = extended(real, turn.shape[1]).long()
        again = {**HOW, "max_new_tokens": 6, "output_logits": True, **cache_argument(model, cache)}
        found.append(model.generate(turn, attention_mask=mask, **again))
    assert all(map(torch.equal, found[0].logits, found[1].logits))


# --- something is dropped ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [[12], [12, 1, 1]], ids=["before_the_first_token", "after"])
@every
def test_selected_and_repeated_rows_go_on_as_they_are(case: Case, done: list[int]) -> None:
    model = model_of(case)
    ids, real = padded()
    more = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(1))
    ids, real = torch.cat([ids, more], dim=1), extended(real, 20)
    straight, changed = DynamicCache(), DynamicCache()
    rest = [1] * (20 - sum(done))
    expected = fed(model, straight, ids, real, [*done, *rest])[:, sum(done) :]
    fed(model, changed, ids, real, done)
    changed = copy.deepcopy(changed)
    changed.batch_repeat_interleave(2)
    changed.batch_select_indices(torch.tensor([5, 0, 3]))
    rows = torch.tensor([2, 0, 1])
    found = fed(model, changed, ids[rows], real[rows], rest)
    torch.testing.assert_close(found, expected[rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sizes", [[12], [5, 4, 3], [12, 1, 1, 1, 4]], ids=["whole", "chunks", "turns"])
@is_a_mask
def test_decoding_is_one_forward_without_the_keys_that_were_dropped(case: Case, sizes: list[int]) -> None:
    ids, real = padded()
    total = sum(sizes) + 12
    more = torch.randint(3, 60, (3, total - 12), generator=torch.Generator().manual_seed(1))
    ids, real = torch.cat([ids, more], dim=1), extended(real, total)
    found, layers, cache = watched(case.variant, dict(case.settings), ids, real, [*sizes, *[1] * 12])
    seen = [seen_by_row(calls) for calls in layers]
    expected = dense(seen, ids, real)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)
    causal = torch.ones(total, total, dtype=torch.bool).tril() & real[:, None, None]
    for one, layer in zip(seen, cache.layers, strict=True):
        of_real = one & real[:, None, :, None]
        assert not (of_real & ~causal).any()  # no padding, and nothing later
        assert (of_real[:, :, -1].sum(-1) < causal[:, :, -1].sum(-1)).any()  # something is hidden
        assert of_real.diagonal(dim1=2, dim2=3)[real[:, None].expand(-1, one.shape[1], -1)].all()  # own keys are seen
        assert stored(layer) < total == layer.get_seq_length()


@pytest.mark.parametrize(
    ("family", "layers"),
    [("qwen3", None), ("gpt2", None), ("llava", None), ("gemma2", [1]), ("gpt_oss", [1])],
)
@of([case for case in CASES if not case.example and case.variant not in OTHERS])
def test_other_families_decode_without_what_was_dropped(case: Case, family: str, layers: list[int] | None) -> None:
    """Norms of queries, learned positions, a vision tower, capped logits, learned sinks; full among sliding layers."""
    if reason := REFUSED.get((case.variant, family)):
        with pytest.raises(NotImplementedError, match=reason):
            outputs(case.patch(FAMILIES[family].make_exact(), layers=layers), **FAMILIES[family].inputs())
        return
    ids, real = padded()
    more = torch.randint(3, 60, (3, 10), generator=torch.Generator().manual_seed(1))
    ids, real = torch.cat([ids, more], dim=1), extended(real, 22)
    found, calls, cache = watched(case.variant, dict(case.settings), ids, real, [12, *[1] * 10], family, layers)
    expected = dense([seen_by_row(each) for each in calls], ids, real, family, layers)
    exact = found.dtype == torch.float64
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9 if exact else 1e-4, atol=1e-9 if exact else 1e-4)
    assert stored(cache.layers[1]) < 22 == cache.layers[1].get_seq_length()


@of([case for case in IS_A_MASK if not decides_by_scores(case)])
def test_the_order_of_names_does_not_matter_to_rules(case: Case) -> None:
    ids, real = padded()
    found = []
    for order in ([case.variant, "ssmax"], ["ssmax", case.variant]):
        model = FAMILIES["llama"].make_exact()
        patchattn.patch_model(model, order, {case.variant: dict(case.settings), "ssmax": {"initial_scale": 0.7}})
        found.append(fed(model, DynamicCache(), ids, real, [7, 5])[real])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@every
def test_a_row_is_what_it_is_alone(case: Case) -> None:
    model = model_of(case)
    ids, real = padded()
    how = {**HOW, "max_new_tokens": 15, "output_logits": True}
    together = model.generate(ids, attention_mask=real.long(), **how)
    for row, length in enumerate(LENGTHS):
        alone = model.generate(ids[row : row + 1, 12 - length :], **how)
        assert torch.equal(alone.sequences[0, length:], together.sequences[row, 12:])
        for one, of_all in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(one[0], of_all[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [5, 10])
@of([case for case in CASES if acts_after_the_prompt(case)])
def test_chunks_of_a_prompt_change_nothing(case: Case, chunk: int) -> None:
    model = model_of(case)
    ids, real = padded()
    how = {**HOW, "max_new_tokens": 15, "output_logits": True, "attention_mask": real.long()}
    found = [model.generate(ids, prefill_chunk_size=size, **how) for size in (None, chunk)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    for one, other in zip(found[0].logits, found[1].logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["beams", "several"])
@every
def test_beams_have_the_scores_of_their_own_tokens(case: Case, way: str) -> None:
    model = model_of(case)
    ids, real = padded()
    how = {**HOW, **WAYS[way], "max_new_tokens": 12, "output_scores": True, "length_penalty": 0.0}
    found = model.generate(ids, attention_mask=real.long(), **how)
    several = WAYS[way].get("num_return_sequences", 1)
    real = extended(real, found.sequences.shape[1]).repeat_interleave(several, dim=0)
    logits = fed(model, DynamicCache(), found.sequences, real, [12, *[1] * 11])[:, 11:]
    taken = logits.log_softmax(-1).gather(-1, found.sequences[:, 12:, None])[..., 0].sum(-1)
    torch.testing.assert_close(found.sequences_scores, taken.float(), rtol=1e-5, atol=1e-5)


@every
def test_copies_and_pickles_of_a_cache_go_on_as_it_does(case: Case) -> None:
    model = model_of(case)
    ids, real = padded()
    more = torch.randint(3, 60, (3, 10), generator=torch.Generator().manual_seed(1))
    ids, real = torch.cat([ids, more], dim=1), extended(real, 22)
    cache = DynamicCache()
    fed(model, cache, ids, real, [12, 1, 1])
    twins = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache]
    found = [fed(model, twin, ids, real, [1, 1, 3, 1, 1, 1]) for twin in twins]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    cache.reset()
    assert torch.equal(fed(model, cache, ids, real, [12, 1]), fed(model, DynamicCache(), ids, real, [12, 1]))


# --- around it --------------------------------------------------------------------------------------------------------


@first
def test_a_patch_is_saved_copied_and_taken_off(case: Case, tmp_path: Path) -> None:
    model = FAMILIES["llama"].make_exact()
    before, (ids, real) = snapshot(model), padded()
    how = {**HOW, "max_new_tokens": 8, "attention_mask": real.long()}
    case.patch(model)
    expected = model.generate(ids, **how).sequences
    patchattn.save_patch(model, tmp_path)
    others = [copy.deepcopy(model), patchattn.load_patch(FAMILIES["llama"].make_exact(), tmp_path)]
    for other in others:
        assert torch.equal(other.generate(ids, **how).sequences, expected)
    patchattn.unpatch_model(model)
    assert_same(before, snapshot(model))


@first
def test_a_cache_that_forgot_is_for_the_variant_that_dropped_its_keys(case: Case) -> None:
    model, (ids, real) = model_of(case), padded()
    cache = DynamicCache()
    ids, real = torch.cat([ids, ids], dim=1), extended(real, 24)
    fed(model, cache, ids, real, [12, *[1] * 8])
    owner = f"{case.variant}.* in model.layers.0.self_attn"
    patchattn.unpatch_model(model)
    with pytest.raises(NotImplementedError, match=f"{owner} has dropped keys of this kv cache"):
        fed(model, cache, ids, real, [1])
    other = {"sinks": 1, "recent": 7} if case.variant == "streaming_llm" else {}
    for changed in (
        case.neutral.patch(model),
        patchattn.patch_model(FAMILIES["llama"].make_exact(), "streaming_llm", other),
    ):
        with pytest.raises(
            (NotImplementedError, ValueError), match=r"from which|has dropped keys|was filled without it"
        ):
            fed(changed, copy.deepcopy(cache), ids, real, [1])


@first
def test_two_of_them_are_refused(case: Case) -> None:
    other = next(each for each in CASES if each.variant != case.variant)
    model = FAMILIES["llama"].make_exact()
    patchattn.patch_model(model, [case.variant, other.variant], {c.variant: dict(c.settings) for c in (case, other)})
    with pytest.raises(NotImplementedError, match=f"was to drop keys of a kv cache from which {case.variant}"):
        model.generate(padded()[0], max_new_tokens=2, **HOW)


@first
def test_what_has_no_cache_to_drop_keys_of_is_refused(case: Case) -> None:
    ids, _ = padded()
    model = model_of(case)
    with pytest.raises(NotImplementedError, match="which StaticLayer cannot follow: use a dynamic kv cache"):
        model(ids, **cache_argument(model, StaticCache(model.config, max_cache_len=20)))
    model = case.patch(FAMILIES["mistral"].make_exact())
    with pytest.raises(NotImplementedError, match="which DynamicSlidingWindowLayer cannot follow"):
        model(ids, **cache_argument(model, DynamicCache(config=model.config)))
    with pytest.raises(
        NotImplementedError, match=f"'{case.variant}' drops keys of a kv cache, and no attention module"
    ):
        case.patch(FAMILIES["bert"].make_exact())


@of([case for case in CASES if not case.example and case.variant != "duo"])  # whose gates are of other heads
def test_a_position_bias_of_the_stored_length_is_refused(case: Case) -> None:
    reason = f"'{case.variant}' does not support position_bias|{case.variant} must know how T5Attention"
    with pytest.raises(NotImplementedError, match=reason):
        outputs(case.patch(FAMILIES["t5"].make_exact()), **FAMILIES["t5"].inputs())


@every
def test_guesses_are_taken_back_exactly_or_refused(case: Case) -> None:
    ids = padded()[0][:1]
    model = model_of(case)
    plain = model.generate(ids, max_new_tokens=15, **HOW)
    for way in ("prompt_lookup", "assistant"):
        given = {**WAYS[way], **({"assistant_model": model_of(case)} if way == "assistant" else {})}
        if knows_calls(case):
            with pytest.raises(NotImplementedError, match=f"{case.variant}.* no assisted decoding"):
                model.generate(ids, max_new_tokens=15, **HOW, **given)
        else:
            assert torch.equal(model.generate(ids, max_new_tokens=15, **HOW, **given).sequences, plain.sequences)


@every
def test_prompts_shorter_than_everything_are_kept_whole(case: Case) -> None:
    model = model_of(case)
    for length in (1, 2, 3):
        ids = padded()[0][:1, :length]
        ratio = dict(case.settings).get("compression_ratio")
        if length == 1 and ratio and case.info.configure(dict(case.settings)).event == "call":
            with pytest.raises(ValueError, match=f"compression_ratio={ratio} leaves no key of a sequence of 1"):
                model.generate(ids, max_new_tokens=2, **HOW)
            continue
        found = model.generate(ids, max_new_tokens=1, **HOW, output_logits=True)
        plain = patchattn.unpatch_model(copy.deepcopy(model)).generate(ids, max_new_tokens=1, **HOW, output_logits=True)
        assert torch.equal(found.logits[0], plain.logits[0])


@first
def test_calls_leave_nothing_behind(case: Case) -> None:
    model, (ids, real) = model_of(case), padded()
    left = weakref.WeakSet()
    for _ in range(3):
        result = model.generate(ids, attention_mask=real.long(), max_new_tokens=6, **HOW)
        left.update(find_cache(result.values()).layers)
        assert all(isinstance(layer, TrackedLayer) for layer in left)
        del result
    gc.collect()
    assert not len(left)


@of([case for case in CASES if asks_nothing(case)])
def test_no_device_is_asked(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # torch has none for meta
    model = case.patch(FAMILIES["llama"].make()).to("meta")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for size in (20, 1, 1, 1):
            tokens = torch.zeros(2, size, dtype=torch.long, device="meta")
            model(tokens, **cache_argument(model, cache))
    assert fewest(cache) < 23


@pytest.mark.slow
@of([case for case in CASES if case.variant in ("streaming_llm", "adakv", "think", "h2o") and not case.example])
def test_a_thousand_texts_leave_nothing_behind(case: Case) -> None:
    model, ids = model_of(case), padded()[0][:1]
    counts = []
    for number in range(1001):
        model.generate(ids, max_new_tokens=3, **HOW)
        if number in (0, 1000):
            gc.collect()
            counts.append(sum(isinstance(each, torch.Tensor | TrackedLayer) for each in gc.get_objects()))
    assert counts[0] == counts[1]
