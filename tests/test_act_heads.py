"""Which layers and heads ACT calibrates: defaults, head lists, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.core.heads import HeadList
from patchattn.core.kv_caches import cache_argument
from patchattn.variants.sinks.act import ACTConfig

from .families import FAMILIES
from .test_act import tokens


def six_layers() -> nn.Module:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=4, vocab_size=64
    )
    return LlamaForCausalLM(config).eval()


def calibrated_layers(model: nn.Module) -> list[int]:
    return [i for i, layer in enumerate(model.model.layers) if layer.self_attn.patchattn.active]


def test_default_layers() -> None:
    assert calibrated_layers(patchattn.patch_model(six_layers(), "act")) == [2, 3, 4]
    assert len(patchattn.patch_model(FAMILIES["llama"].make(), "act").model.layers[0].self_attn.patchattn.active) == 1
    with pytest.raises(ValueError, match="leaves out the first two layers"):
        patchattn.patch_model(six_layers(), "act", layers=[0, 5])


def write(folder: Path, content: Any) -> Path:
    path = folder / "heads.json"
    path.write_text(json.dumps(content))
    return path


BASE = {"model_type": "llama", "layers": 6, "heads": 4, "name": None}


def test_a_head_list_from_a_file_goes_into_the_saved_patch(tmp_path: Path) -> None:
    path = write(tmp_path, {"heads": {"3": [2, 0]}, "base": BASE, "calibration": {"accuracy": 0.5}})
    model = patchattn.patch_model(six_layers(), "act", heads=str(path))
    assert calibrated_layers(model) == [3]
    path.unlink()
    patchattn.save_patch(model, tmp_path / "patch")
    loaded = patchattn.load_patch(six_layers(), tmp_path / "patch")
    assert calibrated_layers(loaded) == [3]
    assert patchattn.patch_info(loaded)["patches"][0]["config"]["heads"] == {"heads": {"3": [0, 2]}, "base": BASE}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "mistral"}, "mistral of 6"), ({"layers": 7}, "7 layers"), ({"heads": 8}, "8 heads")],
    ids=str,
)
def test_a_head_list_of_another_model_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"heads": {"3": [0]}, "base": {**BASE, **change}})
    model = six_layers()
    with pytest.raises(ValueError, match=message):
        patchattn.patch_model(model, "act", heads=str(path))
    assert not hasattr(model.model.layers[3].self_attn, "patchattn")


def test_a_head_list_of_a_model_of_another_name_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"heads": {"3": [0]}, "base": {**BASE, "name": "llama-chat"}})
    model = six_layers()
    model.config._name_or_path = "someone/llama"
    with pytest.raises(ValueError, match=r"for llama-chat, .* belongs to llama, .*base.name to null"):
        patchattn.patch_model(model, "act", heads=str(path))
    model.config._name_or_path = "/data/llama-chat"
    assert calibrated_layers(patchattn.patch_model(model, "act", heads=str(path))) == [3]


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        ([], ValueError, "empty"),
        ({}, ValueError, "empty"),
        ({3: []}, ValueError, "empty"),
        ({"heads": {}, "base": BASE}, ValueError, "empty"),
        ({3: 1}, TypeError, "list of heads"),
        ([3], TypeError, "pair"),
        ([(3, "a")], TypeError, "integers"),
        ([(3, True)], TypeError, "integers"),
        ([(-1, 0)], ValueError, "counted from 0"),
        (7, TypeError, "Heads are"),
        ("no_such_file.json", ValueError, "no head list"),
        ({"heads": {"1": [0]}, "model": "x"}, ValueError, "fields"),
        ({"heads": {"1": [0]}, "base": {"layers": 3}}, ValueError, "base has"),
        ({"heads": {"1": [0]}, "base": {**BASE, "layers": "six"}}, TypeError, "layers='six'"),
    ],
    ids=str,
)
def test_head_lists_that_are_none(heads: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ACTConfig(heads=heads)


@pytest.mark.parametrize("content", ["{", "\xff", "3"])
def test_files_that_are_no_head_list(content: str, tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises((ValueError, TypeError), match=r"heads\.json"):
        HeadList.parse(path)


@pytest.mark.parametrize("heads", [{6: [0]}, {3: [4]}])
def test_heads_that_are_not_there(heads: Any) -> None:
    with pytest.raises(ValueError, match="6 layers of 4 heads"):
        patchattn.patch_model(six_layers(), "act", heads=heads)


def test_heads_of_layers_that_are_not_chosen() -> None:
    with pytest.raises(ValueError, match="none of which"):
        patchattn.patch_model(six_layers(), "act", heads={3: [0]}, layers=[1, 2])


@pytest.mark.parametrize("wrong", [{"beta": 1.5}, {"alpha": -1.0}, {"threshold": 2.0}, {"sink_rule": "median"}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        ACTConfig(**wrong)


def test_what_it_refuses() -> None:
    model = six_layers()
    with pytest.raises(ValueError, match=r"nothing can come after it.*\['ssa', 'act'\]"):
        patchattn.patch_model(model, ["act", "ssa"])
    patchattn.patch_model(model, ["ssa", "act"])
    with pytest.raises(ValueError, match="nothing can come after it"):
        patchattn.patch_model(model, "moh")
    patchattn.unpatch_model(model)
    with pytest.raises(NotImplementedError, match="cross"):
        patchattn.patch_model(FAMILIES["bart"].make(), "act")
    patchattn.patch_model(model, "act")
    model.train().config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match="dropout"):
        model(tokens())
    cache = DynamicCache(config=model.config)
    model.eval()(tokens(), **cache_argument(model, cache))
    with pytest.raises(NotImplementedError, match="assisted decoding"):
        cache.crop(-1)


def test_head_numbers_are_copied_to_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph must not copy them; and what inference made, training may use."""
    model = patchattn.patch_model(six_layers(), "act", heads=[[3, 0], [3, 2], [4, 1]], sink_rule="fixed", threshold=0.1)
    before = dict(model.state_dict())
    with torch.inference_mode():
        first = model(tokens()).logits
    made: list[Any] = []
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *given, **how: made.append(given) or tensor(*given, **how))
    again = model(tokens()).logits
    again.sum().backward()
    assert not [given for given in made if given[0] in ((0, 2), (1,))]
    torch.testing.assert_close(again.detach(), first.clone())
    assert list(model.state_dict()) == list(before)
