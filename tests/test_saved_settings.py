"""Saved settings that speak of other attention modules, or of other heads, than the patch has: refused, not skipped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import patchattn

from .families import FAMILIES, outputs

FIRST, SECOND = "model.layers.0.self_attn", "model.layers.1.self_attn"
BERT = "bert.encoder.layer.{}.attention.self"


def _saved(family: str, variant: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    patchattn.save_patch(patchattn.patch_model(FAMILIES[family].make(), variant, settings), folder)
    return json.loads((folder / "patchattn_config.json").read_text())


PRUNE = ("llama", "prune", {"heads": {FIRST: [0], SECOND: [1]}})
MASK = ("llama", "prune", {"heads": {FIRST: [0], SECOND: [1]}, "physical": False})
FLAP = ("llama", "flap", {"heads": {FIRST: [0], SECOND: [1]}, "compensate": False})
CHANNELS = ("llama", "flap", {"kept_channels": {FIRST: "f" * 11 + "e", SECOND: "f" * 11 + "e"}, "compensate": False})
STATIC = ("bert", "shrp", {"heads": 2, "kept": [0, 1]})
WEIGHED = ("bert", "shrp", {"importance": {BERT.format(0): [1, 2, 3, 4], BERT.format(1): [1, 1, 1, 1]}})


def _renamed(field: str, old: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        config[field][old + "x"] = config[field].pop(old)

    return change


def _without(field: str, name: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config[field].pop(name)


def _with(field: str, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config[field].update({name: value})


def _set(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update({field: value})


UNKNOWN = r"patchattn_config\.json: .*has {} for '{}', which is not one of the attention modules it is on"
CASES: dict[str, tuple[tuple[str, str, dict[str, Any]], Callable[[dict[str, Any]], Any], str]] = {
    "prune": (PRUNE, _renamed("heads", FIRST), UNKNOWN.format("heads", FIRST + "x")),
    "prune, masked": (MASK, _renamed("heads", FIRST), UNKNOWN.format("heads", FIRST + "x")),
    "prune, a module more": (PRUNE, _with("heads", "lm_head", [1]), UNKNOWN.format("heads", "lm_head")),
    "prune, a module less": (PRUNE, _without("heads", FIRST), f"heads of {FIRST}"),
    "prune, by layer": (PRUNE, _set("heads", {"0": [0], "1": [1]}), UNKNOWN.format("heads", "heads")),
    "prune, another head": (PRUNE, _with("heads", FIRST, [9]), f"{FIRST} has 4 query heads.*no head 9"),
    "prune, masked, another head": (MASK, _with("heads", FIRST, [9]), f"{FIRST} has 4 query heads.*no head 9"),
    "prune, all heads": (PRUNE, _with("heads", FIRST, [0, 1, 2, 3]), f"All 4 query heads of {FIRST}"),
    "flap": (FLAP, _renamed("heads", SECOND), UNKNOWN.format("heads", SECOND + "x")),
    "flap, a module less": (FLAP, _without("heads", SECOND), f"nothing to take out of {SECOND}"),
    "flap, another head": (FLAP, _with("heads", SECOND, [4]), f"{SECOND} has 4 query heads.*no head 4"),
    "flap, channels": (CHANNELS, _renamed("kept_channels", FIRST), UNKNOWN.format("kept_channels", FIRST + "x")),
    "flap, channels of a module less": (CHANNELS, _without("kept_channels", FIRST), f"nothing to take out of {FIRST}"),
    "shrp": (STATIC, _renamed("kept", BERT.format(0)), UNKNOWN.format("kept", BERT.format(0) + "x")),
    "shrp, a module less": (STATIC, _without("kept", BERT.format(1)), f"kept.*{BERT.format(1)}"),
    "shrp, weights": (
        WEIGHED,
        _renamed("importance", BERT.format(0)),
        UNKNOWN.format("importance", BERT.format(0) + "x"),
    ),
    "shrp, weights of a module less": (
        WEIGHED,
        _without("importance", BERT.format(0)),
        f"importance.*{BERT.format(0)}",
    ),
    "shrp, too few weights": (WEIGHED, _with("importance", BERT.format(0), [1.0]), f"importance.*{BERT.format(0)}"),
    "shrp, dropped": (STATIC, _set("layers_dropped", {"x": ["y"]}), UNKNOWN.format("layers_dropped", "x")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_patch_alone_is_refused(case: str, tmp_path: Path) -> None:
    (family, variant, settings), damage, message = CASES[case]
    content = _saved(family, variant, settings, tmp_path)
    model = FAMILIES[family].make()
    expected = outputs(model, **FAMILIES[family].inputs())
    damage(content["patches"][0]["config"])
    (tmp_path / "patchattn_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        patchattn.load_patch(model, tmp_path)
    assert not patchattn.patch_info(model)["patches"]
    found = outputs(model, **FAMILIES[family].inputs())
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("family_and_settings", [PRUNE, MASK, FLAP, CHANNELS, STATIC, WEIGHED], ids=str)
def test_what_is_not_damaged_is_loaded(family_and_settings: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    family, variant, settings = family_and_settings
    _saved(family, variant, settings, tmp_path)
    model: nn.Module = patchattn.load_patch(FAMILIES[family].make(), tmp_path)
    assert [patch["variant"] for patch in patchattn.patch_info(model)["patches"]] == [variant]


def test_a_share_of_less_than_one_head_says_so() -> None:
    with pytest.raises(ValueError, match=r"sparsity=0.05 is less than a single head"):
        patchattn.patch_model(FAMILIES["llama"].make(), "prune", sparsity=0.05, importance="magnitude")


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 40}
    return tf.BertForMaskedLM(tf.BertConfig(num_hidden_layers=3, num_attention_heads=4, **sizes)).eval()


@pytest.mark.parametrize("how", ["whole", "patch"])
def test_paths_among_the_settings_are_those_of_the_whole_model(how: str, tmp_path: Path) -> None:
    model, ids = _encoder(), torch.arange(3, 13)[None]
    patchattn.patch_model(model.bert, "shrp", layers=[0, 2], layers_dropped=[1])
    expected = model(ids).logits
    if how == "whole":
        model.save_pretrained(tmp_path)
        again = patchattn.from_pretrained(tmp_path)
    else:
        patchattn.save_patch(model, tmp_path)
        again = patchattn.load_patch(_encoder(), tmp_path)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(again(ids).logits, expected)


def test_layers_taken_away_after_patching_take_their_settings_along(tmp_path: Path) -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "prune", heads={0: [0], 1: [1]})
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    (patch,) = patchattn.patch_info(model)["patches"]
    assert patch["sites"] == [FIRST]
    assert patch["config"]["heads"] == {FIRST: [0]}
    model.save_pretrained(tmp_path)
    inputs = FAMILIES["llama"].inputs()
    found = outputs(patchattn.from_pretrained(tmp_path), **inputs)
    assert all(torch.equal(left, right) for left, right in zip(found, outputs(model, **inputs), strict=True))


def test_a_field_of_which_nothing_is_left_is_as_if_not_given() -> None:
    settings = {"heads": {SECOND: [0]}, "kept_channels": {FIRST: "f" * 11 + "e"}, "compensate": False}
    model = patchattn.patch_model(FAMILIES["llama"].make(), "flap", settings)
    model.model.layers = model.model.layers[:1]
    (patch,) = patchattn.patch_info(model.model)["patches"]
    assert patch["config"]["heads"] is None
    assert list(patch["config"]["kept_channels"]) == [FIRST.removeprefix("model.")]
