"""A patch belongs to the modules it is on: not to a configuration, and not to the object that was patched."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import patchattn
from patchattn.core.patching import is_patched

from .families import FAMILIES
from .saving import SETTINGS, base, equal, patch, run

PRUNED = {"prune": {"heads": {0: [1], 1: [0, 3]}}}
NEUTRAL = {"moh": {"active_ratio": 0.5}}  # adds no parameter


def twin(model):
    """Another model with the same weights on the same configuration object."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("settings", [SETTINGS, NEUTRAL, PRUNED])
def test_two_models_on_one_configuration(settings, tmp_path):
    model = base()
    other, before = twin(model), run(model)
    patch(model, settings)
    assert equal(run(other), before)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds no patch"):
        patchattn.from_pretrained(tmp_path / "other")
    assert equal(run(LlamaForCausalLM.from_pretrained(tmp_path / "other")), before)

    patchattn.patch_model(other, "logn", train_length=4)
    assert [p["variant"] for p in patchattn.patch_info(model)["patches"]] == list(settings)
    assert [p["variant"] for p in patchattn.patch_info(other)["patches"]] == ["logn"]
    patchattn.save_patch(model, tmp_path / "patch")
    patchattn.unpatch_model(other)
    model.save_pretrained(tmp_path / "model")
    expected = run(model)
    assert equal(run(patchattn.from_pretrained(tmp_path / "model")), expected)
    fresh = FAMILIES["llama"].make()
    assert equal(run(patchattn.load_patch(fresh, tmp_path / "patch")), expected)
    assert equal(run(patchattn.unpatch_model(model)), before)


@pytest.mark.parametrize("settings", [SETTINGS, NEUTRAL])
def test_what_was_loaded_plainly_is_saved_unpatched(settings, tmp_path):
    patch(base(), settings).save_pretrained(tmp_path / "patched")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no patch"):
        patchattn.from_pretrained(tmp_path / "plain")
    assert equal(run(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), run(base()))


def part_of(model, name):
    return model.get_submodule(name)


@pytest.mark.parametrize("settings", [SETTINGS, NEUTRAL, PRUNED])
@pytest.mark.parametrize(("name", "part"), [("llama", "model"), ("llava", "model.language_model"), ("bert", "bert")])
def test_a_patched_part_is_saved_and_unpatched_through_the_whole(name, part, settings, tmp_path):
    model = base(name)
    before = run(model, name)
    patch(part_of(model, part), settings)
    expected = run(model, name)
    assert not equal(expected, before)
    model.save_pretrained(tmp_path / "whole")
    assert equal(run(patchattn.from_pretrained(tmp_path / "whole"), name), expected)
    patchattn.save_patch(model, tmp_path / "patch")
    assert equal(run(patchattn.load_patch(base(name), tmp_path / "patch"), name), expected)
    sites = patchattn.patch_info(model)["patches"][0]["sites"]
    assert all(site.startswith(f"{part}.") for site in sites)
    patchattn.unpatch_model(model)
    assert not is_patched(model)
    assert equal(run(model, name), before)
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not [hook for hook in hooks if getattr(hook, "__module__", "").startswith("patchattn")]


@pytest.mark.parametrize("settings", [SETTINGS, NEUTRAL, PRUNED])
def test_a_patch_goes_from_a_part_to_the_whole_and_back(settings, tmp_path):
    model = base()
    patchattn.save_patch(patch(copy.deepcopy(model).model, settings), tmp_path / "part")
    whole = patchattn.load_patch(copy.deepcopy(model), tmp_path / "part")
    patchattn.save_patch(whole, tmp_path / "whole")
    part = copy.deepcopy(model)
    patchattn.load_patch(part.model, tmp_path / "whole")
    assert equal(run(part), run(whole))
    assert not equal(run(part), run(model))
    patchattn.unpatch_model(part.model)
    assert equal(run(part), run(model))


def test_parts_that_were_patched_apart(tmp_path):
    model = base("llava")
    before = run(model, "llava")
    patchattn.patch_model(part_of(model, "model.language_model"), "ssmax", initial_scale=2.0)
    patchattn.patch_model(part_of(model, "model.vision_tower"), "moh", active_ratio=0.5)
    patchattn.patch_model(model, "logn", train_length=4, modules="language_model")
    assert [p["variant"] for p in patchattn.patch_info(model)["patches"]] == ["moh", "ssmax", "logn"]
    model.save_pretrained(tmp_path)
    assert equal(run(patchattn.from_pretrained(tmp_path), "llava"), run(model, "llava"))
    patchattn.unpatch_model(part_of(model, "model.vision_tower"))
    assert [p["variant"] for p in patchattn.patch_info(model)["patches"]] == ["ssmax", "logn"]
    assert equal(run(patchattn.unpatch_model(model), "llava"), before)


def test_two_patches_of_one_variant_stay_apart(tmp_path):
    model = base()
    patchattn.patch_model(model, "moh", active_ratio=0.5, layers=[0])
    patchattn.patch_model(model, "moh", active_ratio=0.75, layers=[1])
    found = [(p["config"]["active_ratio"], p["sites"]) for p in patchattn.patch_info(model)["patches"]]
    assert found == [(0.5, ["model.layers.0.self_attn"]), (0.75, ["model.layers.1.self_attn"])]
    model.save_pretrained(tmp_path)
    assert equal(run(patchattn.from_pretrained(tmp_path)), run(model))


def test_weights_of_another_patch_are_refused():
    model = patch(base())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = patch(base(), {**SETTINGS, "moh": {"router": "learned", "active_ratio": 0.75}})
    with pytest.raises(ValueError, match=r"trained under another patch\. model\.layers\.0\.self_attn is patched with"):
        other.load_state_dict(state)
    same = patch(base())
    with torch.no_grad():
        for parameter in same.parameters():
            parameter.zero_()
    same.load_state_dict(state)
    assert equal(run(same), run(model))
    part = patch(base().model)
    part.load_state_dict({name.removeprefix("model."): v for name, v in state.items() if name.startswith("model.")})


class OwnLlama(LlamaForCausalLM):
    """A class that transformers does not know."""


def test_a_class_of_ones_own(tmp_path):
    model = patch(OwnLlama(base().config).eval())
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"'OwnLlama', which is not a model class of transformers .* model_class=\.\.\."
    ):
        patchattn.from_pretrained(tmp_path)
    loaded = patchattn.from_pretrained(tmp_path, model_class=OwnLlama)
    assert type(loaded) is OwnLlama
    assert equal(run(loaded), run(model))
    with pytest.raises(TypeError, match="model_class must be a class derived from"):
        patchattn.from_pretrained(tmp_path, model_class="OwnLlama")


def test_files_in_a_subfolder(tmp_path):
    model = patch(base())
    model.save_pretrained(tmp_path / "inner")
    assert equal(run(patchattn.from_pretrained(tmp_path, subfolder="inner")), run(model))
    with pytest.raises(ValueError, match="holds no patch"):
        patchattn.from_pretrained(tmp_path)


def test_weights_under_a_name_of_their_own(tmp_path):
    model = patch(base())
    model.save_pretrained(tmp_path, variant="fp32", max_shard_size="20KB")
    assert equal(run(patchattn.from_pretrained(tmp_path, variant="fp32")), run(model))
