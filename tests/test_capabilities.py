"""What a variant lacks is refused by name, when patching or in the call that shows it."""

import pytest
import torch

import patchattn
from patchattn.core.kv_caches import cache_argument, find_cache

from .families import FAMILIES


def lacking(*capabilities: str):
    return pytest.mark.parametrize("toy", [frozenset(capabilities)], indirect=True)


@lacking("gqa")
def test_a_missing_capability_is_refused_when_patching(toy) -> None:
    with pytest.raises(NotImplementedError, match="'toy' does not support gqa"):
        patchattn.patch_model(FAMILIES["llama"].make(), toy)


@lacking("cross")
def test_cross_attention_may_be_left_out(toy) -> None:
    model = FAMILIES["t5"].make()
    with pytest.raises(NotImplementedError, match="'toy' does not support cross"):
        patchattn.patch_model(model, toy)
    patchattn.patch_model(model, toy, modules="SelfAttention")


@pytest.mark.parametrize(
    ("toy", "family", "extra"),
    [
        (frozenset({"causal"}), "llama", {}),
        (frozenset({"bidirectional"}), "bert", {}),
        (frozenset({"softcap"}), "gemma2", {}),
        (frozenset({"sinks"}), "gpt_oss", {}),
        (frozenset({"position_bias"}), "t5", {}),
        (frozenset({"padding"}), "bert", {"attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4])}),
    ],
    indirect=["toy"],
    ids=["causal", "bidirectional", "softcap", "sinks", "position_bias", "padding"],
)
def test_a_missing_capability_is_refused_at_the_call(toy, family, extra, request) -> None:
    model = patchattn.patch_model(FAMILIES[family].make(), toy)
    name = request.node.callspec.id
    with pytest.raises(NotImplementedError, match=f"'toy' does not support {name}"):
        model(**FAMILIES[family].inputs(), **extra)


@lacking("kv_cache", "dropout")
def test_caches_and_dropout_are_refused_at_the_call(toy) -> None:
    llama, tokens = patchattn.patch_model(FAMILIES["llama"].make(), toy), FAMILIES["llama"].inputs()["input_ids"]
    past = find_cache(llama(tokens[:, :4], use_cache=True).values())
    with pytest.raises(NotImplementedError, match="does not support kv_cache"):
        llama(tokens[:, 4:], **cache_argument(llama, past))
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match="does not support dropout"):
        llama.train()(tokens)
