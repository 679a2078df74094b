"""What every variant that selects keys must do, whichever it is; its own tests say which keys it chooses."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.reading.selection import SelectionVariant

from .behaviour import ONLY_WHILE_DECODING, Case, close, decoded, positions, text
from .families import FAMILIES, outputs
from .selecting import Recorded, attended, recorded

SELECTORS = [
    name for name in patchattn.list_variants() if issubclass(patchattn.variant_info(name).variant, SelectionVariant)
]
CASES = [
    Case(name, tuple(example.items()), number)
    for name in SELECTORS
    for number, example in enumerate(patchattn.variant_info(name).examples)
]
# Those that choose pages, with pages of several keys: the examples have pages of one, which no padding shifts.
CASES += [
    Case(name, tuple({**dict(example), "page": page, "budget": budget}.items()), number)
    for name in SELECTORS
    for number, example in enumerate(patchattn.variant_info(name).examples)
    if "page" in example
    for page, budget in ((2, 4), (3, 5))
]
LARGER = {
    "moba": [{"block": 2, "top_k": 2, "decode": "selected"}, {"block": 2, "top_k": 2, "heads": "kv"}],
    "nsa": [{"block": 2, "top_k": 2, "local": 1, "length": 2, "stride": 1, "window": 3}],
    "nosa": [{"block": 2, "aware": 2, "top_k": 3, "local": 1, "length": 2, "stride": 1}],
    "power": [{"block": 2, "local": 1}],
    "xattention": [{"threshold": 0.4, "stride": 1, "block": 2}],
}
CASES += [Case(name, tuple(settings.items())) for name in LARGER for settings in LARGER[name]]
# What a token reads depends on nothing behind it, so that calls may be cut anyhow.
BY_ROW = [case for case in CASES if not case.looks_ahead]
each = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return recorded(monkeypatch)


def test_there_are_selectors() -> None:
    assert "streaming" in SELECTORS


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "squeezed"])  # which knows one prefix alone
def test_a_text_shorter_than_what_is_read_by_default_is_the_base_bit_for_bit(name: str) -> None:
    model, tokens = FAMILIES["llama"].make(), text()
    expected, cached = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [5, 1, 3])
    patchattn.patch_model(model, name)
    assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
    assert torch.equal(decoded(model, tokens, [5, 1, 3]), cached)


HOLD_ALL: dict[str, list[dict[str, Any]]] = {
    "streaming": [{"sinks": 4, "recent": 8}, {"recent": None}],
    "mswa": [{"window": 48, "by_layer": False}, {"window": None}],
    "power": [{"block": 3, "local": 1}, {"block": 2, "local": 5}, {"block": 1, "local": None}],
    "triangle": [
        {"dense_layers": 0, "last": 12},
        {"dense_layers": 0, "last": 1, "sinks": 4, "recent": 8},
        {"dense_layers": 2, "last": 1, "sinks": 1, "recent": 1},
    ],
}


@pytest.mark.parametrize("name", HOLD_ALL)
def test_what_holds_the_text_is_the_base_bit_for_bit(name: str) -> None:
    """The same of other selectors is among their own tests."""
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected, cached = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 2])
    for settings in HOLD_ALL[name]:
        with patchattn.patched(model, name, settings):
            assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
            assert torch.equal(decoded(model, tokens, [9, 1, 2]), cached)


@each
@pytest.mark.parametrize("sizes", [[9], [6, 1, 1, 1], [4, 3, 2]])
def test_output_is_dense_attention_to_what_was_chosen(case: Case, sizes: list[int], calls: Recorded) -> None:
    has_branches = case.info.variant.finish is not SelectionVariant.finish  # untrained, they add nothing
    model = case.patch(FAMILIES["llama"].make_exact(), live=not has_branches)
    decoded(model, text(), sizes)
    assert len(calls) == 2 * len(sizes)
    for call, seen, output in calls:
        np.testing.assert_allclose(output.numpy(), attended(call, seen.numpy()), rtol=1e-9, atol=1e-12)
    reads_less = any(int(seen.sum()) < int(call.mask.seen().expand_as(seen).sum()) for call, seen, _ in calls)
    assert reads_less == (case.variant not in ONLY_WHILE_DECODING or 1 in sizes)


@each
def test_every_token_reads_something_and_nothing_behind_it(case: Case, calls: Recorded) -> None:
    decoded(case.patch(FAMILIES["llama"].make_exact()), text(), [6, 1, 2])
    for _, seen, _ in calls:
        rows, keys = seen.shape[2:]
        own = torch.arange(rows)[:, None] + keys - rows
        assert bool(seen.any(dim=-1).all())
        assert not bool((seen & (torch.arange(keys) > own)).any())


@each
def test_density_is_keys_read_over_keys_seen(case: Case, calls: Recorded) -> None:
    model, reported = case.patch(FAMILIES["llama"].make_exact()), []
    with patchattn.observe(model, lambda observation: reported.append(observation.values.get("density"))):
        decoded(model, text(), [6, 1, 2])
    reported = [one for one in reported if one is not None]  # what it tells besides
    assert len(reported) == len(calls)
    for density, (call, seen, _) in zip(reported, calls, strict=True):
        density = density if density.dim() == 3 else density[..., None]
        visible = call.mask.seen().expand_as(seen)
        for b, h, i in np.ndindex(*seen.shape[:3]):
            share = int(seen[b, h, i].sum()) / int(visible[b, h, i].sum())
            assert float(density.expand(seen.shape[0], -1, seen.shape[1])[b, i, h]) == pytest.approx(share)


@each
def test_whole_pages_of_padding_or_of_another_text_move_the_choice(case: Case, calls: Recorded) -> None:
    model, tokens = case.patch(FAMILIES["llama"].make_exact()), text(rows=1)
    outputs(model, input_ids=tokens)
    padded = torch.cat([tokens[:, :6], tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :6] = 0
    outputs(model, input_ids=padded, attention_mask=mask, position_ids=positions(mask))
    if case.variant != "squeezed":  # whose prefix the other text must begin with, too
        numbers = torch.cat([torch.arange(6), torch.arange(9)])[None]
        outputs(model, input_ids=padded, position_ids=numbers, use_cache=False)
    for n, (_, behind, _) in enumerate(calls[2:]):
        assert torch.equal(behind[:, :, 6:, 6:], calls[n % 2][1])
        assert not bool(behind[:, :, 6:, :6].any())


@each
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_what_is_hidden_has_no_say(case: Case, kind: str, calls: Recorded) -> None:
    """Padding, or another text, that ends within a page, whatever it is; what slots hold before they are filled."""
    if kind == "static" and "static_cache" not in case.info.capabilities:
        pytest.skip("refuses static caches")
    model, tokens = case.patch(FAMILIES["llama"].make_exact()), text(9, rows=1)
    both = torch.cat([torch.cat([tokens[:, 4:], tokens[:, :5].flip(-1)]), tokens.repeat(2, 1)], dim=1)
    mask = torch.ones_like(both)
    mask[:, :5] = 0
    cache: Any = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=18)
        cache.early_initialization(2, 2, model.config.head_dim, torch.float64, torch.device("cpu"))
        for layer in cache.layers:
            layer.keys[0], layer.keys[1] = 100.0, -100.0
            layer.values[0], layer.values[1] = 100.0, -100.0
    chunks = ((0, 11), (11, 12), (12, 14))
    for first, last in chunks:
        given = {"attention_mask": mask[:, :last], "position_ids": positions(mask)[:, first:last]}
        found = outputs(model, input_ids=both[:, first:last], **given, **cache_argument(model, cache))[0]
        close(*found[:, max(0, 5 - first) :].split(1))
    for (first, _), of_layers in zip(chunks, (calls[:2], calls[2:4], calls[4:]), strict=True):
        for _, seen, _ in of_layers:
            assert torch.equal(*seen[:, :, max(0, 5 - first) :])
    if kind == "dynamic" and case.variant != "squeezed":  # whose prefix the other text must begin with, too
        calls.clear()
        numbers = torch.cat([torch.arange(5), torch.arange(9)])[None]
        found = outputs(model, input_ids=both, position_ids=numbers, use_cache=False)[0]
        close(*found[:, 5:].split(1))
        assert all(torch.equal(*seen[:, :, 5:]) for _, seen, _ in calls)


@pytest.mark.parametrize("case", BY_ROW, ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_calls_of_any_size_choose_as_one_forward(case: Case, kind: str, calls: Recorded) -> None:
    model, tokens, sizes = case.patch(FAMILIES["llama"].make_exact()), text(14), [5, 1, 5, 1, 2]
    whole = outputs(model, input_ids=tokens)[0]
    one = [seen for _, seen, _ in calls]
    calls.clear()
    close(decoded(model, tokens, sizes, kind), whole)
    for layer, seen in enumerate(one):
        parts = [F.pad(part[..., :14], (0, 14 - part[..., :14].shape[-1])) for _, part, _ in calls[layer::2]]
        assert torch.equal(torch.cat(parts, dim=2), seen)


@each
def test_tokens_that_are_taken_back_leave_nothing_behind_and_beams_go_on(case: Case) -> None:
    if case.variant in ONLY_WHILE_DECODING:
        pytest.skip("a token whose choice was taken back reads all keys, as its own tests show")
    model, tokens = case.patch(FAMILIES["llama"].make_exact()), text(12)
    other, cache = text(12).flip(-1), DynamicCache(config=model.config)
    outputs(model, input_ids=tokens[:, :6], **cache_argument(model, cache))
    outputs(model, input_ids=other[:, :4], **cache_argument(model, cache))
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    copied, tokens = copy.deepcopy(cache), tokens.flip(0)
    expected = decoded(model, tokens, [6, 1, 2, 3])[:, 6:]
    for one in (cache, copied):
        parts = [
            outputs(model, input_ids=p, **cache_argument(model, one))[0] for p in tokens[:, 6:].split([1, 2, 3], 1)
        ]
        close(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("case", [case for case in BY_ROW if not case.example], ids=str)
def test_a_second_turn_and_assisted_decoding_give_the_same_tokens(case: Case) -> None:
    model, tokens = case.patch(FAMILIES["llama"].make_exact()), text(6, rows=1)
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    first = model.generate(tokens, **settings, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, tokens[:, :3]], dim=1)
    settings["attention_mask"] = torch.ones_like(turn)  # a token that was written may be the padding's
    expected = model.generate(turn, **settings, use_cache=False)
    assert torch.equal(model.generate(turn, **settings, past_key_values=first.past_key_values), expected)
    looked_up = model.generate(turn, **settings, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, expected)


@each
def test_what_remembers_every_key_is_refused_inside(case: Case) -> None:
    model = FAMILIES["llama"].make()
    both = {case.variant: dict(case.settings), "act": {"beta": 0.5, "heads": [[0, 0]]}}
    if case.info.innermost:
        with pytest.raises(ValueError, match="nothing can come after it"):
            patchattn.patch_model(model, [case.variant, "act"], both)
        return
    patchattn.patch_model(model, [case.variant, "act"], both)
    with pytest.raises(NotImplementedError, match="only some"):
        outputs(model, input_ids=text())
