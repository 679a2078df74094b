"""Calls made of calls: single rows, some of the keys, less to see; and what is known of every key."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.integrations import flash_attention

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.core.places import Places
from patchattn.core.registry import temporarily_registered
from patchattn_kernels import sink_and_recent

from .behaviour import randomise
from .families import FAMILIES, outputs
from .mask_tables import FORMATS, HEADS, case
from .test_mask import told
from .test_masks_of_users import LENGTH, TOKENS, by_head, llama, masks_of_heads
from .test_seam import flash_in_torch

MASK_TENSORS = ("given", "pairs", "real_columns", "sequence", "own")
Attend = Callable[[patchattn.AttentionCall, Any], Any]


@contextmanager
def toy(attend: Attend, facts: Any = None, context: bool = True) -> Iterator[str]:
    """The name of a variant that attends so."""

    class Toy(patchattn.Variant):
        config_class = patchattn.VariantConfig
        needs_context = context

        def attend(self, call: patchattn.AttentionCall, inner: Any) -> Any:
            return attend(call, inner)

    if facts is not None:
        Toy.key_facts = lambda self, call: facts(call)  # type: ignore[method-assign]
    words = {"title": "", "summary": "", "extra_parameters": ""}
    info = patchattn.VariantInfo(name="a_toy", variant=Toy, **words, arxiv_id=None, year=2026, needs_training=False)
    with temporarily_registered(info) as name:
        yield name


def row_by_row(change: Callable[[patchattn.AttentionCall, int], patchattn.AttentionCall]) -> Attend:
    def attend(call: patchattn.AttentionCall, inner: Any) -> Any:
        rows = [inner(change(call.row(i), i))[0] for i in range(call.query.shape[2])]
        return torch.cat(rows, dim=1), None

    return attend


def all_keys(call: patchattn.AttentionCall, i: int) -> patchattn.AttentionCall:
    """Behind an empty slot."""
    index = torch.arange(-1, call.key.shape[2]).expand(1, call.key.shape[1], -1)
    return call.at(Places(index, has_empty=True))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "bert", "modernbert", "t5", "whisper", "llava"]
)
def test_all_rows_one_by_one_and_all_keys_gathered_are_the_whole_call(family: str, implementation: str) -> None:
    inputs = FAMILIES[family].inputs()
    if family in ("gemma2", "gpt_oss") and implementation != "eager":
        pytest.skip("no other implementation on a CPU")
    model = FAMILIES[family].make(implementation=implementation)
    if "input_ids" in inputs and family != "llava":
        mask = torch.ones_like(inputs["input_ids"])
        mask[1, 6:] = 0
        inputs = {**inputs, "attention_mask": mask}
    want = outputs(model, **inputs)
    with toy(row_by_row(all_keys)) as name, patchattn.patched(model, name):
        got = outputs(model, **inputs)
    for one, other in zip(got, want, strict=True):
        keep = (
            inputs["attention_mask"].bool() if one.shape[:2] == inputs.get("attention_mask", one[0, 0]).shape else ...
        )
        torch.testing.assert_close(one[keep], other[keep], rtol=1e-4, atol=1e-4)


def odd(call: patchattn.AttentionCall, i: int) -> list[list[int]]:
    """By kv head, some of the keys, unequally many; the first three are among them, so that no row sees nothing."""
    keys = call.key.shape[2]
    return [[j for j in range(keys) if j < 3 or (j + group) % (2 + group) == 0] for group in range(2)]


def gathered(call: patchattn.AttentionCall, i: int) -> patchattn.AttentionCall:
    sets = odd(call, i)
    most = max(map(len, sets))
    return call.at(Places(torch.tensor([[[-1] * (most - len(one)) + one for one in sets]]), has_empty=True))


def hidden(call: patchattn.AttentionCall, i: int) -> patchattn.AttentionCall:
    keep = torch.zeros(1, 2, call.key.shape[2], dtype=torch.bool)
    for group, one in enumerate(odd(call, i)):
        keep[0, group, one] = True
    return call.seeing(keep)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_keys_that_are_not_gathered_are_keys_that_are_hidden(kind: str, implementation: str) -> None:
    model = llama(kv_heads=2, num_hidden_layers=2, attn_implementation=implementation)
    shown = torch.ones(2, LENGTH, dtype=torch.long)
    shown[0, :2] = 0
    found = []
    for change in (gathered, hidden):
        cache: Any = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=LENGTH + 3)
        parts, done = [], 0
        with toy(row_by_row(change)) as name, patchattn.patched(model, name), torch.no_grad():
            for rows in (LENGTH - 2, 1, 1):
                done += rows
                how = {"attention_mask": shown[:, :done], **cache_argument(model, cache)}
                parts.append(model(TOKENS[:, done - rows : done], **how).logits)
        found.append(torch.cat(parts, dim=1)[shown.bool()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(TOKENS, attention_mask=shown).logits[shown.bool()], found[0], atol=1e-2)


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_is_hidden_is_hidden_from_variants_further_in(use_cache: bool) -> None:
    """SSMax counts by head what is left to see, as under the same mask from the user."""
    masks = masks_of_heads()
    model = llama(kv_heads=2)
    patchattn.patch_model(model, "ssmax", initial_scale=0.7)
    randomise(model)
    want = by_head(model, masks, use_cache=use_cache)
    patchattn.unpatch_model(model)
    with toy(lambda call, inner: inner(call.seeing(masks))) as name:
        patchattn.patch_model(model, [name, "ssmax"], {"ssmax": {"initial_scale": 0.7}})
        randomise(model)
        causal = torch.ones(2, 1, LENGTH, LENGTH).bool().tril()
        for mask in (None, causal):
            got = by_head(model, mask, use_cache=use_cache)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        patchattn.unpatch_model(model)


@pytest.mark.parametrize(
    ("family", "variant", "settings"),
    [
        ("llama", "ssa", {"value": False}),
        ("qwen3", "moh", {"active_ratio": 0.5}),
        ("bert", "moh", {"router": "learned", "active_ratio": 0.5}),
        ("llama", "ssmax", {"initial_scale": 0.5}),
    ],
)
def test_variants_further_in_find_what_belongs_to_a_row(family: str, variant: str, settings: dict[str, Any]) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
    patchattn.patch_model(model, variant, **settings)
    randomise(model)
    want = outputs(model, **inputs)
    patchattn.unpatch_model(model)
    with toy(row_by_row(lambda call, i: call)) as name:
        patchattn.patch_model(model, [name, variant], {variant: settings})
        randomise(model)
        got = outputs(model, **inputs)
        patchattn.unpatch_model(model)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [all_keys, lambda call, i: call], ids=["keys", "rows"])
def test_what_remembers_every_key_is_refused_inside(change: Any) -> None:
    model = llama(kv_heads=2)
    with toy(row_by_row(change)) as name:
        patchattn.patch_model(model, [name, "act"], {"act": {"alpha": 1.0}})
        with pytest.raises(NotImplementedError, match="'act' remembers something of every key"):
            model(TOKENS)
        patchattn.unpatch_model(model)


def test_flash_attention_takes_one_row_at_a_time_and_the_same_keys_in_all_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash_in_torch)
    same: Attend = row_by_row(lambda call, i: call.at(Places(torch.arange(call.key.shape[2])[None, None])))
    found = []
    for base, attend in (("sdpa", same), ("flash_attention_2", same)):
        model = llama(kv_heads=2)
        model.config._attn_implementation_internal = base
        with toy(attend) as name, patchattn.patched(model, name), torch.no_grad():
            found.append(model(TOKENS).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    refusals = {
        "other keys in some heads": row_by_row(gathered),
        "for 8 rows": lambda call, inner: inner(call.seeing(torch.ones(1, 1, LENGTH).bool())),
    }
    for message, attend in refusals.items():
        with toy(attend) as name, patchattn.patched(model, name), pytest.raises(NotImplementedError, match=message):
            model(TOKENS)


# --- what is known of every key ---------------------------------------------------------------------------------------


def input_of(call: patchattn.AttentionCall) -> dict[str, torch.Tensor]:
    tokens = call.context.layer_input()
    return {"toy.first": tokens[..., 0], "toy.heads": tokens[..., :2].transpose(1, 2)}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [(LENGTH,), (3, 1, 1, 3), (1,) * LENGTH])
def test_facts_of_keys_are_those_of_their_tokens(chunks: tuple[int, ...], kind: str) -> None:
    """They are kept in every call, though the variant does not look before the last one."""
    model = llama(kv_heads=2)
    states = model.model.embed_tokens(TOKENS)
    norm = model.model.layers[0].input_layernorm
    tokens = norm(states).detach()
    cache: Any = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=LENGTH + 3)
    seen: list[torch.Tensor] = []
    facts: list[dict[str, torch.Tensor]] = []

    def attend(call: patchattn.AttentionCall, inner: Any) -> Any:
        facts.append({name: call.key_fact(name)[..., :LENGTH] for name in ("toy.first", "toy.heads")})
        index = torch.tensor([[[-1, 1, 2], [-1, -1, 0]]])
        if call.key.shape[2] > 2:
            seen.append(call.at(Places(index, has_empty=True)).key_fact("toy.heads"))
        return inner(call)

    with toy(attend, input_of) as name, patchattn.patched(model, name), torch.no_grad():
        for chunk in TOKENS.split(list(chunks), dim=1):
            model(chunk, **cache_argument(model, cache))
    torch.testing.assert_close(facts[-1]["toy.first"], tokens[None, ..., 0].transpose(0, 1))
    torch.testing.assert_close(facts[-1]["toy.heads"], tokens[..., :2].transpose(1, 2))
    torch.testing.assert_close(seen[-1][:, 0, 1:], tokens[:, 1:3, 0])
    torch.testing.assert_close(seen[-1][:, 1, 2], tokens[:, 0, 1])


def test_facts_follow_beams_and_chosen_rows() -> None:
    model = llama(kv_heads=2)
    cache, last = DynamicCache(), []

    def attend(call: patchattn.AttentionCall, inner: Any) -> Any:
        last[:] = [call.key_fact("toy.first")[:, 0]]
        return inner(call)

    with toy(attend, input_of) as name, patchattn.patched(model, name), torch.no_grad():
        model(TOKENS, **cache_argument(model, cache))
        before = last[0].clone()
        cache.reorder_cache(torch.tensor([1, 0]))
        model(TOKENS[:, :1], **cache_argument(model, cache))
        assert torch.equal(last[0][:, :LENGTH], before.flip(0))
        cache.crop(-3)
        model(TOKENS[:, 1:2], **cache_argument(model, cache))
        assert torch.equal(last[0][:, : LENGTH - 2], before.flip(0)[:, : LENGTH - 2])


def test_a_fact_that_nobody_tells() -> None:
    model = llama()
    refused = pytest.raises(ValueError, match="No variant says 'mine'")
    with toy(lambda call, inner: call.key_fact("mine")) as name, patchattn.patched(model, name), refused:
        model(TOKENS)


def test_a_call_that_decodes() -> None:
    model = llama(kv_heads=2)
    found: list[bool] = []

    def attend(call: patchattn.AttentionCall, inner: Any) -> Any:
        found.append(call.decodes)
        return inner(call)

    cache = DynamicCache()
    with toy(attend) as name, patchattn.patched(model, name), torch.no_grad():
        for chunk in TOKENS.split([1, 3, 3, 1], dim=1):
            model(chunk, **cache_argument(model, cache))
    assert found == [False, False, False, True]


# --- the mask is read before anything asks ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "block"])
def test_nothing_waits_for_the_device(form: str) -> None:
    """On a device whose tensors have no values, where asking for one raises."""
    meta = torch.device("meta")

    def there(tensor: Any) -> Any:
        return tensor.to(meta) if isinstance(tensor, torch.Tensor) else tensor

    for seed in range(2):
        whole = case(form, seed).mask
        mask = replace(whole, device=meta, **{name: there(getattr(whole, name)) for name in MASK_TENSORS})
        sizes = sink_and_recent(1, 2, HEADS, device=meta)
        few = mask.at(torch.arange(mask.keys, device=meta)[None, None], has_empty=True).narrowed(sizes)
        few = few.narrowed(torch.ones(1, 1, mask.keys, device=meta).bool())
        part = few.of_rows(torch.arange(mask.queries, device=meta))
        for each in (mask, few, part, few.prepended(2), few.of_heads(torch.arange(2, device=meta))):
            for ask in (each.seen, each.counts, each.real, each.real_keys, each.key_order, each.row_order, each.rule):
                ask()
            if form not in ("flash", "tokens", "packed") or each.queries == 1:
                told(each)


def test_a_mask_of_heads_that_a_kernel_cannot_read_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model: nn.Module = llama(kv_heads=2)
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    patchattn.patch_model(model, "moh", active_ratio=0.5)
    with pytest.raises(NotImplementedError, match="differs between heads"):
        model(TOKENS, attention_mask=masks_of_heads())


def test_a_call_is_not_given_what_it_does_not_have() -> None:
    def attend(call: patchattn.AttentionCall, inner: Any) -> Any:
        with pytest.raises(TypeError, match="no 'querry'; there is"):
            call.replace(querry=call.query)
        return inner(call.replace(query=call.query))

    with toy(attend) as name, torch.no_grad():
        patchattn.patch_model(llama(), name)(TOKENS)
