"""The base implementation that computes stays the one the user had, whatever it is."""

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations import flash_attention
from transformers.masking_utils import flash_attention_mask

import patchattn
from patchattn.core.kv_caches import cache_argument

from .behaviour import Case, accepted, on
from .families import FAMILIES, outputs

TOYS = pytest.mark.usefixtures("toys")
# What other bases cannot be told, by variant, and what the refusal says.
_CHOICE = "Flash attention cannot be told a choice of keys for"
NOT_ON_FLASH = {
    "toy_mask": "",
    "sink": "Flash attention has no place for the slot of Sink",
    "attention_bias": "Flash attention has no place for the slot of AttentionBias",
    "meta_tokens": "Flash attention has no place for the slot of MetaTokens",
    **dict.fromkeys(
        (
            "block_attention",
            "cca",
            "dma",
            "flex_prefill",
            "focus_icl",
            "graph_kv",
            "hat",
            "hdt",
            "hip",
            "longlora",
            "lserve",
            "moba",
            "mswa",
            "nosa",
            "nsa",
            "parallel_context",
            "power",
            "quest",
            "squeezed",
            "streaming",
            "subsampled",
            "triangle",
            "twilight",
            "vertical_slash",
            "xattention",
        ),
        _CHOICE,
    ),
}
NOT_ON_FLEX = (
    "block_attention",
    "cca",
    "dma",
    "flex_prefill",
    "focus_icl",
    "graph_kv",
    "hat",
    "hdt",
    "hip",
    "longlora",
    "lserve",
    "moba",
    "nosa",
    "nsa",
    "parallel_context",
    "power",
    "quest",
    "squeezed",
    "subsampled",
    "triangle",
    "twilight",
    "vertical_slash",
    "xattention",
)


def flash_in_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> torch.Tensor:
    """What the flash kernels compute, `(B, T, H, D)` in and out: causal to the last key, 2D padding, window."""
    assert kwargs["attn_implementation"] == "flash_attention_2"  # the name a kernel would be loaded by
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    rows, keys = query.shape[2], key.shape[2]
    mask = torch.ones(rows, keys, dtype=torch.bool)
    if kwargs["is_causal"]:
        mask = mask.tril(keys - rows)
    if kwargs.get("sliding_window"):
        mask = mask.triu(keys - rows - kwargs["sliding_window"] + 1)
    starts = kwargs.get("cu_seq_lens_q")
    if starts is None and kwargs.get("position_ids") is not None and attention_mask is None and rows > 1:
        starts = (kwargs["position_ids"][0] == kwargs["position_ids"].min()).nonzero()[:, 0]
    if starts is not None and rows == keys and query.shape[0] == 1:  # packed sequences see themselves only
        sequence = torch.tensor([sum(int(start) <= token for start in starts) for token in range(rows)])
        mask = mask & (sequence[:, None] == sequence)
    mask = mask[None, None]
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None, -keys:].bool()
    mask = mask | ~mask.any(-1, keepdim=True)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=kwargs["softmax_scale"])
    return out.transpose(1, 2)


@TOYS
@on(["llama", "mistral", "gemma3_text", "bert"], without=NOT_ON_FLASH)
def test_flash_attention_stays_the_base(family: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash_in_torch)
    tokens = FAMILIES[family].inputs()["input_ids"]
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    real = mask.bool()
    results = []
    for base in ("sdpa", "flash_attention_2"):
        model = FAMILIES[family].make()
        model.config._attn_implementation_internal = base
        case.patch(model)
        assert patchattn.patch_info(model)["base_implementations"] == [base]
        parts = [outputs(model, input_ids=tokens, attention_mask=mask)[0][real], outputs(model, input_ids=tokens)[0]]
        if family != "bert":
            cache = DynamicCache(config=model.config)
            parts += [
                outputs(model, input_ids=chunk, **cache_argument(model, cache))[0]
                for chunk in tokens.split([4, 3, 2], dim=1)
            ]
        results.append(parts)
        patchattn.unpatch_model(model)
        assert model.config._attn_implementation == base
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def not_on_flash() -> list[Case]:
    """Papers' cases that it cannot be told, but for a window alone."""
    cases = [case for case in accepted("llama") if case.variant in NOT_ON_FLASH]
    return [case for case in cases if case.variant != "streaming" or dict(case.settings)["sinks"]]


