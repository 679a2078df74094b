"""Quest (arXiv 2406.10774) against loops over pages, while decoding and row by row."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.reading import choose, index, pages, scores, selection

from .behaviour import close, decoded, positions, text
from .families import FAMILIES, outputs
from .reference import layer_in_and_out, tiny_llama
from .selecting import assert_reads, pages_by_bounds, projected, recorded

TOKENS = torch.arange(3, 33)[None]
ALL = {"dense_layers": 0, "prefill": "selected"}


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize(("budget", "page"), [(4, 2), (5, 3), (8, 4), (3, 1), (2, 4)])
def test_a_token_reads_its_own_page_and_those_with_the_highest_bounds(budget: int, page: int, heads: str) -> None:
    model = patchattn.patch_model(tiny_llama(), "quest", budget=budget, page=page, heads=heads, **ALL)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    read = pages_by_bounds(query, key, budget, page, heads)
    assert_reads(model, TOKENS, lambda head, i, j: j // page in read[i][head])


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_a_prompt_is_dense_and_each_token_behind_it_chooses(heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_llama(), recorded(monkeypatch)
    with torch.no_grad():
        prompt = model(TOKENS[:, :20]).logits
    patchattn.patch_model(model, "quest", budget=6, page=3, heads=heads, dense_layers=0)
    inputs, _ = layer_in_and_out(model, TOKENS)  # the only layer, so that keys do not depend on what is read
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    calls.clear()
    assert torch.equal(decoded(model, TOKENS, [20, *[1] * 10])[:, :20], prompt)
    for i, (_, seen, _) in enumerate(calls[1:], 20):
        for head, read in enumerate(pages_by_bounds(query[: i + 1], key[: i + 1], 6, 3, heads)[i]):
            assert set(seen[0, head, 0].nonzero().flatten().tolist()) == {j for j in range(i + 1) if j // 3 in read}


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_padding_inside_a_page_is_in_no_bound(heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens of padding before the text, in pages of three: they count from the first column on."""
    model, calls = tiny_llama(), recorded(monkeypatch)
    patchattn.patch_model(model, "quest", budget=6, page=3, heads=heads, **ALL)
    mask = torch.ones_like(TOKENS)
    mask[:, :5] = 0
    outputs(model, input_ids=TOKENS, attention_mask=mask, position_ids=positions(mask))
    call, seen, _ = calls[0]
    query, key = (tensor[0].transpose(0, 1).numpy() for tensor in (call.query, call.key))
    read = pages_by_bounds(query, key, 6, 3, heads, first=5)
    for head, i in np.ndindex(4, 30):
        if i >= 5:
            want = {j for j in range(5, i + 1) if j // 3 in read[i][head]}
            assert set(seen[0, head, i].nonzero().flatten().tolist()) == want


def test_a_page_of_no_text_is_below_all_others() -> None:
    keys, real = torch.randn(2, 1, 4, 8).bfloat16(), torch.tensor([[False, False, True, False], [True] * 4])
    ends = index.ends_of_pages(keys, 2, real)
    assert torch.equal(ends[0, 0, 1], keys[0, 0, 2].repeat(2))
    assert torch.equal(ends[1], index.ends_of_pages(keys, 2)[1])
    bounds = scores.upper_bounds(torch.randn(2, 1, 5, 8), ends)
    assert bool((bounds[0, 0, :, 0] < -1e30).all())


def test_a_bound_is_no_estimate() -> None:
    """Two pages of two keys: the best key of the first scores less than that of the second, and its bound more."""
    query, keys = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2), torch.tensor([[0.0, 0], [2, 2], [1, 0], [1, 0]])
    ends = index.ends_of_pages(keys[None, None], 2)
    assert scores.upper_bounds(query, ends).flatten().tolist() == [2.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_highest_bound_of_a_kv_head_is_that_of_any_of_its_query_heads(dtype: torch.dtype) -> None:
    query, keys = torch.randn(2, 6, 1, 8).to(dtype), torch.randn(2, 3, 20, 8).to(dtype)
    found = scores.highest_products(scores.by_sign(query), index.ends_of_pages(keys, 4))
    pages, queries = keys.double().unflatten(2, (5, 4)), query[:, :, 0].double().unflatten(1, (3, 2))
    products = queries[:, :, :, None, None] * pages[:, :, None]  # (B, Hkv, group, P, page, D)
    expected = products.amax(dim=-2).sum(dim=-1).amax(dim=2)
    np.testing.assert_allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_budget_that_holds_the_text_is_the_base_bit_for_bit() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected, cached = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 1, 1])
    for settings in ({"budget": 12}, {"budget": None}, {"budget": 12, "page": 5}):
        with patchattn.patched(model, "quest", {**ALL, **settings}):
            assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
            assert torch.equal(decoded(model, tokens, [9, 1, 1, 1]), cached)
    with patchattn.patched(model, "quest", budget=11, page=1, **ALL):
        assert not torch.equal(decoded(model, tokens, [9, 1, 1, 1])[:, -1], cached[:, -1])


