"""An adapter says which patch it was trained on, whoever saves it, and goes onto no other, whoever loads it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import patchattn

from .families import FAMILIES, outputs

INPUTS = FAMILIES["llama"].inputs()
# Parameters that PEFT trains and saves, some that only the patch has, none, and other shapes of the weights.
PATCHES: dict[str, tuple[dict[str, Any], list[str] | None]] = {
    "ssa": ({"key": True, "initial_alpha": -2.0}, ["patchattn"]),
    "moh": ({"router": "learned", "active_ratio": 0.75}, None),
    "act": ({"alpha": 0.5}, None),
    "prune": ({"heads": {1: [0, 1]}}, None),
}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("logn", {}),
    ("ssa", {"key": True, "initial_alpha": -1.0}),
    ("ssa", {"key": True, "initial_alpha": -2.0, "layers": [0]}),
]


def lora(**kwargs: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **kwargs)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return outputs(model.eval(), **INPUTS)[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    FAMILIES["llama"].make().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(base: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(base)


def tuned(base: Path, variant: str) -> Any:
    """A PeftModel on a patched model, with random values where there is something to train."""
    settings, modules_to_save = PATCHES[variant]
    model = get_peft_model(
        patchattn.patch_model(loaded(base), variant, settings), lora(modules_to_save=modules_to_save)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".patchattn." in name:
                parameter.normal_()
    return model


def refused(base: Path, folder: Path, match: str, *patch: Any, **settings: Any) -> None:
    """By all that loads adapters, before the model is touched."""
    for load in (PeftModel.from_pretrained, PeftMixedModel.from_pretrained, LlamaForCausalLM.load_adapter):
        model = loaded(base)
        if patch:
            patchattn.patch_model(model, *patch, **settings)
        keys, before = list(model.state_dict()), logits(model)
        with pytest.raises(ValueError, match=match) as raised:
            load(model, folder if load is not LlamaForCausalLM.load_adapter else str(folder))
        assert f"patchattn.from_pretrained({str(folder)!r})" in str(raised.value)
        assert list(model.state_dict()) == keys
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("variant", PATCHES)
def test_peft_saves_the_patch_beside_its_adapter(variant: str, base: Path, tmp_path: Path) -> None:
    model, folder = tuned(base, variant), tmp_path / "adapter"
    expected = logits(model)
    model.save_pretrained(folder)
    again = patchattn.from_pretrained(folder)
    assert isinstance(again, PeftModel)
    assert torch.equal(logits(again), expected)
    by_hand = PeftModel.from_pretrained(patchattn.patch_model(loaded(base), variant, PATCHES[variant][0]), folder)
    assert torch.equal(logits(by_hand), expected)
    from_file = PeftModel.from_pretrained(patchattn.load_patch(loaded(base), folder), folder)
    assert torch.equal(logits(from_file), expected)
    refused(base, folder, rf"trained on a model patched with {variant} .* is not patched")
    with pytest.raises(ValueError, match="is not patched"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("variant", "settings"), OTHERS)
def test_another_patch_is_refused(variant: str, settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    tuned(base, "ssa").save_pretrained(tmp_path / "adapter")
    refused(
        base,
        tmp_path / "adapter",
        f"patched with ssa .*; this LlamaForCausalLM is patched with {variant}",
        variant,
        **settings,
    )


def test_all_three_are_saved_and_loaded(base: Path, tmp_path: Path) -> None:
    model, folder = tuned(base, "moh"), tmp_path / "all"
    patchattn.save_pretrained(model, folder)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "patchattn_config.json",
        "patchattn_model.safetensors",
    }  # fmt: skip
    assert torch.equal(logits(patchattn.from_pretrained(folder)), logits(model))


def test_a_patch_that_came_after_the_adapter(base: Path, tmp_path: Path) -> None:
    """Its parameters train beside the adapter, and PEFT would leave them out."""
    model = get_peft_model(loaded(base), lora())
    patchattn.patch_model(model, "moh", PATCHES["moh"][0])
    weights = [p for name, p in model.named_parameters() if ".patchattn." in name]
    assert weights
    assert all(p.requires_grad for p in weights)
    with torch.no_grad():
        for parameter in weights:
            parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(patchattn.from_pretrained(tmp_path / "adapter")), logits(model))
    moved = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for parameter in weights:
            parameter.zero_()
    model.load_adapter(tmp_path / "adapter", "default")  # as a trainer that resumes
    assert all(torch.equal(p, before) for p, before in zip(weights, moved, strict=True))


def test_several_adapters(base: Path, tmp_path: Path) -> None:
    model = tuned(base, "ssa")
    model.add_adapter("second", lora(modules_to_save=["patchattn"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".patchattn." in name and ".second." in name:
                parameter.normal_()
    expected = {}
    for name in ("second", "default"):
        model.set_adapter(name)
        expected[name] = logits(model)
    assert not torch.allclose(expected["second"], expected["default"], atol=1e-3)
    patchattn.save_pretrained(model, tmp_path)
    assert torch.equal(logits(patchattn.from_pretrained(tmp_path)), expected["default"])
    assert torch.equal(logits(patchattn.from_pretrained(tmp_path, subfolder="second")), expected["second"])
    again = patchattn.from_pretrained(tmp_path)
    again.load_adapter(tmp_path, "second", subfolder="second")
    again.set_adapter("second")
    assert torch.equal(logits(again), expected["second"])
    model.delete_adapter("default")
    patchattn.save_pretrained(model, tmp_path / "one")
    with pytest.raises(ValueError, match=r"holds no patch: .* subfolder='second'"):
        patchattn.from_pretrained(tmp_path / "one")


def test_an_adapter_beside_other_values_of_a_shared_patch(base: Path, tmp_path: Path) -> None:
    tuned(base, "moh").save_pretrained(tmp_path / "first")
    tuned(base, "moh").save_pretrained(tmp_path / "other")
    model = patchattn.from_pretrained(tmp_path / "first")
    model.load_adapter(tmp_path / "first", "again")
    before = logits(model)
    with pytest.raises(ValueError, match=r"beside another .*moh.* which its adapters again, default need"):
        model.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(model), before)


def test_adapters_of_unpatched_models_are_as_ever(base: Path, tmp_path: Path) -> None:
    plain = get_peft_model(loaded(base), lora())
    plain.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("patchattn*"))
    assert torch.equal(logits(PeftModel.from_pretrained(loaded(base), tmp_path / "plain")), logits(plain))
    tuned(base, "ssa").save_pretrained(tmp_path / "patched")
    before = (tmp_path / "patched" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds a patch, and this model has none: .* Save elsewhere"):
        plain.save_pretrained(tmp_path / "patched")
    assert (tmp_path / "patched" / "adapter_model.safetensors").read_bytes() == before
    tuned(base, "ssa").save_pretrained(tmp_path / "not_main", is_main_process=False)
    assert not list(tmp_path.glob("not_main/*"))
    with pytest.raises(ValueError, match="selected_adapters"):
        tuned(base, "ssa").save_pretrained(tmp_path / "unknown", selected_adapters=["unknown"])


def test_the_state_dict_that_is_given_is_what_is_saved(base: Path, tmp_path: Path) -> None:
    """Where training is sharded, a process has the whole tensors in it alone."""
    model = tuned(base, "moh")
    whole = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=whole)
    saved = load_file(tmp_path / "patchattn_model.safetensors")
    own = model.get_base_model().state_dict()
    assert saved
    for name, tensor in saved.items():
        assert torch.equal(tensor, own[name] + 1), name


def test_a_base_model_that_is_saved_patched(base: Path, tmp_path: Path) -> None:
    for variant in ("prune", "moh"):
        whole = tmp_path / variant
        patchattn.save_pretrained(patchattn.patch_model(loaded(base), variant, PATCHES[variant][0]), whole)
        model = get_peft_model(patchattn.patch_model(patchattn.from_pretrained(whole), "act", alpha=0.5), lora())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".patchattn." in name:
                    parameter.normal_()
        model.save_pretrained(tmp_path / "adapter")
        again = patchattn.from_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(again), logits(model))
        shutil.rmtree(whole)
        patchattn.save_pretrained(patchattn.patch_model(loaded(base), "logn"), whole)
        with pytest.raises(ValueError, match="is saved with another patch now"):
            patchattn.from_pretrained(tmp_path / "adapter")


def test_a_base_model_of_unknown_origin(tmp_path: Path) -> None:
    model = get_peft_model(patchattn.patch_model(FAMILIES["llama"].make(), "act"), lora())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load_patch\(base_model, .*\), then PeftModel\.from_pretrained"):
        patchattn.from_pretrained(tmp_path)
