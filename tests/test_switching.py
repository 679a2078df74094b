"""A patched model whose attention implementation is switched, by its user or by `generate`; what cannot be followed."""

import threading
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import patchattn
from patchattn.core.packing import CHILD

from .behaviour import Case, assert_same, on, randomise, registered, snapshot
from .families import FAMILIES, outputs


def compare(left: list[torch.Tensor], right: list[torch.Tensor], exactly: bool = False) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 1e-4}))


@pytest.mark.usefixtures("toys")
@on(["llama", "mistral", "bert", "whisper", "llava"], papers=1)
def test_a_switch_of_the_implementation_is_followed_and_back(family: str, case: Case) -> None:
    inputs = FAMILIES[family].inputs()
    patched_on_eager = case.patch(FAMILIES[family].make(implementation="eager"))
    model = case.patch(FAMILIES[family].make(implementation="sdpa"))
    before = outputs(model, **inputs)
    model.set_attn_implementation("eager")
    compare(outputs(model, **inputs), outputs(patched_on_eager, **inputs), exactly=True)
    assert patchattn.patch_info(model)["base_implementations"] == ["eager"]
    model.set_attn_implementation("sdpa")
    compare(outputs(model, **inputs), before, exactly=True)


def test_weights_of_attention_are_there_after_the_switch() -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(implementation="sdpa"), "ssa")
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    model.set_attn_implementation("eager")
    maps = model(tokens, output_attentions=True).attentions
    assert len(maps) == 2
    assert all(torch.allclose(m.sum(-1), torch.ones(2, 4, 9)) for m in maps)


def test_unpatching_after_a_switch_leaves_the_new_implementation() -> None:
    model, plain = (FAMILIES["llava"].make(implementation="sdpa") for _ in range(2))
    patchattn.patch_model(model, ["ssa", "moh"])
    for each in (model, plain):
        each.set_attn_implementation({"text_config": "eager"})
    for each in (model, plain):  # transformers places hooks of its own in a first forward
        outputs(each, **FAMILIES["llava"].inputs())
    assert patchattn.patch_info(model)["base_implementations"] == ["eager", "sdpa"]
    patchattn.unpatch_model(model)
    expected = snapshot(plain)
    del expected["hooks"]  # transformers' own are functions made for each model
    assert_same(expected, snapshot(model))


def whisper() -> nn.Module:
    model = FAMILIES["whisper"].make(implementation="sdpa")
    model.generation_config = tf.GenerationConfig(
        decoder_start_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
        max_new_tokens=6,
        no_timestamps_token_id=60,
        alignment_heads=[[0, 1], [1, 2]],
        is_multilingual=False,
    )
    return model


@pytest.mark.parametrize("variant", ["ssa", "moh", "ssmax"])
def test_word_timestamps_of_whisper_and_what_is_generated_afterwards(variant: str) -> None:
    """For them, `generate` switches the model to eager attention, and does not switch it back."""
    features = torch.randn(1, 8, 24, generator=torch.Generator().manual_seed(1))

    def run(model: nn.Module) -> list[torch.Tensor]:
        timed = model.generate(features, return_timestamps=True, return_token_timestamps=True)
        return [timed["sequences"], timed["token_timestamps"], model.generate(features)]

    expected = whisper()
    expected.set_attn_implementation("eager")
    model = whisper()
    for each in (expected, model):
        randomise(patchattn.patch_model(each, variant))
    plain = model.generate(features)
    found = run(model)
    compare(found, run(expected), exactly=True)
    assert torch.equal(found[-1], plain)


def test_what_prepares_its_call_by_the_name_is_refused_by_name() -> None:
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    model = patchattn.patch_model(FAMILIES["llama"].make(implementation="sdpa"), "moh")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(RuntimeError, match=r"'flash_attention_2' was set since.*cannot follow: call patchattn.unpatch"):
        model(tokens)
    model.config._attn_implementation_internal = "sdpa"
    outputs(model, input_ids=tokens)


# Shared state


def test_patching_while_another_thread_runs_the_model_says_so() -> None:
    model, tokens = FAMILIES["llama"].make(), FAMILIES["llama"].inputs()["input_ids"]

    def patch(*_: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=patchattn.patch_model, args=(model, "ssa"))
        thread.start()
        thread.join()

    handle = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(patch)
    with pytest.raises(RuntimeError, match=r"was patched, in another thread, while this one ran it.*no forward runs"):
        model(tokens)
    randomise(model)
    assert outputs(model, input_ids=tokens)[0].isfinite().all()


def test_a_chain_that_is_held_elsewhere_keeps_no_name_registered() -> None:
    """As the traceback of a refused call holds it."""
    AttentionInterface.register("held_elsewhere", sdpa_attention_forward)
    AttentionMaskInterface.register("held_elsewhere", sdpa_mask)
    model = FAMILIES["llama"].make(implementation="held_elsewhere")
    patchattn.patch_model(model, "ssa")
    held = [m._modules[CHILD] for m in model.modules() if CHILD in m._modules]
    assert len(held) == 2
    assert "patchattn_held_elsewhere" in registered()
    with patchattn.unpatched(model):
        assert "patchattn_held_elsewhere" not in registered()
    outputs(model, **FAMILIES["llama"].inputs())
    assert "patchattn_held_elsewhere" in registered()
    patchattn.unpatch_model(model)
    assert "patchattn_held_elsewhere" not in registered()
    for registry in (AttentionInterface, AttentionMaskInterface):
        del registry._global_mapping["held_elsewhere"]
