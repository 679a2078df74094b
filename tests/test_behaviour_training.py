"""Gradients, checkpointing and adapters of patched models, over every registered variant; none is named."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import patchattn

from .behaviour import Case, on, variant_parameters, without_dropout
from .families import FAMILIES, outputs

pytestmark = pytest.mark.usefixtures("toys")


@on(list(FAMILIES), papers=1)
def test_every_parameter_of_a_variant_learns(family: str, case: Case) -> None:
    model = case.train(case.patch(FAMILIES[family].make()))
    result = model(**FAMILIES[family].inputs())
    names = ("logits", "last_hidden_state", "logits_per_text")
    torch.manual_seed(5)  # a random direction: the mean square of a normalised output is constant
    sum(
        (result[name] * torch.randn_like(result[name])).sum() for name in names if result.get(name) is not None
    ).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    variant = variant_parameters(model)
    learned = 0
    for name in variant:
        layer = name.split("patchattn.")[0]
        own = [grad for other, grad in grads.items() if other.startswith(layer) and other not in variant]
        if all(grad is None for grad in own):
            continue  # a layer whose output this model does not use: LLaVA's last vision layer
        assert grads[name] is not None, name
        assert float(grads[name].abs().max()) > 1e-7, name
        learned += 1
    assert learned or not variant


@on(["llama", "qwen3", "gpt2", "bert", "vit", "t5"], papers=1)
def test_activation_checkpointing_gives_the_same_gradients(family: str, case: Case) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = FAMILIES[family].make_exact()
        without_dropout(model)
        case.patch(model).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in FAMILIES[family].inputs().items()}
        model(**inputs).logits.pow(2).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


@on(["llama", "bert"], first=True, papers=1)
def test_only_adapters_and_the_variant_move_under_peft(family: str, case: Case, tmp_path: Path) -> None:
    """LoRA beside the variant's own parameters: trains, saves, reloads on a fresh base, and comes off again."""
    torch.manual_seed(0)
    inputs, targets = FAMILIES[family].inputs(), {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}[family]
    plain = outputs(FAMILIES[family].make(), **inputs)[0]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["patchattn"])
    model = get_peft_model(case.patch(FAMILIES[family].make()), config)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        case.train(model)(**inputs).logits.pow(2).mean().backward()
        optimizer.step()
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)
    trained = outputs(model.eval(), **inputs)[0]
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(case.patch(FAMILIES[family].make()), tmp_path).eval()
    assert torch.equal(outputs(reloaded, **inputs)[0], trained)
    bare = patchattn.unpatch_model(model.unload())
    assert torch.equal(outputs(bare, **inputs)[0], plain)