def test_pages_that_are_read_are_copied_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, ...]] = []
    original = selection.selected_attention

    def watched(*arguments: Any) -> Any:
        given.append(arguments)
        return original(*arguments)

    model, tokens = FAMILIES["llama"].make(), text(40)
    patchattn.patch_model(model, "quest", budget=6, page=3, dense_layers=0)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    steps = {}
    for where in ("mask", "pages"):
        monkeypatch.setattr(selection, "_is_worth_a_copy", lambda *_, where=where: where == "pages")
        monkeypatch.setattr(selection, "selected_attention", watched)
        cache, steps[where] = DynamicCache(config=model.config), []
        for size, end in ((30, 30), *((1, end) for end in range(31, 41))):
            inputs = {"input_ids": tokens[:, end - size : end], "attention_mask": mask[:, :end]}
            steps[where].append(outputs(model, **inputs, **cache_argument(model, cache))[0][:, -1])
    torch.testing.assert_close(torch.stack(steps["pages"]), torch.stack(steps["mask"]), rtol=1e-4, atol=1e-4)
    assert len(given) == 10 * 2
    assert all(arguments[3].shape[-1] == 2 for arguments in given)


def test_facts_of_a_page_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = [], pages.ends_of_pages

    def watched(keys: torch.Tensor, page: int, real: torch.Tensor | None) -> torch.Tensor:
        made.append(keys.shape[2])
        return original(keys, page, real)

    monkeypatch.setattr(pages, "ends_of_pages", watched)
    model = patchattn.patch_model(tiny_llama(), "quest", budget=6, page=3, dense_layers=0)
    decoded(model, TOKENS, [20, *[1] * 10])
    assert made == [21, 3, 3, 3]  # at 21 keys, 24, 27 and 30


def test_first_layers_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch)
    model = tiny_llama(num_hidden_layers=4)
    patchattn.patch_model(model, "quest", budget=4, page=2)
    cache = DynamicCache(config=model.config)
    for part in TOKENS.split([28, 1, 1], dim=1):
        outputs(model, input_ids=part, **cache_argument(model, cache))
    fewer = {call.site.layer_index for call, seen, _ in calls if int(seen[0, 0, -1].sum()) < call.mask.columns}
    assert fewer == {2, 3}
    assert all(layer.room is not None for layer in cache.layers)  # dense ones append in place, too


