"""Which models heads are scored in, and that they are left as they were."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

import patchattn
from patchattn.inspection.head_importance import head_importance

from .families import FAMILIES
from .test_importance import HEADS, OUTPUTS, examples, inputs_of, make, padded


def test_a_patched_model_is_scored_as_patched_and_left_as_it_was() -> None:
    model, data = make("llama"), examples("llama")
    before, names = model(**data[0]).logits, list(AttentionInterface._global_mapping)
    head_importance(model, data)
    assert torch.equal(model(**data[0]).logits, before)
    assert not patchattn.patch_info(model)["patches"]
    assert set(AttentionInterface._global_mapping) <= set(names)
    assert not any("patchattn" in name for name, _ in model.named_modules())
    patchattn.patch_model(model, ["ssa", "moh"], {"moh": {"active_ratio": 0.5}}, layers=[1])
    plan, patched = patchattn.patch_info(model)["patches"], model(**data[0]).logits
    names = [name for name, _ in model.named_modules()]
    found = head_importance(model, data, "flap", metric="ifv", normalise=False)
    for name, projection in OUTPUTS["llama"].items():  # what MoH leaves of the heads
        variance = inputs_of(model, projection, data).var(0, ddof=1).reshape(HEADS, -1).mean(1)
        np.testing.assert_allclose(found.scores[name], variance, rtol=1e-6)
    assert patchattn.patch_info(model)["patches"] == plan
    assert torch.equal(model(**data[0]).logits, patched)
    assert [name for name, _ in model.named_modules()] == names
    patchattn.unpatch_model(model)
    assert torch.equal(model(**data[0]).logits, before)


def test_padding_counts_nowhere_even_if_the_loss_reads_it() -> None:
    model, batch = make("llama"), padded(examples("llama"))

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        return outputs.logits.square().sum()

    found = head_importance(model, [batch], loss=loss, normalise=False)
    for site, projection in OUTPUTS["llama"].items():
        gates: list[torch.Tensor] = []

        def gate(module: Any, args: Any, gates: list[torch.Tensor] = gates) -> Any:
            states = args[0].unflatten(-1, (HEADS, -1))
            gates.append(torch.ones(states.shape[:3], dtype=states.dtype, requires_grad=True))
            return ((states * gates[0][..., None]).flatten(2),)

        handle = model.get_submodule(projection).register_forward_pre_hook(gate)
        (gradient,) = torch.autograd.grad(loss(model(**batch), batch), gates)
        handle.remove()
        expected = gradient[batch["attention_mask"].bool()].abs().mean(0)
        np.testing.assert_allclose(found.scores[site], expected, rtol=1e-6)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model, data = make("llama"), examples("llama")
    before = model(**data[0]).logits

    def broken(outputs: Any, batch: Any) -> torch.Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        head_importance(model, data, loss=broken)
    assert not any("patchattn" in name for name, _ in model.named_modules())
    assert torch.equal(model(**data[0]).logits, before)
    with patchattn.patched(model, "act"), pytest.raises(NotImplementedError, match="'act'"):
        head_importance(model, data, "entropy")


def test_heads_of_a_model_with_act_are_scored_by_what_it_leaves_of_them() -> None:
    model, data = make("llama"), examples("llama")
    plain = head_importance(model, data, "flap", metric="ifv", normalise=False)
    patchattn.patch_model(model, "act", alpha=1.0, keep_first=False)
    found = head_importance(model, data, "flap", metric="ifv", normalise=False)
    for name, projection in OUTPUTS["llama"].items():
        variance = inputs_of(model, projection, data).var(0, ddof=1).reshape(HEADS, -1).mean(1)
        np.testing.assert_allclose(found.scores[name], variance, rtol=1e-6)
        assert not np.allclose(plain.scores[name], variance, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OUTPUTS])
def test_every_family_has_scores(name: str) -> None:
    model, inputs = FAMILIES[name].make(), FAMILIES[name].inputs()

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        kinds = ("logits", "logits_per_text", "last_hidden_state")
        return next(outputs[kind] for kind in kinds if outputs.get(kind) is not None).square().sum()

    sites = {site.name: site.query_heads for site in patchattn.find_sites(model)}
    for method in ("michel", "flap"):
        found = head_importance(model, [inputs], method, loss=loss if method == "michel" else None)
        assert {name: len(scores) for name, scores in found.scores.items()} == sites
        # nothing reads the last layer of LLaVA's vision tower: no gradient gets there
        distinct = [len(set(scores)) == len(scores) for scores in found.scores.values()]
        assert sum(distinct) >= len(sites) - (name == "llava")
    assert not any("patchattn" in name for name, _ in model.named_modules())


def test_data_and_models_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="list of dictionaries"):
        head_importance(make("llama"), examples("llama", 1)[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model\.eval"):
        head_importance(make("llama").train(), examples("llama", 1))
    with pytest.raises(ValueError, match="labels"):
        head_importance(make("bert"), examples("llama", 1))
    vision = FAMILIES["llava"].make()
    with pytest.raises(ValueError, match="No token of the data reaches"):
        head_importance(vision, [{"input_ids": torch.arange(3, 9)[None]}], "flap")