@pytest.mark.parametrize("case", not_on_flash(), ids=str)
def test_flash_attention_is_refused_by_name(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash_in_torch)
    model = FAMILIES["llama"].make()
    model.config._attn_implementation_internal = "flash_attention_2"
    case.patch(model)
    with pytest.raises(NotImplementedError, match=NOT_ON_FLASH[case.variant]):
        outputs(model, **FAMILIES["llama"].inputs())


@pytest.mark.parametrize("case", [case for case in accepted("llama") if case.variant in NOT_ON_FLEX], ids=str)
def test_flex_attention_is_refused_by_name(case: Case) -> None:
    model = case.patch(FAMILIES["llama"].make(implementation="flex_attention"))
    with pytest.raises(NotImplementedError, match="Flex attention cannot be told a choice of keys that differs"):
        outputs(model, **FAMILIES["llama"].inputs())


def on_flex() -> list[Any]:
    """Every variant with a padded row, which torch computes unfused; and one without any padding, by compiled code."""
    taken = [case for case in accepted("llama") if case.variant not in NOT_ON_FLEX]
    cases = [(case, True) for case in taken if case.example == 0]
    whole = next((case, False) for case, _ in cases if case.variant == "streaming")
    return [pytest.param(case, padded, id=f"{case}-{padded}") for case, padded in [*cases, whole]]


@pytest.mark.parametrize(("case", "padded"), on_flex())
def test_flex_attention_stays_the_base(case: Case, padded: bool) -> None:
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, 6:] = 0
    results = []
    for base in ("sdpa", "flex_attention"):
        model = FAMILIES["llama"].make(implementation=base)
        with torch.compiler.set_stance("force_eager" if padded else "default"):
            case.patch(model)  # some variants run the model for it
            results.append(outputs(model, input_ids=tokens, attention_mask=mask)[0][mask.bool()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("told_by", "use_cache"), [("position_ids", True), ("cu_seq_lens", False)])
@TOYS
@on(["llama", "mistral"], without=NOT_ON_FLASH)
def test_packed_sequences_under_flash_attention(
    family: str, case: Case, use_cache: bool, told_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash attention gets packed sequences without a mask; they must not count each other's keys."""
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash_in_torch)
    tokens = FAMILIES[family].inputs()["input_ids"]
    model = FAMILIES[family].make()
    model.config._attn_implementation_internal = "flash_attention_2"
    case.patch(model)
    packed, numbers = torch.cat([tokens[:1], tokens[1:, :5]], dim=1), torch.tensor([[*range(9), *range(5)]])
    given = {"input_ids": packed, "position_ids": numbers, "use_cache": use_cache}
    if told_by == "cu_seq_lens":
        ends = torch.tensor([0, 9, 14], dtype=torch.int32)
        given |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    together = outputs(model, **given)[0]
    torch.testing.assert_close(together[:, :9], outputs(model, input_ids=tokens[:1])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[:, 9:], outputs(model, input_ids=tokens[1:, :5])[0], rtol=1e-4, atol=1e-4)


def test_a_hub_kernel_stays_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel from the Hub is registered under its repository's name, with flash attention's masks."""
    name, calls = "someone/attention-kernel", []

    def kernel(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        calls.append(module.config._attn_implementation)
        kwargs.update(softmax_scale=kwargs.pop("scaling"), is_causal=True, attn_implementation="flash_attention_2")
        out = flash_in_torch(*(x.transpose(1, 2) for x in (query, key, value)), attention_mask, **kwargs)
        return out, None

    monkeypatch.setitem(AttentionInterface._global_mapping, name, kernel)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, flash_attention_mask)
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    expected = outputs(patchattn.patch_model(FAMILIES["llama"].make(), ["ssa", "moh"]), input_ids=tokens)[0]
    model = FAMILIES["llama"].make()
    model.config._attn_implementation_internal = name
    patchattn.patch_model(model, ["ssa", "moh"])
    torch.testing.assert_close(outputs(model, input_ids=tokens)[0], expected, rtol=1e-4, atol=1e-4)
    assert calls == [name, name]  # one per layer, and each is shown the name it knows
    patchattn.unpatch_model(model)
    assert model.config._attn_implementation == name


def test_towers_keep_their_own_bases() -> None:
    model, inputs = FAMILIES["llava"].make(), FAMILIES["llava"].inputs()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    patchattn.patch_model(model, "moh")
    assert patchattn.patch_info(model)["base_implementations"] == ["eager", "sdpa"]
    outputs(model, **inputs)
    patchattn.unpatch_model(model)
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"
