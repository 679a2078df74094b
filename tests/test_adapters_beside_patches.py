"""What other adapters than LoRA, and quantised weights, do to patches: they work, or are refused in one line."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn

import patchattn
from patchattn.core.kv_caches import cache_argument, find_cache

from . import vlms
from .families import FAMILIES, outputs
from .var_reference import LOW

INPUTS = FAMILIES["llama"].inputs()


def llama(variant: str | None = None, **settings: Any) -> nn.Module:
    model = FAMILIES["llama"].make()
    return model if variant is None else patchattn.patch_model(model, variant, settings)


def two_adapters(model: nn.Module, modules_to_save: list[str] | None) -> Any:
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=modules_to_save)
    model = get_peft_model(model, lora)
    model.add_adapter("second", lora)
    return model.eval()


def test_a_batch_of_several_adapters() -> None:
    model = two_adapters(llama("ssa"), None)
    with torch.no_grad():
        mixed = model(**INPUTS, adapter_names=["second", "default"]).logits
        for row, name in enumerate(["second", "default"]):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(**INPUTS).logits[row])
    with pytest.raises(TypeError, match="Mixed batching is only supported for the following modules"):
        two_adapters(llama("ssa"), ["patchattn"])(**INPUTS, adapter_names=["second", "default"])


def test_prefix_tuning_on_pruned_heads() -> None:
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    groups = get_peft_model(llama("prune", heads={0: [0, 1]}), prefix).eval()  # two query heads share a kv head
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn has 1 kv heads left, .* holds 2: .* prefix tuning"):
        groups(**INPUTS)
    heads = get_peft_model(llama("prune", heads={0: [0], 1: [3]}), prefix).eval()
    masked = get_peft_model(llama("prune", heads={0: [0], 1: [3]}, physical=False), prefix).eval()
    masked.prompt_encoder.load_state_dict(heads.prompt_encoder.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(heads(**INPUTS).logits, masked(**INPUTS).logits)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [("prune", {"heads": {1: [0, 1]}}), ("flap", {"heads": {1: [0, 1]}, "compensate": False})],
)
def test_a_cache_filled_before_pruning(variant: str, settings: dict[str, Any]) -> None:
    model = llama()
    cache = outputs_with_cache(model)
    patchattn.patch_model(model, variant, settings)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn has 1 kv heads left, .* Start with a new cache"):
        model(INPUTS["input_ids"], **cache_argument(model, cache))
    cache = outputs_with_cache(model)
    long = torch.cat([INPUTS["input_ids"], INPUTS["input_ids"]], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(
            model(INPUTS["input_ids"], **cache_argument(model, cache)).logits,
            model(long).logits[:, INPUTS["input_ids"].shape[1] :],
        )


def outputs_with_cache(model: nn.Module) -> Any:
    with torch.no_grad():
        return find_cache(model(**INPUTS, use_cache=True).values())


VISUAL = {"var": {**LOW, "move_fraction": 1.0}, "damro": {}}


@pytest.mark.parametrize("variant", VISUAL)
def test_an_adapter_that_embeds_tokens_itself(variant: str) -> None:
    given = vlms.inputs("llava")
    settings = VISUAL[variant]
    lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", trainable_token_indices=[5, 6])
    expected = outputs(patchattn.patch_model(vlms.make("llava"), variant, settings), **given)[0]
    assert not torch.allclose(outputs(vlms.make("llava"), **given)[0], expected, atol=1e-3)
    model = get_peft_model(patchattn.patch_model(vlms.make("llava"), variant, settings), lora).eval()
    with pytest.raises(
        NotImplementedError, match=r"trainable_token_indices .*: call patchattn\.unpatch_model\(model\)"
    ):
        outputs(model, **given)
    patchattn.patch_model(patchattn.unpatch_model(model), variant, settings)
    torch.testing.assert_close(outputs(model, **given)[0], expected)


class Quantised(torch.Tensor):
    """As torchao's and quanto's weights: a tensor of another type that says it is floating-point."""


@pytest.mark.parametrize("projection", ["q_proj", "o_proj"])
@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("prune", {"heads": {0: [1]}}),
        ("prune", {"sparsity": 0.25, "importance": "magnitude"}),
        ("flap", {"heads": {0: [1]}, "compensate": False}),
    ],
)
def test_weights_that_are_no_plain_tensors_are_not_cut(variant: str, settings: dict[str, Any], projection: str) -> None:
    model = llama()
    attention = model.model.layers[0].self_attn
    linear = attention.get_submodule(projection)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised), requires_grad=False)
    assert linear.weight.is_floating_point()
    before = outputs(model, **INPUTS)[0]
    with pytest.raises(NotImplementedError, match=rf"{projection} \(Linear\) is quantised or not a plain linear layer"):
        patchattn.patch_model(model, variant, settings)
    assert torch.equal(outputs(model, **INPUTS)[0], before)
    patchattn.patch_model(model, "moh", active_ratio=0.5)
    outputs(model, **INPUTS)


def test_quantised_layers_are_no_experts() -> None:
    model = FAMILIES["bert"].make()
    linear = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"quantisation .* after conversion"):
        patchattn.patch_model(model, "shrp")
