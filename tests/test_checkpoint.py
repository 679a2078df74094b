"""A patched model on disk, and back."""

import json
import os

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import patchattn
from patchattn.core.patching import is_patched

from .families import FAMILIES
from .saving import SETTINGS, base, equal, patch, run, sign

# --- settings as plain dictionaries


@pytest.mark.parametrize("name", patchattn.list_variants())
def test_settings_survive_json_and_yaml(name):
    kind = patchattn.variant_info(name).variant
    for config in (kind.config_class(), kind.config_class.from_dict(kind.neutral_config())):
        values = config.to_dict()
        assert kind.config_class.from_dict(json.loads(json.dumps(values))) == config
        assert kind.config_class.from_dict(yaml.safe_load(yaml.safe_dump(values))) == config


# --- whole models


@pytest.mark.parametrize("name", FAMILIES)
def test_the_models_own_save_pretrained_keeps_the_patch(name, tmp_path):
    model = patch(base(name))
    expected = run(model, name)
    model.save_pretrained(tmp_path)
    options = FAMILIES[name].options
    kwargs = {"attn_implementation": options["implementation"]} if "implementation" in options else {}
    loaded = patchattn.from_pretrained(tmp_path, **kwargs)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert equal(run(loaded, name), expected)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert patchattn.patch_info(loaded) == patchattn.patch_info(model)
    assert equal(run(patchattn.unpatch_model(loaded), name), run(patchattn.unpatch_model(model), name))
    assert not equal(run(model, name), expected)


@pytest.mark.parametrize("name", ["llama", "t5", "llava"])
def test_shards_dtype_and_device_map(name, tmp_path):
    model = patch(base(name))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = patchattn.from_pretrained(tmp_path, dtype="bfloat16", device_map="cpu")
    expected = {k: v for k, v in model.state_dict().items() if ".patchattn." in k}
    assert len(expected) > 4
    for key, value in loaded.state_dict().items():
        assert value.device.type == "cpu"
        if key in expected:
            assert torch.equal(value, expected.pop(key).bfloat16()), key
    assert not expected


def test_a_model_without_weights_can_be_patched():
    with torch.device("meta"):
        model = FAMILIES["llama"].build()
    patchattn.patch_model(model, ["ssa", "moh"], SETTINGS)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_loaded_models_can_be_saved_again(tmp_path):
    model = patch(base())
    patchattn.save_pretrained(model, tmp_path / "first", custom_code=True)
    again = patchattn.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    assert "auto_map" not in (tmp_path / "second/config.json").read_text()  # no code file is there
    assert equal(run(patchattn.from_pretrained(tmp_path / "second")), run(model))


def test_plain_loading_leaves_the_patch_out(tmp_path):
    model = patch(base())
    patchattn.save_pretrained(model, tmp_path, custom_code=True)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not is_patched(plain)
    assert info["unexpected_keys"] == {key for key in model.state_dict() if ".patchattn." in key}
    assert not info["missing_keys"]
    patched = run(model)
    unpatched = run(patchattn.unpatch_model(model))
    assert equal(run(plain), unpatched)
    assert patchattn.patch_info(plain)["patches"] == []
    patch(plain)
    assert equal(run(plain), patched)
    assert equal(run(patchattn.unpatch_model(plain)), unpatched)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors, next(key for key in tensors if key.endswith("moh.routed_weight")))
    save_file(tensors, path, metadata={"format": "pt"})


def edit_settings(path, change):
    """Change what the weights of a whole model say of the variants on its first attention module."""

    def of_tensors(tensors, _):
        key = next(key for key in sorted(tensors) if key.endswith("patchattn._extra_state"))
        content = json.loads(bytes(tensors[key].tolist()))
        change(content)
        tensors[key] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    edit_tensors(path, of_tensors)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


