"""Massive activations against loops over what the layers of a model hand on, and interventions against plain hooks."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchattn
from patchattn.cli import main as cli
from patchattn.core.layer_outputs import enclosing_block
from patchattn.core.patching import applied_patches
from patchattn.inspection.massive import MassiveActivations, massive_activations
from patchattn.plotting import plot_massive_activations

from .families import FAMILIES
from .reference import WIDTH, tiny_llama
from .test_importance_cli import tokenizer

SPIKE, DIMENSION = 7, 3  # this token has a massive entry in this dimension, from the embedding on
ROWS = [[3, 7, 1, 9, 22, 5, 7], [2, 8, 7, 1]]


def spiky(**extra: Any) -> nn.Module:
    model = tiny_llama(num_hidden_layers=2, **extra)
    with torch.no_grad():
        model.model.embed_tokens.weight[SPIKE, DIMENSION] = -3000.0
    return model


def padded(side: str) -> dict[str, torch.Tensor]:
    """Both rows, filled up with the token that is massive."""
    ids, mask = torch.full((2, 7), SPIKE), torch.zeros(2, 7, dtype=torch.long)
    for row, tokens in enumerate(ROWS):
        place = slice(7 - len(tokens), 7) if side == "left" else slice(0, len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def handed_on(model: nn.Module, tokens: list[int]) -> list[np.ndarray]:
    """`(T, E)` behind each layer, of one text without padding."""
    kept: list[np.ndarray] = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: kept.append((out if torch.is_tensor(out) else out[0])[0].numpy()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_probe_counts_what_loops_count(side: str, implementation: str) -> None:
    model = spiky(attn_implementation=implementation)
    if implementation == "eager":
        model.float()  # whose rows of padding are not finite in float64
    found = massive_activations(model, [padded(side)], threshold=100.0, ratio=1000.0)
    states = [handed_on(model, tokens) for tokens in ROWS]
    assert (found.sequences, found.first, found.base.layers) == (2, 0, 2)
    for layer in range(2):
        largest, medians, values = [], [], []
        tokens, ids = Counter[int](), Counter[int]()
        for row, of_row in enumerate(states):
            sizes = sorted(abs(float(x)) for x in of_row[layer].ravel())
            largest.append(sizes[::-1][:3])
            medians.append(sizes[(len(sizes) - 1) // 2])
            for token, dimension in np.ndindex(*of_row[layer].shape):
                value = float(of_row[layer][token, dimension])
                if abs(value) > 100.0 and abs(value) >= 1000.0 * medians[-1]:
                    assert dimension == DIMENSION
                    values.append(value)
                    tokens[token] += 1
                    ids[ROWS[row][token]] += 1
        got = found.layers[layer]
        np.testing.assert_allclose(got.largest, np.mean(largest, axis=0), rtol=1e-4)
        np.testing.assert_allclose(got.median, np.mean(medians), rtol=1e-4)
        assert set(got.dimensions) == {DIMENSION}
        massive = got.dimensions[DIMENSION]
        assert (
            (massive.count, massive.tokens, massive.ids)
            == (len(values), dict(tokens), dict(ids))
            == (3, {1: 1, 2: 1, 6: 1}, {7: 3})
        )
        np.testing.assert_allclose(massive.mean, np.mean(values), rtol=1e-4)


def test_how_data_is_batched_changes_nothing() -> None:
    model = spiky()
    together = massive_activations(model, [padded("left")])
    apart = massive_activations(model, [{"input_ids": torch.tensor([tokens])} for tokens in ROWS])
    assert [each.dimensions.keys() for each in together.layers] == [each.dimensions.keys() for each in apart.layers]
    for one, other in zip(together.layers, apart.layers, strict=True):
        np.testing.assert_allclose([*one.largest, one.median], [*other.largest, other.median], rtol=1e-6)


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2", "vit"])
def test_layers_are_found_in_every_family(family: str) -> None:
    """Whole blocks, of which T5 counts parts; their outputs are those that the model itself returns."""
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
    sites = [site for site in patchattn.find_sites(model) if not site.is_cross]
    tower = sites[0].tower
    found = massive_activations(model, [inputs], threshold=0.0, ratio=0.0, modules=f"^{tower}" if tower else None)
    with torch.no_grad():
        given = model(**inputs, output_hidden_states=True)
    states = given.get("encoder_hidden_states", given.get("hidden_states"))
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(states[1].shape[:2]).bool()
    want = np.mean([float(one[kept].abs().max()) for one, kept in zip(states[1], real, strict=True)])
    np.testing.assert_allclose(found.layers[0].largest[0], want, rtol=1e-5)


def test_the_blocks_of_t5_are_no_parts_of_blocks() -> None:
    model = FAMILIES["t5"].make()
    names = {enclosing_block(model, site.name) for site in patchattn.find_sites(model)}
    assert {name.rpartition(".")[0] for name in names} == {"encoder.block", "decoder.block"}


def test_the_file_says_what_was_found(tmp_path: Path) -> None:
    found = massive_activations(spiky(), [padded("left")])
    found.save(tmp_path / "massive.json")
    assert MassiveActivations.load(tmp_path / "massive.json") == found
    content = json.loads((tmp_path / "massive.json").read_text())
    assert content["base"]["model_type"] == "llama"
    assert content["layers"]["1"]["dimensions"]["3"]["ids"] == {"7": 3}
    for change in ({"layers": []}, {"threshold": "1"}, {"more": 1}, {"base": {}}):
        (tmp_path / "bad.json").write_text(json.dumps({**content, **change}))
        with pytest.raises((TypeError, ValueError), match=r"bad\.json"):
            MassiveActivations.load(tmp_path / "bad.json")
    figure = plot_massive_activations(found)
    assert [line.get_label() for line in figure.axes[0].lines][:4] == [
        "largest",
        "2nd largest",
        "3rd largest",
        "median",
    ]


def edited(model: nn.Module, layers: list[int], value: float, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of an unpatched model with massive entries of one dimension replaced behind some layers."""

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = (output if torch.is_tensor(output) else output[0]).clone()
        for row, token in np.ndindex(*hidden.shape[:2]):
            if abs(float(hidden[row, token, DIMENSION])) > 100.0:
                hidden[row, token, DIMENSION] = value
        return hidden if torch.is_tensor(output) else (hidden, *output[1:])

    handles = [model.model.layers[layer].register_forward_hook(replace) for layer in layers]
    with torch.no_grad():
        logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize(("to", "value"), [("zero", 0.0), ("mean", None)])
