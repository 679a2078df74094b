"""Learned factors of merged heads: weights pooled in numpy, gradients, adapters, plain checkpoints, refusals."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import patchattn
from patchattn.variants.grouping.gqa_convert import fold

from .families import FAMILIES
from .reference import DIM, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
BEFORE, AFTER = 4, 2  # kv heads
ATTENTION = "model.layers.0.self_attn"


def llama(kv_heads: int = BEFORE) -> Any:
    return tiny_llama(num_key_value_heads=kv_heads, attention_bias=True)


def variant(model: Any) -> Any:
    return model.get_submodule(f"{ATTENTION}.patchattn.gqa_convert")


def learned(per: str, method: str = "mean") -> Any:
    """A model whose biases are not zero, merged, with factors far from 1."""
    model = llama()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
        patchattn.patch_model(model, "gqa_convert", kv_heads=AFTER, method=method, factors=per)
        for parameter in variant(model).parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("per", ["head", "row", "column"])
@torch.no_grad()
def test_heads_are_pooled_by_their_factors(per: str) -> None:
    model = learned(per)
    plain = llama(AFTER)
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".patchattn." not in name}
    factors_of = {name: parameter.numpy() for name, parameter in variant(model).named_parameters()}
    with patchattn.unpatched(model):
        for stream in ("key", "value"):
            for kind in ("weight", "bias"):
                name = f"{ATTENTION}.{stream[0]}_proj.{kind}"
                old = model.state_dict()[name].numpy().reshape(AFTER, BEFORE // AFTER, DIM, -1)
                pooled = np.zeros((AFTER, DIM, old.shape[-1]))
                for kv in range(AFTER):
                    for head in range(BEFORE // AFTER):
                        factors = factors_of[f"{stream}_factors"][kv, head]
                        factors = np.ones(1) if per == "column" and kind == "bias" else factors
                        pooled[kv] += factors * old[kv, head] / (BEFORE // AFTER)
                weights[name] = torch.from_numpy(pooled).reshape(weights[name].shape)
    plain.load_state_dict(weights)
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=0, atol=1e-10)
    cache = model(TOKENS[:, :-1]).past_key_values
    assert cache.layers[0].keys.shape[1] == AFTER
    step = model(TOKENS[:, -1:], past_key_values=cache).logits[:, 0]
    torch.testing.assert_close(step, plain(TOKENS).logits[:, -1], rtol=0, atol=1e-10)


def test_factors_of_one_are_the_merged_model_and_learn() -> None:
    merged = patchattn.patch_model(llama(), "gqa_convert", kv_heads=AFTER)
    model = patchattn.patch_model(llama(), "gqa_convert", kv_heads=AFTER, factors="row")
    assert torch.equal(model(TOKENS).logits, merged(TOKENS).logits)
    model(TOKENS).logits.square().sum().backward()
    for name, parameter in variant(model).named_parameters():
        assert parameter.grad.abs().min() > 0, name
    groups = patchattn.optimizer_groups(model, learning_rate=1e-4)
    assert {id(p) for p in groups[-1]["params"]} == {id(p) for p in variant(model).parameters()}


def test_an_adapter_trains_and_computes_with_its_own_factors() -> None:
    model = patchattn.patch_model(llama(), "gqa_convert", preset="wgqa", kv_heads=AFTER)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["patchattn"])
    tuned = get_peft_model(model, lora)
    before = tuned(TOKENS).logits
    before.square().sum().backward()
    own = [(name, p) for name, p in tuned.named_parameters() if "_factors" in name and p.requires_grad]
    assert len(own) == 2
    assert all(parameter.grad.abs().min() > 0 for _, parameter in own)
    with torch.no_grad():
        for _, parameter in own:
            parameter.mul_(1.5)
    assert not torch.allclose(tuned(TOKENS).logits, before, atol=1e-3)
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned(TOKENS).logits, before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("per", ["head", "row", "column"])
@torch.no_grad()
def test_folded_saved_and_exported_it_is_equal(per: str, tmp_path: Path) -> None:
    model = learned(per, method="components")
    want = model(TOKENS).logits
    torch.testing.assert_close(fold(model)(TOKENS).logits, want, rtol=0, atol=1e-10)
    assert patchattn.export(model, tmp_path / "plain") < 1e-10
    torch.testing.assert_close(copy.deepcopy(model)(TOKENS).logits, want, rtol=0, atol=0)
    patchattn.save_patch(model, tmp_path / "patch")
    fresh = patchattn.unpatch_model(model)
    torch.testing.assert_close(patchattn.load_patch(fresh, tmp_path / "patch")(TOKENS).logits, want, rtol=0, atol=1e-10)


def test_one_projection_for_all_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"WGQA's factors are of projections of keys and of values"):
        patchattn.patch_model(FAMILIES["phi3"].make(), "gqa_convert", factors="head")