def test_facts_in_slots_are_made_anew_of_the_page_that_a_token_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = [], pages.ends_of_pages

    def watched(keys: torch.Tensor, page: int, real: torch.Tensor | None) -> torch.Tensor:
        made.append(keys.shape[2])
        return original(keys, page, real)

    model = FAMILIES["llama"].make_exact()
    patchattn.patch_model(model, "quest", budget=4, page=2, layers=0, **ALL)
    tokens, sizes = text(15), [5, 1, 1, 1, 3, 1, 1, 1, 1]
    whole = outputs(model, input_ids=tokens)[0]
    monkeypatch.setattr(pages, "ends_of_pages", watched)
    close(decoded(model, tokens, sizes, kind="static"), whole)
    assert made == [16, 2, 2, 2, 16, 2, 2, 2, 2]
    dense = patchattn.patch_model(patchattn.unpatch_model(model), "quest", budget=4, page=2, dense_layers=0)
    made.clear()
    close(decoded(dense, tokens, sizes, kind="static"), decoded(dense, tokens, sizes))
    # what a dense call of several tokens wrote is not known behind it; facts of two layers, then of a growing cache
    assert made[:16] == [16, 16, *[2] * 4, 16, 16, *[2] * 6, *made[14:16]]


@pytest.mark.parametrize(("last", "count"), [(12, 1), (12, 5), (9, 10), (12, 7)])
def test_of_equal_scores_the_first_are_chosen_with_the_last_page(last: int, count: int) -> None:
    scores = torch.randint(3, (2, 2, 13), generator=torch.Generator().manual_seed(0)).float()
    for given in (scores, torch.where(scores == 2, torch.nan, scores), torch.randn(2, 2, 13)):
        found = choose.highest_and_last(given, last, count)
        order = given[..., :last].sort(dim=-1, descending=True, stable=True).indices
        for place in np.ndindex(2, 2):
            assert found[place].tolist() == [*sorted(order[place][: count - 1].tolist()), last]


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_what_heads_choose_apart_is_read_together(heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    original = selection.selected_attention

    def watched(*arguments: Any) -> Any:
        given.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(selection, "selected_attention", watched)
    model = patchattn.patch_model(tiny_llama(), "quest", budget=4, page=2, heads=heads, **ALL)
    tokens = (7 * torch.arange(40) % 47)[None]
    whole = outputs(model, input_ids=tokens)[0]
    given.clear()
    close(decoded(model, tokens, [36, 1, 1, 1, 1]), whole)
    assert len(given) == 4
    if heads == "kv":
        assert all(arguments[3].shape[-1] == 2 and arguments[4] is None for arguments in given)
    else:
        counts = torch.stack([arguments[4] for arguments in given])
        assert bool(((counts >= 2) & (counts <= 4)).all())
        assert bool((counts > 2).any())


def test_assisted_decoding_agrees_where_every_token_chooses() -> None:
    model, tokens = FAMILIES["llama"].make_exact(), text(14, rows=1)
    patchattn.patch_model(model, "quest", budget=4, page=2, **ALL)
    whole = outputs(model, input_ids=tokens)[0]
    close(decoded(model, tokens, [5, 3, 1, 4, 1]), whole)


def test_sliding_layers_are_left_out_and_caches_that_forget_are_refused() -> None:
    model = patchattn.patch_model(FAMILIES["gemma2"].make(), "quest", dense_layers=0)
    modules = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    sliding = [module.sliding_window is not None for module in modules]
    patched = [bool(site["variants"]) for site in patchattn.patch_info(model).sites]
    assert [not slides for slides in sliding] == patched
    assert any(sliding)
    with pytest.raises(NotImplementedError, match="leaves out layers with a sliding window"):
        patchattn.patch_model(FAMILIES["mistral"].make(), "quest")
    forgetful = FAMILIES["llama"].make()
    patchattn.patch_model(
        forgetful, ["streaming_llm", "quest"], {"quest": ALL, "streaming_llm": {"sinks": 1, "recent": 3, "slack": 0}}
    )
    with pytest.raises(NotImplementedError, match="chooses among all keys"):
        decoded(forgetful, text(12), [8, 1, 1, 1, 1])


def test_settings_out_of_range_are_named() -> None:
    for setting in ("budget", "page"):
        with pytest.raises(ValueError, match=f"{setting} must lie between 1"):
            patchattn.patch_model(tiny_llama(), "quest", **{setting: 0})