WHOLE_MODEL_DAMAGE = {
    "truncated": (lambda d: truncate(d / "model.safetensors"), r"model\.safetensors is damaged"),
    "missing": (lambda d: edit_tensors(d / "model.safetensors", lambda t, k: t.pop(k)), "1 tensor missing .*routed"),
    "left over": (
        lambda d: edit_tensors(
            d / "model.safetensors", lambda t, k: t.update({k.replace("routed", "other"): torch.ones(1)})
        ),
        "left over .*other_weight",
    ),
    "shape": (
        lambda d: edit_tensors(d / "model.safetensors", lambda t, k: t.update({k: torch.ones(3, 3)})),
        "of another shape .*routed_weight",
    ),
    "base shape": (
        lambda d: edit_tensors(d / "model.safetensors", lambda t, k: t.update({"lm_head.weight": torch.ones(3, 32)})),
        "of another shape .*lm_head",
    ),
    "newer": (
        lambda d: edit_settings(d / "model.safetensors", lambda c: c.update(format_version=99)),
        r"model\.safetensors: .*format version 99, where this patchattn reads",
    ),
    "plan": (
        lambda d: edit_settings(d / "model.safetensors", lambda c: c["variants"][0].update(variant="sssa")),
        r"model\.safetensors: .*did you mean 'ssa'",
    ),
    "architecture": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(architectures=["os"])),
        "'os', which is not a model class",
    ),
    "no settings": (
        lambda d: edit_settings(d / "model.safetensors", lambda c: c.clear()),
        r"model\.safetensors: .*cannot be read",
    ),
    "no patch": (
        lambda d: edit_tensors(
            d / "model.safetensors", lambda t, _: [t.pop(key) for key in list(t) if ".patchattn." in key]
        ),
        "holds no patch",
    ),
}


@pytest.mark.parametrize("case", WHOLE_MODEL_DAMAGE)
def test_damaged_whole_models_are_refused(case, tmp_path):
    patch(base()).save_pretrained(tmp_path)
    damage, message = WHOLE_MODEL_DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        patchattn.from_pretrained(tmp_path)


# --- patches alone


