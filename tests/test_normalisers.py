"""Softpick, sigmoid attention and BiBERT's weights against loops in float64, and how a model starts with them."""

from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.cli.main import main
from patchattn.softmax import rows
from patchattn.variants.normalisers.softpick import softpick

from .behaviour import variant_parameters
from .families import FAMILIES, outputs
from .reference import HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
NAMES = ("softpick", "sigmoid", "bibert")


def weights_of(name: str, logits: list[float], settings: dict[str, Any]) -> list[float]:
    """Of one row's visible keys, from the paper's formula."""
    if name == "softpick":
        rectified = [max(np.exp(s) - 1, 0) for s in logits]
        return [r / sum(abs(np.exp(s) - 1) for s in logits) for r in rectified]
    if name == "sigmoid":
        bias = settings.get("bias", -np.log(len(logits)))
        return [1 / (1 + np.exp(-s - bias)) for s in logits]
    chosen = [float(s >= 0) for s in logits]
    return [c / max(1.0, sum(chosen)) for c in chosen]


def model_for(name: str) -> Any:
    return FAMILIES["bert"].make().double() if name == "bibert" else tiny_llama()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("softpick", {"epsilon": 1e-12}),
        ("softpick", {"epsilon": 1e-12, "blend": None}),
        ("sigmoid", {}),
        ("sigmoid", {"bias": -1.5, "blend": None}),
        ("bibert", {}),
        ("bibert", {"blend": None}),
    ],
    ids=str,
)
@torch.no_grad()
def test_attention_follows_the_formula(name: str, settings: dict[str, Any]) -> None:
    model = patchattn.patch_model(model_for(name), name, **settings)
    site = patchattn.patch_info(model).sites[0]["name"]
    variant = getattr(model.get_submodule(site).patchattn, name)
    if variant.blend is not None:
        variant.blend.copy_(torch.linspace(0.2, 0.9, HEADS))
    seen: list[Any] = []
    with patchattn.probed(model, lambda call, output: seen.append((call, output)), layers=0):
        model(input_ids=TOKENS, attention_mask=MASK)
    call, got = seen[0]
    for sequence, head, i in np.ndindex(2, HEADS, TOKENS.shape[1]):
        if not MASK[sequence, i]:
            continue
        group = head // (call.query.shape[1] // call.key.shape[1])
        visible = [j for j in range(TOKENS.shape[1]) if MASK[sequence, j] and (name == "bibert" or j <= i)]
        keys, values = (each[sequence, group, visible].numpy() for each in (call.key, call.value))
        logits = keys @ call.query[sequence, head, i].numpy() * call.scaling
        share = 1.0 if variant.blend is None else float(variant.blend[head])
        soft = np.exp(logits) / np.exp(logits).sum()
        weights = (1 - share) * soft + share * np.array(weights_of(name, list(logits), settings))
        np.testing.assert_allclose(got[sequence, i, head].numpy(), weights @ values, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_at_the_model_and_its_share_learns_at_once(name: str) -> None:
    model = model_for(name)
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, name)
    torch.testing.assert_close(outputs(model, input_ids=TOKENS)[0], before, rtol=0, atol=1e-9)
    result = model(input_ids=TOKENS)[0]
    (result * torch.linspace(-1, 1, result.shape[-1])).sum().backward()
    for parameter_name, parameter in variant_parameters(model).items():
        assert (parameter.grad != 0).all(), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_chunks_give_the_same_numbers_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patchattn.patch_model(model_for(name), name, blend=0.5)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        result = model(input_ids=TOKENS, attention_mask=MASK)[0]
        result[MASK.bool()].square().sum().backward()
        learned = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        return result[MASK.bool()].detach(), learned

    whole = run()
    monkeypatch.setattr(rows, "_ENTRIES", 100)
    torch.testing.assert_close(run(), whole, rtol=1e-9, atol=1e-9)


def test_softpick_of_logits_that_are_all_low_huge_or_hidden() -> None:
    logits = torch.tensor([[-200.0, -90.0], [90.0, 300.0], [0.0, 0.0], [2.0, 50.0]])
    visible = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    got = softpick(logits.where(visible, -1e38), visible, 1e-6)
    want = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_gradients_of_a_step_are_those_of_a_slope_between_minus_one_and_one() -> None:
    model = patchattn.patch_model(FAMILIES["bert"].make(), "bibert", blend=None)
    variant = model.get_submodule(patchattn.patch_info(model).sites[0]["name"]).patchattn.bibert
    logits = torch.tensor([[-3.0, -0.5, 0.5, 3.0]], requires_grad=True)
    weights = variant.normalised(logits, torch.ones(1, 4, dtype=torch.bool), call=None)
    assert weights.tolist() == [[0.0, 0.0, 0.5, 0.5]]
    weights[0, 2].backward()  # of c2 / (c0 + c1 + c2 + c3), where c1 and c2 have a slope of 1
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, -0.25, 0.25, 0.0]]))


@pytest.mark.parametrize("name", NAMES)
def test_without_softmax_it_is_refused_on_a_model_that_was_loaded(name: str) -> None:
    model = model_for(name)
    patchattn.unpatch_model(patchattn.patch_model(model, name, blend=None))  # one made from a configuration
    model.config._name_or_path = "someone/model"
    with pytest.raises(
        ValueError, match="is for models that are trained with it from scratch, and this one was loaded"
    ):
        patchattn.patch_model(model, name, blend=None)
    assert not patchattn.patch_info(model).patches
    patchattn.patch_model(model, name, blend=1.0, learned=False)


def test_info_says_what_is_for_training_from_scratch(capsys: pytest.CaptureFixture[str]) -> None:
    for name, is_said in [*((name, True) for name in NAMES), ("talking_heads", False)]:
        with pytest.raises(SystemExit):
            main(["info", name])
        assert ("from scratch only: with blend=None" in capsys.readouterr().out) is is_said
