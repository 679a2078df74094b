"""Attention functions of the user's own, registered with transformers under names of their own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, flash_attention_mask, sdpa_mask

import patchattn
from patchattn.core.chain import attention_call
from patchattn.core.module_call import ModuleCall
from patchattn.hosts.transformers.compatibility import seam_name

from .behaviour import randomise
from .test_masks_of_users import TOKENS, VARIANTS, llama

CAUSAL = [name for name in VARIANTS if name not in ("moh", "prune")]


@pytest.fixture(autouse=True)
def restored_registries() -> Iterator[None]:
    places = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    before = [{name: place[name] for name in place if not name.startswith("patchattn_")} for place in places]
    yield
    for place, entries in zip(places, before, strict=True):
        for name in [name for name in place if name not in entries and not name.startswith("patchattn_")]:
            del place[name]
        place.update(entries)


def by_hand(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
    """Attention spelt out, causal without a mask if `is_causal` says so and there are several rows."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    logits = query @ key.mT * kwargs["scaling"]
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    elif query.shape[2] > 1 and kwargs.get("is_causal", module.is_causal):
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:]).bool().tril(), -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def half(*args: Any, **kwargs: Any) -> tuple[Any, None]:
    output, weights = by_hand(*args, **kwargs)
    return output / 2, weights


def output(variant: str, implementation: str, *, mask: Any = None, use_cache: bool = True) -> torch.Tensor:
    model = llama(kv_heads=2, num_hidden_layers=2, attn_implementation=implementation)
    patchattn.patch_model(model, variant, **VARIANTS[variant])
    randomise(model)
    with torch.no_grad():
        return model(TOKENS, attention_mask=mask, use_cache=use_cache).logits


@pytest.mark.parametrize("masks", [sdpa_mask, eager_mask], ids=["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_function_of_ones_own_is_understood_by_the_function_that_makes_its_masks(
    variant: str, use_cache: bool, masks: Callable[..., Any]
) -> None:
    AttentionInterface.register("by_hand", by_hand)
    AttentionMaskInterface.register("by_hand", masks)
    got, want = (output(variant, name, use_cache=use_cache) for name in ("by_hand", "sdpa"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masks", [None, lambda **_: None], ids=["none", "own"])
@pytest.mark.parametrize("variant", CAUSAL)
def test_one_that_nothing_is_known_of_is_refused_by_name(variant: str, masks: Callable[..., Any] | None) -> None:
    AttentionInterface.register("by_hand", by_hand)
    if masks is not None:
        AttentionMaskInterface.register("by_hand", masks)
    with pytest.raises(NotImplementedError, match=r"'by_hand' was given no mask.*AttentionMaskInterface\.register"):
        output(variant, "by_hand")
    mask = torch.ones(2, 1, TOKENS.shape[1], TOKENS.shape[1]).bool().tril()  # says it all
    got, want = (output(variant, name, mask=mask) for name in ("by_hand", "sdpa"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_variants_that_do_not_ask_what_is_seen_run_on_it() -> None:
    AttentionInterface.register("by_hand", by_hand)
    torch.testing.assert_close(output("moh", "by_hand"), output("moh", "sdpa"), rtol=1e-4, atol=1e-4)


def test_a_name_means_less_than_the_function_that_makes_the_masks() -> None:
    """Some kernels of the Hub take SDPA's masks."""
    kinds = {sdpa_mask: [[1, 2, 3]], flash_attention_mask: [[3, 4, 5]], eager_mask: [[5, 5, 5]]}
    for masks, counts in kinds.items():  # three rows over five keys
        AttentionMaskInterface.register("some/flash-kernel", masks)
        assert _call(llama(), "some/flash-kernel").mask.counts().tolist() == counts


def _call(model: nn.Module, base: str) -> patchattn.AttentionCall:
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 5, 8)
    [site] = patchattn.find_sites(model)
    return attention_call(ModuleCall(model.model.layers[0].self_attn, query, key, key, None, {}), site, base)


@pytest.mark.parametrize("variant", ["ssmax", "moh"])
def test_another_function_under_the_same_name_computes_at_once_and_after_patching_again(variant: str) -> None:
    AttentionInterface.register("mine", by_hand)
    AttentionMaskInterface.register("mine", sdpa_mask)
    model = llama(kv_heads=2, attn_implementation="mine")
    patchattn.patch_model(model, variant, **VARIANTS[variant])

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(TOKENS).logits

    first = logits()
    AttentionInterface.register("mine", half)
    second = logits()
    patchattn.unpatch_model(model)
    patchattn.patch_model(model, variant, **VARIANTS[variant])
    assert torch.equal(logits(), second)
    AttentionInterface.register("halved", half)
    AttentionMaskInterface.register("halved", sdpa_mask)
    fresh = llama(kv_heads=2, attn_implementation="halved")
    patchattn.patch_model(fresh, variant, **VARIANTS[variant])
    with torch.no_grad():
        assert torch.equal(fresh(TOKENS).logits, second)
    assert not torch.allclose(first, second, atol=1e-3)


def test_another_mask_function_under_the_same_name_makes_the_masks_at_once() -> None:
    AttentionInterface.register("mine", by_hand)
    AttentionMaskInterface.register("mine", sdpa_mask)
    model = patchattn.patch_model(llama(attn_implementation="mine"), "ssmax")
    made: list[int] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return sdpa_mask(*args, **kwargs)

    AttentionMaskInterface.register("mine", noted)
    how = {"batch_size": 1, "q_length": 2, "kv_length": 3, "allow_is_causal_skip": False}
    assert torch.equal(AttentionMaskInterface()[seam_name("mine")](**how), sdpa_mask(**how))
    assert made
    del model


def test_a_function_of_ones_own_under_a_known_name_is_not_computed_around() -> None:
    """MoH leaves out what it does not select where it knows what attention computes."""
    model = llama()
    assert _call(model, "sdpa").replace(innermost=True).stands_alone
    AttentionInterface.register("sdpa", half)
    assert not _call(model, "sdpa").replace(innermost=True).stands_alone
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert _call(model, "sdpa").replace(innermost=True).stands_alone
