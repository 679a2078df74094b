"""Edits of heads against loops over tokens and heads in float64, and against hooks on the output projection."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchattn
from patchattn.core.head_vectors import HeadVectors
from patchattn.core.patching import applied_patches

from .families import FAMILIES
from .reference import DIM, HEADS, KV_HEADS, layer_in_and_out, rotate, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13]])
VECTOR = np.linspace(-1.0, 2.0, DIM)
Edit = Callable[[str, int, int, np.ndarray], np.ndarray]  # of what, of which head, of which token, from what


def edited_attention(module: Any, inputs: np.ndarray, edit: Edit) -> np.ndarray:
    """One causal layer, `(T, E)`, with queries, values and outputs of heads changed on their way."""
    weights = {name: getattr(module, f"{name}_proj").weight.detach().numpy() for name in "qkvo"}
    rows = []
    for i in range(len(inputs)):
        heads = []
        for h in range(HEADS):
            group = h // (HEADS // KV_HEADS)
            query = edit("query", h, i, rotate((weights["q"] @ inputs[i]).reshape(HEADS, DIM)[h], i))
            scores, values = [], []
            for j in range(i + 1):
                key = rotate((weights["k"] @ inputs[j]).reshape(KV_HEADS, DIM)[group], j)
                scores.append(query @ key / np.sqrt(DIM))
                values.append(edit("value", h, j, (weights["v"] @ inputs[j]).reshape(KV_HEADS, DIM)[group]))
            share = np.exp(np.array(scores) - max(scores))
            heads.append(edit("output", h, i, share @ np.array(values) / share.sum()))
        rows.append(weights["o"] @ np.concatenate(heads))
    return np.array(rows)


@pytest.mark.parametrize(
    ("rows", "edited"),
    [
        ({}, range(7)),
        ({"rows": "last"}, [6]),
        ({"rows": "from", "first_row": 4}, [4, 5, 6]),
        ({"rows": "marked", "tokens": [0, 5]}, [0, 5]),
    ],
)
@pytest.mark.parametrize(
    ("settings", "gain", "added"),
    [
        ({}, 0.0, 0.0),
        ({"gain": 0.5}, 0.5, 0.0),
        ({"gain": 1.0, "strength": -2.0}, 1.0, -2.0),
        ({"edit": "query"}, 0.0, 0.0),
        ({"edit": "query", "gain": 3.0}, 3.0, 0.0),
        ({"edit": "value", "gain": 1.0, "strength": 3.0}, 1.0, 3.0),
    ],
)
def test_the_formula(settings: dict[str, Any], gain: float, added: float, rows: dict[str, Any], edited: Any) -> None:
    if settings.get("edit") == "value" and rows.get("rows") == "last":
        pytest.skip("refused: a value is of a token")
    chosen = [2, 3] if settings.get("edit") == "value" else [1, 2]
    given = {"heads": {0: chosen}, **settings, **rows}
    if added:
        given["vectors"] = {0: {head: VECTOR.tolist() for head in chosen}}
    model = patchattn.patch_model(tiny_llama(), "heads", **given)
    inputs, got = layer_in_and_out(model, TOKENS)

    def edit(what: str, head: int, token: int, x: np.ndarray) -> np.ndarray:
        if what != settings.get("edit", "output") or head not in chosen or token not in edited:
            return x
        return gain * x + added * VECTOR

    want = edited_attention(model.model.layers[0].self_attn, inputs[0], edit)
    np.testing.assert_allclose(got[0], want, rtol=1e-6, atol=1e-9)


def test_a_query_of_zero_gives_the_mean_of_what_is_visible() -> None:
    model = tiny_llama(attn_implementation="eager")
    patchattn.patch_model(model, "heads", edit="query", heads={0: [1]})
    weights = model(TOKENS[:, :4], output_attentions=True).attentions[0][0]
    assert torch.allclose(weights[1, 1], torch.tensor([0.5, 0.5, 0.0, 0.0]).double())
    assert not torch.allclose(weights[0, 1], torch.tensor([0.5, 0.5, 0.0, 0.0]).double())


def zeroing(model: nn.Module, where: Callable[[int], slice]) -> Any:
    """Hooks that set outputs of heads 0 and 3 of both layers to zero before the output projection; no patch."""

    def zero(module: nn.Module, args: Any) -> Any:
        states = args[0].clone().unflatten(-1, (HEADS, DIM))
        states[:, where(states.shape[1]), [0, 3]] = 0.0
        return (states.flatten(-2),)

    return [layer.self_attn.o_proj.register_forward_pre_hook(zero) for layer in model.model.layers]


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"rows": "last"}, slice(4, None)),
        ({"rows": "from", "first_row": 4}, slice(4, None)),
        ({"rows": "last", "phase": "prompt"}, slice(4, 5)),
        ({"rows": "last", "phase": "decoding"}, slice(5, None)),
        ({"phase": "prompt"}, slice(0, 5)),
        ({"phase": "decoding"}, slice(5, None)),
        ({"rows": "marked", "tokens": [3, 6]}, slice(3, None, 3)),
    ],
)
@pytest.mark.parametrize("kind", [None, "static"])
def test_generating_edits_the_tokens_that_the_settings_say(
    settings: dict[str, Any], where: slice, kind: str | None
) -> None:
    """Every step against one forward of a model with hooks, over all of the text, of which a slice is edited."""
    model = tiny_llama(num_hidden_layers=2)
    prompt = TOKENS[:, :5]
    patchattn.patch_model(model, "heads", heads={0: [0, 3], 1: [0, 3]}, **settings)
    how = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    how |= {} if kind is None else {"cache_implementation": kind, "disable_compile": True}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how, pad_token_id=0)
    patchattn.unpatch_model(model)
    handles = zeroing(model, lambda length: where)
    with torch.no_grad():
        want = model(found.sequences[:, :-1]).logits[:, 4:]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(torch.stack(found.logits, 1).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "rows", [{"rows": "last"}, {"rows": "from", "first_row": 2}, {"rows": "marked", "tokens": [1]}]
)
@pytest.mark.parametrize("edit", ["output", "query", "value"])
def test_padding_moves_no_edit(side: str, rows: dict[str, Any], edit: str) -> None:
    if (edit, rows["rows"]) == ("value", "last"):
        pytest.skip("refused: a value is of a token")
    model = patchattn.patch_model(tiny_llama(num_hidden_layers=2), "heads", edit=edit, **rows)
    real = slice(3, None) if side == "left" else slice(0, 4)
    mask = torch.zeros(2, 7, dtype=torch.long)
    mask[0], mask[1, real] = 1, 1
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(TOKENS.expand(2, -1), attention_mask=mask, position_ids=place).logits
        for row, one in enumerate([TOKENS, TOKENS[:, real]]):
            torch.testing.assert_close(together[row, mask[row].bool()], model(one).logits[0])


def test_vectors_come_from_a_file_and_are_saved_with_the_patch(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    heads = model.config.num_attention_heads
    size = model.config.head_dim
    drawn = torch.randn(2, size, generator=torch.Generator().manual_seed(0)).tolist()
    base = {"model_type": "llama", "layers": model.config.num_hidden_layers, "heads": heads}
    made = HeadVectors.parse({"vectors": {1: {0: drawn[0], 2: drawn[1]}}, "base": base})
    made.save(tmp_path / "vectors.json", tokens=12)
    assert HeadVectors.parse(tmp_path / "vectors.json") == made
    patchattn.patch_model(model, "heads", vectors=tmp_path / "vectors.json", gain=1.0)
    patchattn.save_patch(model, tmp_path / "patch")
    (tmp_path / "vectors.json").unlink()
    again = patchattn.load_patch(FAMILIES["llama"].make(), tmp_path / "patch")
    with torch.no_grad():
        assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
        assert not torch.equal(model(TOKENS)[0], FAMILIES["llama"].make()(TOKENS)[0])
    other = {"vectors": made.to_dict()["vectors"], "base": {**base, "heads": heads + 1}}
    with pytest.raises(ValueError, match=f"of {base['layers']} layers with {heads + 1} heads"):
        patchattn.patch_model(FAMILIES["llama"].make(), "heads", vectors=other)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"tokens": [1]}, ValueError, "tokens are for"),
        ({"first_row": 2}, ValueError, 'is for rows="from"'),
        ({"edit": "query", "vectors": {0: {0: [1.0]}}}, ValueError, "leave out vectors"),
        ({"edit": "value", "rows": "last"}, ValueError, "is of tokens"),
        ({"edit": "value", "phase": "prompt"}, ValueError, "is of tokens"),
        ({"edit": "value", "heads": {0: [1]}}, ValueError, "share one head of values"),
        ({"edit": "value", "vectors": {0: {0: [1.0] * DIM, 1: [2.0] * DIM}}}, ValueError, "with the same vector"),
        ({"heads": {0: [0]}, "vectors": {0: {1: [1.0] * DIM}}}, ValueError, "no vector for head 0 of layer 0"),
        ({"heads": {0: [4]}}, ValueError, "counted from 0"),
        ({"vectors": {0: {0: []}}}, TypeError, "list of numbers"),
        ({"vectors": {0: {0: [1.0], 1: [1.0, 2.0]}}}, ValueError, "of one length"),
        ({"vectors": {0: {0: ["1"]}}}, TypeError, "list of numbers"),
        ({"vectors": {0: [1.0]}}, TypeError, "layers to heads to numbers"),
        ({"vectors": {"vectors": {0: {0: [1.0]}}, "more": 1}}, ValueError, "have the fields"),
        ({"vectors": "nowhere.json"}, ValueError, "There is no file"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    model = tiny_llama()
    with pytest.raises(error, match=says):
        patchattn.patch_model(model, "heads", **settings)
    assert not applied_patches(model)


def test_vectors_of_another_width_are_refused_by_the_layer() -> None:
    model = patchattn.patch_model(tiny_llama(), "heads", vectors={0: {0: [1.0, 2.0]}})
    with pytest.raises(ValueError, match=rf"have 2 numbers, but heads of model.layers.0.self_attn give {DIM}"):
        model(TOKENS)


def test_settings_under_which_rows_know_of_later_ones_say_so() -> None:
    for settings, ahead in (({}, False), ({"rows": "last"}, True), ({"phase": "prompt"}, True)):
        model = patchattn.patch_model(tiny_llama(), "heads", **settings)
        assert [patch.looks_ahead for patch in applied_patches(model)] == [ahead]
        caching = next(c for c in patchattn.check_patch(model, {"input_ids": TOKENS}).checks if "cache" in c.name)
        assert (caching.status == "passed") is not ahead