@pytest.mark.parametrize("name", ["llama", "bert", "llava", "t5"])
def test_a_patch_alone_fits_a_fresh_base(name, tmp_path):
    model = patch(base(name))
    patchattn.save_patch(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["patchattn_config.json", "patchattn_model.safetensors"]
    tensors = load_file(tmp_path / "patchattn_model.safetensors")
    assert tensors.keys() == {key for key in dict(model.named_parameters()) if ".patchattn." in key}
    fresh = base(name)
    assert patchattn.load_patch(fresh, tmp_path) is fresh
    assert equal(run(fresh, name), run(model, name))
    assert patchattn.patch_info(fresh) == patchattn.patch_info(model)


def test_a_patch_without_tensors(tmp_path):
    model = patch(base(), {"moh": {"active_ratio": 0.5}})
    patchattn.save_patch(model, tmp_path)
    assert load_file(tmp_path / "patchattn_model.safetensors") == {}
    assert equal(run(patchattn.load_patch(base(), tmp_path)), run(model))


def test_from_pretrained_finds_the_base_of_a_patch(tmp_path):
    base("bert").save_pretrained(tmp_path / "base")
    model = patch(type(base("bert")).from_pretrained(tmp_path / "base"))
    patchattn.save_patch(model, tmp_path / "patch")
    loaded = patchattn.from_pretrained(tmp_path / "patch", dtype=torch.float32)
    assert type(loaded) is type(model)
    assert equal(run(loaded, "bert"), run(model, "bert"))


def test_from_pretrained_says_when_the_base_is_unknown(saved):
    with pytest.raises(ValueError, match="does not say where its base model came from"):
        patchattn.from_pretrained(saved[0])


def of_config(change):
    return lambda folder: edit_json(folder / "patchattn_config.json", change)


def of_tensors(change):
    """Another file of tensors, and its digest in the configuration: damage that a digest does not show."""

    def damage(folder):
        edit_tensors(folder / "patchattn_model.safetensors", change)
        sign(folder)

    return damage


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def settings_of_moh(content):
    return content["patches"][1]["config"]


DAMAGE = {
    "truncated": (lambda d: truncate(d / "patchattn_model.safetensors"), r"model\.safetensors is damaged"),
    "no tensors": (lambda d: (d / "patchattn_model.safetensors").unlink(), "no patchattn_model.safetensors beside"),
    "garbage": (
        lambda d: (d / "patchattn_model.safetensors").write_bytes(b"\x80pickle" * 9),
        "is damaged, or of another",
    ),
    "a bit": (lambda d: flip_a_bit(d / "patchattn_model.safetensors"), r"model\.safetensors is damaged, or of another"),
    "no digest": (of_config(lambda c: c.pop("tensors_sha256")), "tensors_sha256 must be the SHA-256 of .*, got None"),
    "integers": (
        of_tensors(lambda t, k: t.update({k: t[k].long()})),
        "routed_weight is of torch.int64, expected torch.f",
    ),
    "booleans": (
        of_tensors(lambda t, k: t.update({k: t[k] > 0})),
        "routed_weight is of torch.bool, expected torch.float",
    ),
    "no number": (of_tensors(lambda t, k: t.update({k: t[k] * torch.nan})), r"safetensors: .*not finite numbers"),
    "beyond the dtype": (
        of_tensors(lambda t, k: t.update({k: t[k].double() * 1e300})),
        "not finite numbers in torch.float",
    ),
    "a key twice": (
        lambda d: (d / "patchattn_config.json").write_text('{"patches": [], "patches": []}'),
        r"config\.json: the key 'patches' appears twice",
    ),
    "deep": (
        lambda d: (d / "patchattn_config.json").write_text("[" * 10**5),
        r"config\.json: nested more than 64 deep",
    ),
    "digits": (
        of_config(lambda c: c.update(format_version=10**400)),
        r"config\.json: an integer of more than 308 digits",
    ),
    "name": (
        of_config(lambda c: c["base_model"].update(name_or_path=[1])),
        r"config\.json: name_or_path of base_model",
    ),
    "missing": (of_tensors(lambda t, k: t.pop(k)), "1 tensor missing .*routed_weight"),
    "left over": (of_tensors(lambda t, k: t.update(more=torch.ones(2))), r"1 tensor left over.*\(more\)"),
    "shape": (of_tensors(lambda t, k: t.update({k: torch.ones(5, 32)})), r"routed_weight has .* \(5, 32\), expected"),
    "no config": (lambda d: (d / "patchattn_config.json").unlink(), "There is no patchattn_config.json"),
    "json": (lambda d: truncate(d / "patchattn_config.json"), r"config\.json, line [0-9]+: not valid JSON: Expecting"),
    "bytes": (lambda d: (d / "patchattn_config.json").write_bytes(b"\xff\xfe"), r"config\.json, line 1: not UTF-8"),
    "list": (lambda d: (d / "patchattn_config.json").write_text("[]"), "must hold a dictionary, got list"),
    "newer": (of_config(lambda c: c.update(format_version=2)), "version 2; this patchattn reads up to 1. Upgrade"),
    "no version": (of_config(lambda c: c.pop("format_version")), "format_version must be a positive integer"),
    "no patches": (of_config(lambda c: c.update(patches=[])), "a list of at least one patch"),
    "variant": (
        of_config(lambda c: c["patches"][1].update(variant="mho")),
        "variant 'mho'; did you mean 'moh'",
    ),
    "field": (of_config(lambda c: settings_of_moh(c).update(activ_ratio=1.0)), "did you mean 'active_ratio'"),
    "value": (of_config(lambda c: settings_of_moh(c).update(active_ratio=7)), "active_ratio must lie between 0"),
    "type": (of_config(lambda c: settings_of_moh(c).update(active_ratio="x")), "config.json: .*active_ratio must be"),
    "other type": (
        of_config(lambda c: c["base_model"].update(model_type="bert")),
        r"config\.json: this patch was made .*'bert'; got LlamaForCausalLM",
    ),
    "geometry": (
        of_config(lambda c: c["sites"]["model.layers.1.self_attn"].update(query_heads=8)),
        r"config\.json: .*where model.layers.1.self_attn has query_heads = 8; in the model given it is 4",
    ),
    "site": (
        of_config(lambda c: c["sites"].update({"model.layers.7.self_attn": {}})),
        "no attention module 'model.layers.7.self_attn'; did you mean",
    ),
    "sites": (of_config(lambda c: c["sites"].popitem()), "sites says nothing about 'model.layers.1.self_attn'"),
    "base": (of_config(lambda c: c.update(base_model=None)), "base_model, sites and each of the sites must be"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_patch_leaves_the_model_as_it_was(case, saved):
    damage, message = DAMAGE[case]
    damage(saved[0])
    model = base()
    before, state = run(model), {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        patchattn.load_patch(model, saved[0])
    assert not is_patched(model)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert equal(run(model), before)


def test_a_model_in_the_wrong_state_is_refused(saved):
    folder, expected = saved
    with pytest.raises(ValueError, match="model type 'llama'; got BertForMaskedLM, of model type 'bert'"):
        patchattn.load_patch(base("bert"), folder)
    model = patchattn.load_patch(base(), folder)
    with pytest.raises(ValueError, match="this one is patched"):
        patchattn.load_patch(model, folder)
    assert equal(run(model), expected)
    with torch.device("meta"):
        empty = FAMILIES["llama"].build()
    with pytest.raises(ValueError, match="meta device"):
        patchattn.load_patch(empty, folder)
    assert not is_patched(empty)
    with pytest.raises(ValueError, match="nothing to save"):
        patchattn.save_patch(base(), folder)
    with pytest.raises(TypeError, match="expects a model, got str"):
        patchattn.load_patch("llama", folder)