@pytest.mark.parametrize(("where", "layers"), [("first", [0]), ("all", [0, 1])])
def test_they_are_replaced_behind_the_layer_that_makes_them(
    to: str, value: float | None, where: str, layers: list[int], tmp_path: Path
) -> None:
    model, inputs = spiky(), padded("left")
    found = massive_activations(model, [inputs])
    found.save(tmp_path / "massive.json")
    mean = found.layers[0].dimensions[DIMENSION].mean
    assert mean == pytest.approx(found.layers[1].dimensions[DIMENSION].mean, rel=0.01)
    real = inputs["attention_mask"].bool()
    plain = edited(model, [], 0.0, inputs)[real]
    want = edited(model, layers, mean if value is None else value, inputs)[real]
    patchattn.patch_model(model, "massive", activations=tmp_path / "massive.json", to=to, where=where)
    assert sum(len(patch.sites) for patch in applied_patches(model)) == len(layers)
    with torch.no_grad():
        got = model(**inputs).logits[real]
    torch.testing.assert_close(
        got, want, rtol=1e-3 if where == "all" and value is None else 1e-9, atol=1e-3 if value is None else 1e-9
    )
    assert (got - plain).abs().max() > (0.0 if value is None else 1e-2)
    patchattn.save_patch(model, tmp_path / "patch")
    (tmp_path / "massive.json").unlink()
    with torch.no_grad():
        assert torch.equal(patchattn.load_patch(spiky(), tmp_path / "patch")(**inputs).logits[real], got)


def test_generating_is_one_forward() -> None:
    model = patchattn.patch_model(
        spiky(), "massive", activations={0: {DIMENSION: 1.0, 4: 0.2}}, threshold=0.1, to="mean"
    )
    inputs = padded("left")
    how: Any = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = model.generate(**given, pad_token_id=0, **how)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    with torch.no_grad():
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        want = model(found.sequences[:, :-1], attention_mask=mask, position_ids=place).logits[:, 6:]
    torch.testing.assert_close(torch.stack(found.logits, 1).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({}, ValueError, "calibrate massive"),
        ({"activations": "nowhere.json"}, ValueError, "nowhere.json"),
        ({"activations": {5: {1: 0.0}}}, ValueError, r"of the layers \[5\]"),
        ({"activations": {0: {}}}, TypeError, "mapping of layers to dimensions"),
        ({"activations": {0: {1: float("inf")}}}, ValueError, "float32 holds"),
        ({"activations": {0: {-1: 0.0}}}, TypeError, "counted from 0"),
        (
            {"activations": {"values": {0: {1: 0.0}}, "base": {"model_type": "gpt2", "layers": 2, "heads": 4}}},
            ValueError,
            "list of massive activations is for gpt2",
        ),
    ],
)
def test_what_is_refused(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    model = spiky()
    with pytest.raises(error, match=says):
        patchattn.patch_model(model, "massive", **settings)
    assert not applied_patches(model)


def test_a_dimension_that_is_not_there_is_refused_in_the_call() -> None:
    model = patchattn.patch_model(spiky(), "massive", activations={0: {WIDTH: 0.0}})
    with pytest.raises(ValueError, match=f"no dimension {WIDTH}"):
        model(torch.tensor([ROWS[0]]))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = FAMILIES["llama"].make()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 4000.0
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("w1 w2 w3\nw4 w5\n")
    out, picture = tmp_path / "massive.json", tmp_path / "massive.png"
    arguments = [str(tmp_path / "model"), "--data", str(tmp_path / "texts.txt"), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["calibrate", "massive", *arguments, "--output", str(out), "--plot", str(picture)])
    assert not ended.value.code
    assert "layers are massive in the dimensions [5]; texts: 1." in capsys.readouterr().out
    assert MassiveActivations.load(out).first == 0
    assert picture.stat().st_size > 1000
    patchattn.patch_model(model, "massive", activations=out)
