"""PEFT on patched models, and patches on PEFT models."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import patchattn

from .families import FAMILIES, outputs

SETTINGS = {"ssa": {"key": True, "initial_alpha": -2.0}, "moh": {"router": "learned", "active_ratio": 0.75}}
TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "bert": ["query", "key", "value", "output.dense"]}


def lora(name, **kwargs):
    return LoraConfig(r=4, target_modules=TARGETS[name], **{"modules_to_save": ["patchattn"], **kwargs})


def run(model, name):
    return outputs(model, **FAMILIES[name].inputs())[0]


def train(model, name, steps=3):
    """A few steps on labels that are the input itself; returns the losses."""
    inputs = FAMILIES[name].inputs()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture(params=["llama", "bert"])
def trained(request):
    """Name, original base model, patched and untrained outputs, and a PeftModel trained on the patched model."""
    name = request.param
    model = patchattn.patch_model(FAMILIES[name].make(), list(SETTINGS), SETTINGS)
    patched = run(model, name)
    model = get_peft_model(model, lora(name))
    train(model, name)
    return name, FAMILIES[name].make(), patched, model


def same_state(model, other):
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


# Of MoH's router, one head chosen per token would always have the gate 1, and two shared heads are weighed.
TRAINED_ROUTERS = [
    ({"active_heads": 3, "shared_heads": 1}, ["routed_weight", "type_weight"]),
    ({"active_heads": 4, "shared_heads": 2}, ["routed_weight", "shared_weight", "type_weight"]),
]


@pytest.mark.parametrize(("heads", "weights"), TRAINED_ROUTERS)
@pytest.mark.parametrize("name", TARGETS)
def test_lora_and_variants_train_and_nothing_else(name, heads, weights):
    settings = {**SETTINGS, "moh": {"router": "learned", **heads}}
    model = patchattn.patch_model(FAMILIES[name].make(), list(settings), settings)
    model = get_peft_model(model, lora(name))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    mark = ".patchattn.modules_to_save.default."
    assert all("lora_" in n or mark in n for n in trainable)
    assert {n.rpartition(".moh.")[2] for n in trainable if ".moh." in n} == set(weights)
    for part in ("lora_A", "lora_B", *weights, "ssa.query_token"):
        assert sum(part in n for n in trainable) >= 2, part
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = train(model, name, steps=5)
    assert losses[-1] < losses[0]
    for parameter_name, parameter in trainable.items():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 1e-6, parameter_name  # rounding alone gives about 1e-10
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trainable.keys()


def test_a_router_of_one_head_per_token_learns_from_the_balance_loss_alone():
    """Its gate is divided by itself."""
    model = patchattn.patch_model(
        FAMILIES["llama"].make_exact(), "moh", router="learned", active_heads=3, shared_heads=2
    )
    inputs = FAMILIES["llama"].inputs()
    largest = []
    for weight in (0.0, 1.0):
        model.zero_grad()
        with patchattn.balance_loss(model, weight) as balance:
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        (loss + balance()).backward()
        largest.append(max(p.grad.abs().max() for n, p in model.named_parameters() if "routed_weight" in n))
    assert largest[0] < 1e-15
    assert largest[1] > 1e-6


def test_disabling_the_adapter_gives_the_untrained_patch(trained):
    name, _, patched, model = trained
    after = run(model, name)
    assert not torch.allclose(after, patched, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(run(model, name), patched)
    assert torch.equal(run(model, name), after)


def test_merging_keeps_the_outputs_and_the_patch(trained, tmp_path):
    name, base, _, model = trained
    after = run(model, name)
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    assert torch.allclose(run(merged, name), after, atol=1e-4)
    assert patchattn.patch_info(merged)["patches"][1]["variant"] == "moh"
    patchattn.save_pretrained(merged, tmp_path)
    assert torch.allclose(run(patchattn.from_pretrained(tmp_path), name), run(merged, name), atol=1e-5)
    assert patchattn.unpatch_model(merged).state_dict().keys() == base.state_dict().keys()


def test_unloading_and_unpatching_give_the_original_model(trained):
    name, base, patched, model = trained
    unloaded = model.unload()
    assert patchattn.patch_info(unloaded)["patches"]
    assert not torch.equal(run(unloaded, name), patched)  # PEFT leaves the trained copy of modules_to_save in place
    patchattn.unpatch_model(unloaded)
    same_state(unloaded, base)
    assert unloaded.config.to_dict() == base.config.to_dict()
    assert torch.equal(run(unloaded, name), run(base, name))


def test_unpatching_a_peft_model_leaves_its_lora(trained):
    name, base, _, model = trained
    assert patchattn.unpatch_model(model) is model
    assert not any("patchattn" in key for key in model.state_dict())
    assert not torch.allclose(run(model, name), run(base, name), atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(run(model, name), run(base, name))
    same_state(model.unload(), base)


@pytest.mark.parametrize("name", TARGETS)
def test_patching_a_peft_model(name, tmp_path):
    """Variants put on a PeftModel are trainable, and saved by save_patch beside the adapter."""
    base = FAMILIES[name].make()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), lora(name, modules_to_save=None))
    before = run(model, name)
    assert patchattn.patch_model(model, list(SETTINGS), SETTINGS) is model
    assert not torch.allclose(run(model, name), before, atol=1e-3)
    moving = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.endswith("patchattn.moh.routed_weight") for n in moving)
    train(model, name)
    expected = run(model, name)
    patchattn.save_pretrained(model, tmp_path / "adapter")
    loaded = patchattn.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded, PeftModel)
    assert torch.allclose(run(loaded, name), expected, atol=1e-5)
    patchattn.unpatch_model(model)
    with model.disable_adapter():
        assert torch.allclose(run(model, name), before, atol=1e-5)
    same_state(model.unload(), base)


def test_a_wrapped_patch_is_not_patched_further(trained):
    name, _, _, model = trained
    before = run(model, name)
    with pytest.raises(ValueError, match="wrapped by ModulesToSaveWrapper"):
        patchattn.patch_model(model, "moh")
    assert torch.equal(run(model, name), before)


@pytest.mark.parametrize("variant", patchattn.list_variants("attention"))
def test_all_linear_stays_out_of_variants(variant):
    if not {"without_images", "causal"} <= patchattn.variant_info(variant).capabilities:
        pytest.skip(f"{variant} is not for Llama")
    settings = SETTINGS.get(variant, patchattn.variant_info(variant).examples[0])
    model = patchattn.patch_model(FAMILIES["llama"].make(), variant, settings)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", modules_to_save=["patchattn"]))
    adapted = [n for n, _ in model.named_modules() if n.endswith("lora_A")]
    assert len(adapted) == 2 * 7  # q, k, v, o, gate, up, down in two layers
    assert not [n for n in adapted if ".patchattn." in n]


def test_what_is_saved_is_the_active_adapters_copy(trained, tmp_path):
    name, _, _, model = trained
    model.add_adapter("second", lora(name))
    model.set_adapter("second")
    train(model, name)
    state = model.state_dict()
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        patchattn.save_patch(model, tmp_path)
        tensors = load_file(tmp_path / "patchattn_model.safetensors")
        assert sum(t.numel() for t in tensors.values()) == patchattn.patch_info(model)["extra_parameters"]
        for key, tensor in tensors.items():
            site, own = key.split(".patchattn.")
            wrapped = f"base_model.model.{site}.patchattn.modules_to_save.{adapter}.{own}"
            assert torch.equal(tensor, state[wrapped]), key
    other = {key: state[key.replace(".second.", ".default.")] for key in state if ".second.moh." in key}
    assert not any(torch.equal(state[key], value) for key, value in other.items())
    with model.disable_adapter():
        patchattn.save_patch(model, tmp_path)
    for key, tensor in load_file(tmp_path / "patchattn_model.safetensors").items():
        wrapped = key.replace(".patchattn.", ".patchattn.original_module.")
        assert torch.equal(tensor, state[f"base_model.model.{wrapped}"])


def test_a_whole_model_is_not_made_of_an_unmerged_one(trained, tmp_path):
    model = trained[-1]
    with pytest.raises(ValueError, match="got a PeftModel: merge_and_unload"):
        patchattn.save_pretrained(model, tmp_path, custom_code=True)
    with pytest.raises(ValueError, match="pass the PeftModel around it"):
        patchattn.save_pretrained(model.get_base_model(), tmp_path)
    assert os.listdir(tmp_path) == []


FRESH = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
import patchattn
from patchattn.saving.whole_model import model_class

folder, results = sys.argv[1], {}
for name in ("llama", "bert"):
    here = f"{folder}/{name}"
    kind = model_class(sys.argv[2 + (name == "bert")])
    settings = {"ssa": {"key": True, "initial_alpha": -2.0}, "moh": {"router": "learned", "active_ratio": 0.75}}
    again = patchattn.patch_model(kind.from_pretrained(here + "/base"), list(settings), settings)
    models = {
        "by hand": PeftModel.from_pretrained(again, here + "/adapter"),
        "at once": patchattn.from_pretrained(here + "/adapter"),
    }
    for how, model in models.items():
        with torch.no_grad():
            results[f"{name} {how}"] = model.eval()(**load_file(here + "/inputs.safetensors")).logits
save_file(results, folder + "/outputs.safetensors")
"""


def test_a_trained_adapter_reloads_in_a_fresh_process(tmp_path):
    expected, classes = {}, []
    for name in TARGETS:
        folder = tmp_path / name
        base = FAMILIES[name].make()
        base.save_pretrained(folder / "base")
        classes.append(type(base).__name__)
        model = patchattn.patch_model(type(base).from_pretrained(folder / "base"), list(SETTINGS), SETTINGS)
        model = get_peft_model(model, lora(name))
        train(model, name)
        model.save_pretrained(folder / "adapter")
        patchattn.save_patch(model, folder / "adapter")
        save_file(FAMILIES[name].inputs(), folder / "inputs.safetensors")
        expected[name] = run(model, name)
    process = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path), *classes],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    results = load_file(tmp_path / "outputs.safetensors")
    assert len(results) == 4
    for key, value in results.items():
        assert torch.allclose(value, expected[key.split()[0]], atol=1e-5), key
