"""Attention that is computed to be drawn: against what eager attention gives."""

from functools import partial

import pytest
import torch

import patchattn
from patchattn.inspection.attention_maps import attention_maps, attention_received, image_attention

from . import vlms
from .families import FAMILIES

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5, check_dtype=False)


def model_of(family):
    return FAMILIES[family].make()


def padded(side):
    """Two rows of different length."""
    ids = FAMILIES["llama"].inputs()["input_ids"].clone()
    mask = torch.ones_like(ids)
    hidden = slice(0, 3) if side == "left" else slice(6, 9)
    ids[1, hidden], mask[1, hidden] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def reference(model, inputs):
    """`(B, H, T, T)` of each layer, from transformers' eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_received_is_the_mean_of_the_queries_that_see_a_key(side):
    model, inputs = model_of("llama"), padded(side)
    wanted = reference(model, inputs)
    real = [row.nonzero().flatten() for row in inputs["attention_mask"]]
    for layer, whole in zip(attention_received(model, inputs), wanted, strict=True):
        expected = torch.zeros(4, 9).double()
        for position in range(9):
            shares = []
            for row, places in enumerate(real):
                if position < len(places):
                    shares.append(whole[row][:, places[position:], places[position]].mean(-1))
            expected[:, position] = torch.stack(shares).mean(0)
        close(layer.share, expected)
        both = torch.tensor([9 - i if i < 9 else 0 for i in range(9)]).double() / 9
        short = torch.tensor([max(6 - i, 0) for i in range(9)]).double() / 6
        seen = torch.where(torch.arange(9) < 6, (both + short) / 2, both)
        close(layer.seen, seen)
        close(layer.uniform, torch.where(torch.arange(9) < 6, (1 / 9 + 1 / 6) / 2, 1 / 9).double())
        assert torch.equal(layer.sinks(1.5, 0.4), (layer.share > 1.5 * layer.uniform) & (seen >= 0.4))


@pytest.mark.parametrize("side", ["left", "right"])
def test_maps_are_those_of_eager_attention_without_padding(side):
    model, inputs = model_of("llama"), padded(side)
    wanted = reference(model, inputs)
    places = inputs["attention_mask"][1].nonzero().flatten()
    maps = attention_maps(model, inputs, row=1)
    assert [(one.site.layer_index, one.head) for one in maps] == [(i, h) for i in range(2) for h in range(4)]
    for one in maps:
        whole = wanted[one.site.layer_index][1, one.head]
        close(one.weights, whole[places][:, places])
        assert torch.equal(one.visible, torch.ones(6, 6).tril().bool())
        assert one.queries == one.keys == tuple(places.tolist())


def test_a_coarse_map_sums_over_keys_and_means_over_queries():
    model, inputs = model_of("llama"), FAMILIES["llama"].inputs()
    wanted = reference(model, inputs)[1][0, 2]
    (one,) = attention_maps(model, inputs, layers=1, heads=[2], resolution=4)
    cells = [[0, 1, 2], [3, 4], [5, 6], [7, 8]]
    expected = [[wanted[rows][:, columns].sum(-1).mean() for columns in cells] for rows in cells]
    close(one.weights, torch.tensor(expected).double())
    close(one.weights.sum(-1), torch.ones(4).double())
    assert torch.equal(one.visible, torch.ones(4, 4).tril().bool())
    assert one.queries == one.keys == (0, 3, 5, 7)


def test_attention_of_a_patched_model_is_that_after_its_temperatures():
    model, inputs = model_of("llama"), FAMILIES["llama"].inputs()
    plain = reference(model, inputs)[0][0, 1]
    model.set_attn_implementation("eager")
    patchattn.patch_model(model, "ssa", value=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".patchattn." in name:
                parameter.fill_(0.5)
        wanted = model(**inputs, output_attentions=True).attentions[0][0, 1]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = attention_maps(model, inputs, layers=0, heads=[1])[0].weights
    close(found, wanted)
    assert (found - plain).abs().max() > 0.01
    assert patchattn.patch_info(model)["patches"][0]["variant"] == "ssa"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_cross_attention():
    model, inputs = model_of("t5"), FAMILIES["t5"].inputs()
    maps = attention_maps(model, inputs, modules=r"EncDecAttention", layers=0)
    assert all(one.site.is_cross and one.weights.shape == (6, 9) for one in maps)
    for layer in attention_received(model, inputs, modules=r"EncDecAttention"):
        close(layer.share.sum(-1), torch.ones(4).double())


@pytest.mark.parametrize("name", ["llava", "llava_siglip", "llava_next", "qwen2_5_vl"])
def test_attention_to_an_image(name):
    model, inputs = vlms.make(name), vlms.inputs(name)
    wanted = [layer[1] for layer in reference(model, inputs)]
    ids, real = inputs["input_ids"][1], inputs["attention_mask"][1].bool()
    image = (ids == vlms.IMAGE).nonzero().flatten()
    text = [i for i in range(int(image[-1]) + 1, len(ids)) if real[i]]
    for queries, rows in (("last", text[-1:]), ("text", text), (text[1], [text[1]])):
        found = image_attention(model, inputs, row=1, queries=queries, heads=[0, 3])
        weights = torch.stack([layer[[0, 3]][:, rows].mean(1) for layer in wanted]).flatten(0, 1).mean(0)
        rows_, columns = found.grid.shape
        close(found.grid.flatten(), weights[image][: rows_ * columns])
        assert found.total == pytest.approx(float(weights[image].sum()), abs=1e-4)
        assert (found.layers, found.heads) == (2, 4)
        assert found.grid.shape == found.span.grid


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, inputs: attention_maps(model, inputs, row=2), "no sequence 2 in a batch of 2"),
        (lambda model, inputs: attention_maps(model, inputs, heads=[4]), "heads 0 to 3, got 4"),
        (lambda model, inputs: attention_maps(model, inputs, layers=7), "no layer 7"),
        (lambda model, inputs: attention_maps(model, inputs, resolution=0), "at least 1, got 0"),
        (lambda model, inputs: attention_received(model, inputs, modules="nowhere"), "matches none"),
    ],
)
def test_what_is_not_there_is_refused(call, message):
    model = model_of("llama")
    with pytest.raises(ValueError, match=message):
        call(model, FAMILIES["llama"].inputs())
    assert not patchattn.core.patching.is_patched(model)


def test_images_that_cannot_be_drawn_are_refused():
    with pytest.raises(NotImplementedError, match="not a vision-language model"):
        image_attention(model_of("llama"), FAMILIES["llama"].inputs())
    model, inputs = vlms.make("instructblip"), vlms.inputs("instructblip")
    with pytest.raises(NotImplementedError, match="no place in the picture"):
        image_attention(model, inputs)
    model, inputs = vlms.make("llava"), vlms.inputs("llava")
    with pytest.raises(ValueError, match="has 1 images"):
        image_attention(model, inputs, image=1)
    with pytest.raises(ValueError, match="chooses no token"):
        image_attention(model, inputs, queries=1)


def own_weights(model, inputs):
    """`(B, H, T, T)` of each layer, as a patched model under eager attention returns them to whoever asks."""
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions


def test_a_variant_that_computes_attention_itself_is_looked_at_by_its_weights():
    """Of four heads ACT calibrates two, in the second of two layers; the first is as it was."""
    model, inputs = model_of("llama"), padded("left")
    model.set_attn_implementation("eager")
    plain = attention_received(model, inputs)
    patchattn.patch_model(model, "act", alpha=1.0, keep_first=False, heads=[[1, 0], [1, 3]])
    wanted = own_weights(model, inputs)
    first, second = attention_received(model, inputs)
    close(first.share, plain[0].share)
    assert (second.share - plain[1].share).abs().max() > 0.01
    real = [row.nonzero().flatten() for row in inputs["attention_mask"]]
    for layer, whole in zip((first, second), wanted, strict=True):
        for position in range(6):
            shares = [whole[row][:, places[position:], places[position]].mean(-1) for row, places in enumerate(real)]
            close(layer.share[:, position], torch.stack(shares).mean(0).double())
    found = attention_maps(model, inputs, layers=1, heads=[0, 2], row=1)
    for one, head in zip(found, (0, 2), strict=True):
        close(one.weights, wanted[1][1, head][3:, 3:].double())
    again = own_weights(model, inputs)
    assert all(torch.equal(left, right) for left, right in zip(again, wanted, strict=True))


def test_var_is_looked_at_by_its_weights():
    model, inputs = vlms.make("llava"), vlms.inputs("llava")
    model.set_attn_implementation("eager")
    before = image_attention(model, inputs, row=1)
    patchattn.patch_model(model, "var", patchattn.variant_info("var").examples[0])
    after = image_attention(model, inputs, row=1)
    assert float((after.grid - before.grid).abs().max()) > 1e-4
    ids, real = inputs["input_ids"][1], inputs["attention_mask"][1].bool()
    image, last = (ids == vlms.IMAGE).nonzero().flatten(), int(real.nonzero().max())
    weights = torch.stack([layer[1][:, last] for layer in own_weights(model, inputs)[-2:]]).flatten(0, 1).mean(0)
    assert after.total == pytest.approx(float(weights[image].sum()), abs=1e-4)


def test_act_is_looked_at_under_a_base_that_gives_no_weights():
    """The weights that the same patch returns under eager attention."""
    settings = {"alpha": 1.0, "keep_first": False, "heads": [[1, 0], [1, 3]]}
    found = {}
    for implementation in ("eager", "sdpa"):
        model, inputs = model_of("llama"), padded("left")
        model.set_attn_implementation(implementation)
        plain = attention_maps(model, inputs, layers=1, heads=[0], row=1)
        patchattn.patch_model(model, "act", **settings)
        found[implementation] = attention_maps(model, inputs, row=1)
        assert (found[implementation][4].weights - plain[0].weights).abs().max() > 0.01
        if implementation == "eager":
            wanted = [layer[1, head][3:, 3:].double() for layer in own_weights(model, inputs) for head in range(4)]
    for one, weights in zip(found["sdpa"], wanted, strict=True):
        close(one.weights, weights)


def test_var_is_looked_at_under_sdpa():
    after = {}
    for implementation in ("eager", "sdpa"):
        model, inputs = vlms.make("llava"), vlms.inputs("llava")
        model.set_attn_implementation(implementation)
        before = image_attention(model, inputs, row=1)
        patchattn.patch_model(model, "var", patchattn.variant_info("var").examples[0])
        after[implementation] = image_attention(model, inputs, row=1)
        assert float((after[implementation].grid - before.grid).abs().max()) > 1e-4
    close(after["sdpa"].grid, after["eager"].grid)
