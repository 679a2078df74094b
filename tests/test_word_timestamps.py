"""Whisper's word timestamps on a pruned model: those of the same model with the same heads silenced by hand."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import patchattn

WIDTH = 8  # of a head
CROSS = "model.decoder.layers.{}.encoder_attn"
PRUNED = {CROSS.format(0): [0], CROSS.format(1): [0, 1]}
ALIGNMENT = [[0, 1], [1, 2], [1, 3]]  # every one of them is kept, and none keeps its number


def whisper(alignment: list[list[int]] = ALIGNMENT) -> nn.Module:
    torch.manual_seed(0)
    layers = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 63, "pad_token_id": 0, "decoder_start_token_id": 2}
    sizes = {"vocab_size": 64, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32}
    config = tf.WhisperConfig(**layers, **heads, **special, **sizes, attn_implementation="eager")
    model = tf.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():  # heads that look at different frames
        for name, parameter in model.named_parameters():
            if name.endswith(("encoder_attn.q_proj.weight", "encoder_attn.k_proj.weight")):
                parameter.normal_()
    settings = {"no_timestamps_token_id": 50, "is_multilingual": False, "max_length": 20, **special}
    model.generation_config = tf.GenerationConfig(**settings, alignment_heads=copy.deepcopy(alignment))
    return model


def timestamps(model: nn.Module) -> torch.Tensor:
    features = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 64, dtype=torch.long)
    found = model.generate(features, attention_mask=mask, return_token_timestamps=True)
    return torch.cat([found["sequences"].double(), found["token_timestamps"].double()], dim=1)


def silenced(model: nn.Module) -> nn.Module:
    """The model with nothing read from the heads that are to go; it keeps them, and their numbers."""
    with torch.no_grad():
        for name, heads in PRUNED.items():
            for head in heads:
                model.get_submodule(name).out_proj.weight[:, head * WIDTH : (head + 1) * WIDTH] = 0.0
    return model


def pruned(model: nn.Module, variant: str = "prune") -> nn.Module:
    settings = {"compensate": False} if variant == "flap" else {}
    return patchattn.patch_model(model, variant, heads=PRUNED, **settings)


@pytest.mark.parametrize("variant", ["prune", "flap"])
def test_timestamps_are_read_from_the_same_heads(variant: str) -> None:
    expected, other = timestamps(silenced(whisper())), timestamps(silenced(whisper([[0, 0], [1, 0], [1, 1]])))
    assert (expected - other).abs().max() >= 0.02  # the choice of heads shows
    model = pruned(whisper(), variant)
    assert model.generation_config.alignment_heads == [[0, 0], [1, 0], [1, 1]]
    torch.testing.assert_close(timestamps(model), expected, rtol=0.0, atol=1e-9)


def test_a_head_taken_out_is_read_no_more() -> None:
    expected = timestamps(silenced(whisper([[1, 3]])))
    model = pruned(whisper([[0, 0], [1, 1], [1, 3]]))
    torch.testing.assert_close(timestamps(model), expected, rtol=0.0, atol=1e-9)


def test_unpatching_restores_the_list_and_so_does_a_pause() -> None:
    model = whisper([[0, 0], [1, 3], [0, 2]])
    before, settings = model.generation_config.alignment_heads, model.generation_config
    expected = timestamps(model)
    pruned(model)
    now = copy.deepcopy(settings.alignment_heads)
    with patchattn.unpatched(model):
        assert settings.alignment_heads == [[0, 0], [1, 3], [0, 2]]
        assert torch.equal(timestamps(model), expected)
    assert settings.alignment_heads == now == [[1, 1], [0, 1]]
    copied = copy.deepcopy(model)
    for each in (copied, model):
        assert torch.equal(timestamps(patchattn.unpatch_model(each)), expected)
    assert settings.alignment_heads is before
    assert copied.generation_config.alignment_heads == before


@pytest.mark.parametrize("how", ["whole", "patch"])
def test_a_saved_model_reads_them_too(how: str, tmp_path) -> None:
    model = pruned(whisper())
    expected = timestamps(model)
    if how == "whole":
        model.save_pretrained(tmp_path)
        again = patchattn.from_pretrained(tmp_path, attn_implementation="eager")
    else:
        patchattn.save_patch(model, tmp_path)
        again = patchattn.load_patch(whisper(), tmp_path)
    torch.testing.assert_close(timestamps(again), expected, rtol=0.0, atol=1e-9)


def test_taking_out_the_last_of_them_is_refused_and_leaves_the_model_as_it_was() -> None:
    alignment = [[0, 0], [1, 0], [1, 1]]
    model = whisper(alignment)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"Word timestamps.*layers\.1\.encoder_attn would leave none"):
        pruned(model)
    assert model.generation_config.alignment_heads == alignment
    assert not patchattn.patch_info(model)["patches"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    del model.generation_config.alignment_heads
    assert patchattn.patch_info(pruned(model))["patches"]


def test_masked_heads_and_self_attention_leave_the_list_alone() -> None:
    model = patchattn.patch_model(whisper(), "prune", heads=PRUNED, physical=False)
    assert model.generation_config.alignment_heads == ALIGNMENT
    torch.testing.assert_close(timestamps(model), timestamps(silenced(whisper())), rtol=0.0, atol=1e-9)
    model = patchattn.patch_model(whisper(), "prune", heads={"model.decoder.layers.0.self_attn": [0]})
    assert model.generation_config.alignment_heads == ALIGNMENT


class Wrapper(nn.Module):
    """An object around a model, as libraries have them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config


def test_through_an_object_around_the_model_and_a_part_of_it() -> None:
    expected = timestamps(silenced(whisper()))
    model = patchattn.patch_model(Wrapper(whisper()), "prune", heads={f"inner.{k}": v for k, v in PRUNED.items()}).inner
    torch.testing.assert_close(timestamps(model), expected, rtol=0.0, atol=1e-9)
    with pytest.raises(ValueError, match=r"generation_config.*give the whole model"):
        patchattn.unpatch_model(model.model)
    torch.testing.assert_close(timestamps(model), expected, rtol=0.0, atol=1e-9)
    patchattn.unpatch_model(Wrapper(model))
    assert model.generation_config.alignment_heads == ALIGNMENT
    assert torch.equal(timestamps(model), timestamps(whisper()))
