"""DAMRO against its formula: outliers in numpy, and two explicit forward passes of the unpatched model."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import patchattn
from patchattn.core.chain import attention_call
from patchattn.core.module_call import ModuleCall
from patchattn.variants.decoding.damro import DAMRO
from patchattn.vision.outliers import attention_received

from . import vlms
from .test_decoding import STEPS, decode, extended

WITH_CLS = ["llava", "llava_next", "instructblip"]
SCORE = {name: "cls" if name in WITH_CLS else "received" for name in vlms.VLMS}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference_scores(query: np.ndarray, key: np.ndarray, heads: int, kind: str, one_wide: bool) -> np.ndarray:
    """`(N,)` from queries and keys `(N, C)` of one picture, head by head."""
    rows = query[:1] if kind == "cls" else query
    parts = [slice(None)] if one_wide else [slice(h * 8, h * 8 + 8) for h in range(heads)]
    attention = [softmax(rows[:, p] @ key[:, p].T / math.sqrt(key[:, p].shape[1])) for p in parts]
    return np.mean(attention, axis=0).mean(0)


def qk_of_layer(model: Any, name: str, pixels: dict[str, torch.Tensor]) -> tuple[list[Any], Any]:
    """Queries and keys `(N, C)` of each picture in the layer that DAMRO reads, from that layer's weights and input."""
    seen: dict[str, Any] = {}

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.update(x=args[0] if args else kwargs["hidden_states"], **kwargs)

    tower = {"instructblip": "vision_model", "qwen2_5_vl": "model.visual"}.get(name, "model.vision_tower")
    path = "blocks.1.attn" if name == "qwen2_5_vl" else f"encoder.layers.{2 if 'siglip' in name else 1}.self_attn"
    tower = model.get_submodule(tower)
    module = tower.get_submodule(path)
    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        if name == "qwen2_5_vl":
            out = tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"])
        else:
            flat = pixels["pixel_values"]
            out = tower(flat.flatten(0, 1) if flat.dim() == 5 else flat, output_hidden_states=True)
        handle.remove()
        if name in ("instructblip", "qwen2_5_vl"):
            q, k, _ = module.qkv(seen["x"]).chunk(3, dim=-1)
        else:
            q, k = module.q_proj(seen["x"]), module.k_proj(seen["x"])
    if name != "qwen2_5_vl":
        return [(a.numpy(), b.numpy()) for a, b in zip(q, k, strict=True)], out
    cos, sin = (t[:, None].numpy() for t in seen["position_embeddings"])

    def turned(t: torch.Tensor) -> np.ndarray:
        x = t.numpy().reshape(len(t), 4, 8)
        return (x * cos + np.concatenate([-x[..., 4:], x[..., :4]], -1) * sin).reshape(len(t), 32)

    ends = np.cumsum(pixels["image_grid_thw"].prod(-1).numpy())[:-1]
    return list(zip(np.split(turned(q), ends), np.split(turned(k), ends), strict=True)), out


def negative_image(model: Any, name: str, given: dict[str, torch.Tensor], k: int, one_wide: bool) -> torch.Tensor:
    """`(n, E)` what the negative branch sees of the image of a batch of one."""
    pairs, out = qk_of_layer(model, name, given)
    scores = [reference_scores(q, key, 4, SCORE[name], one_wide) for q, key in pairs]
    with torch.no_grad():
        if name == "qwen2_5_vl":
            merged = model.model.visual.merger(out.last_hidden_state)  # in the encoder's own order, as the scores
            best = np.argsort(-scores[0].reshape(-1, 4).mean(1))[:k]
            return merged[best.copy()]
        best = np.argsort(-scores[0][1:])[:k] + 1 if name in WITH_CLS else np.argsort(-scores[0])[:k]
        if name == "instructblip":
            states = out.last_hidden_state[:, best.copy()]
            queries = model.query_tokens
            mask = torch.ones(1, queries.shape[1] + 4, dtype=torch.long)
            former = model.qformer(
                input_ids=given["qformer_input_ids"],
                attention_mask=mask,
                query_embeds=queries,
                encoder_hidden_states=states,
            )
            return model.language_projection(former[0][:, : queries.shape[1]])[0]
        layer = -1 if name == "llava_siglip" else -2
        tokens = model.model.multi_modal_projector(out.hidden_states[layer][0][best.copy()])
        return tokens if name != "llava_next" else torch.cat([tokens, model.model.image_newline[None]])


def expected_logits(
    model: Any, name: str, given: dict[str, torch.Tensor], text: torch.Tensor, image: torch.Tensor, alpha: float
) -> np.ndarray:
    """`(STEPS, V)` contrastive logits of a batch of one along `text` `(1, STEPS)`: two forward passes per step.

    `image` `(n, E)` is what the negative one sees of the image.
    """
    language = model.language_model if name == "instructblip" else model
    embed = model.get_input_embeddings()
    found = []
    for step in range(STEPS):
        longer = extended(given, text[:, :step])
        ids = longer["input_ids"][0]
        spots = (ids == vlms.IMAGE).nonzero()[:, 0]
        with torch.no_grad():
            before, after = embed(ids[: spots[0]]), embed(ids[spots[-1] + 1 :])
            embeddings = torch.cat([before, image, after])[None]
            full = model(**longer).logits[0, -1].numpy()
            positions = torch.arange(embeddings.shape[1])[None]
            negative = language(inputs_embeds=embeddings, position_ids=positions).logits[0, -1].numpy()
        contrast = (1 + alpha) * full - alpha * negative
        contrast[full < full.max() + math.log(0.1)] = -np.inf
        found.append(contrast)
    return np.array(found)


@pytest.mark.parametrize("attention", ["heads", "one_wide_head"])
@pytest.mark.parametrize("name", vlms.VLMS)
def test_logits_are_those_of_two_forward_passes(name: str, attention: str) -> None:
    dtype = torch.float32 if name == "qwen2_5_vl" else torch.float64
    plain, given = vlms.make(name, dtype=dtype), vlms.inputs(name, dtype=dtype)
    settings = {"top_k": 3, "score": SCORE[name], "attention": attention}
    model = patchattn.patch_model(vlms.make(name, dtype=dtype), "damro", **settings)
    tokens, steps = decode(model, given)
    alpha = 0.5 if name == "instructblip" else 2.0
    for row in range(2):
        alone = vlms.single(given, row)
        image = negative_image(plain, name, alone, 3, attention == "one_wide_head")
        expected = expected_logits(plain, name, alone, tokens[row : row + 1], image, alpha)
        got = steps[row].numpy()
        assert (np.isinf(got) == np.isinf(expected)).all()
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_the_two_forms_of_attention_choose_differently() -> None:
    given = vlms.inputs("llava")
    first, second = (
        decode(patchattn.patch_model(vlms.make("llava"), "damro", top_k=2, attention=kind), given)[1]
        for kind in ("heads", "one_wide_head")
    )
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("attention", ["heads", "one_wide_head"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", vlms.VLMS)
def test_outlier_scores_against_numpy(name: str, implementation: str, attention: str) -> None:
    model, given = vlms.make(name), vlms.inputs(name)
    expected = [
        reference_scores(q.astype(float), k.astype(float), 4, SCORE[name], attention == "one_wide_head")
        for q, k in qk_of_layer(model, name, given)[0]
    ]
    if name == "llava_next":  # tiles that are padding do not go through the encoder
        expected = [scores for row, count in enumerate((3, 3)) for scores in expected[row * 3 : row * 3 + count]]
    model.set_attn_implementation(implementation)
    patchattn.patch_model(model, "damro", top_k=2, score=SCORE[name], attention=attention)
    found: list[torch.Tensor] = []
    with patchattn.observe(model, lambda seen: found.extend(seen.values["outlier_score"])), torch.no_grad():
        model(**given)
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left.numpy(), right, rtol=1e-4, atol=1e-6)
        assert float(left.sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("one_wide_head", [False, True])
@pytest.mark.parametrize("score", ["cls", "received"])
def test_attention_received_by_many_tokens(score: Any, one_wide_head: bool) -> None:
    """More rows than are held at a time, and half precision, which counts as float32."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 4, 600, 8, generator=generator).bfloat16() for _ in "qk")
    found = attention_received(query, key, 8**-0.5, score=score, one_wide_head=one_wide_head)
    assert found.dtype == torch.float32
    for row, q, k in zip(found, query, key, strict=True):
        wide = [t.transpose(0, 1).flatten(1).double().numpy() for t in (q, k)]
        np.testing.assert_allclose(row, reference_scores(*wide, 4, score, one_wide_head), rtol=1e-4)


def test_pictures_packed_for_flash_attention_are_told_apart() -> None:
    """Flash attention gets all pictures as one row and their borders; the others get one picture a call."""
    model = patchattn.patch_model(vlms.make("qwen2_5_vl"), "damro", top_k=2, score="received")
    (variant,) = [module for module in model.modules() if isinstance(module, DAMRO)]
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 4, 28, 8, generator=generator) for _ in "qk")
    found: list[torch.Tensor] = []
    for borders in (None, torch.tensor([0, 12, 28])):
        variant.before_tower(model, (), {})
        kwargs = {} if borders is None else {"cu_seq_lens_q": borders}
        parts = [slice(0, 12), slice(12, 28)] if borders is None else [slice(None)]
        with patchattn.observe(model, lambda seen: found.extend(seen.values["outlier_score"])):
            for part in parts:
                given = ModuleCall(model, query[:, :, part], key[:, :, part], key, None, kwargs)
                call = attention_call(given, variant.site, "sdpa")
                variant.attend(call, lambda call: (call.query, None))
    assert [len(row) for row in found] == [12, 16, 12, 16]
    assert torch.equal(torch.cat(found[:2]), torch.cat(found[2:]))


def test_defaults_by_model_and_task() -> None:
    cases = {("llava", "pope"): (10, 2.0), ("llava", "chair"): (10, 0.5), ("llava_next", "pope"): (10, 2.0)}
    cases |= {("instructblip", "pope"): (4, 0.5), ("instructblip", "chair"): (4, 1.5)}
    for (name, preset), expected in cases.items():
        model = patchattn.patch_model(vlms.make(name), "damro", preset=preset)
        (variant,) = [module for module in model.modules() if isinstance(module, patchattn.Variant)]
        assert (variant.top_k, variant.alpha) == expected
    assert patchattn.patch_info(model)["patches"][0]["config"]["beta"] == 0.1


def test_layer_by_choice() -> None:
    sites = {}
    for layer in (None, 0, -1):
        for name in WITH_CLS:
            model = patchattn.patch_model(vlms.make(name), "damro", vision_layer=layer)
            (site,) = patchattn.patch_info(model)["patches"][0]["sites"]
            sites[name, layer] = int(site.split(".")[-2])
    assert sites == {(name, layer): index for name in WITH_CLS for layer, index in ((None, 1), (0, 0), (-1, 2))}


def test_several_images_in_a_row_and_none_in_between() -> None:
    """Two images, one right after the other: each is replaced by its own outliers."""
    given = vlms.inputs("llava", rows=2, dtype=torch.float64)
    image = torch.full((1, 16), vlms.IMAGE)
    ids = torch.cat([torch.tensor([[5]]), image, image, torch.tensor([[6, 7]])], dim=1)
    plain = vlms.make("llava", dtype=torch.float64)
    model = patchattn.patch_model(vlms.make("llava", dtype=torch.float64), "damro", top_k=2, alpha=1.0, beta=0.0)
    pixels = given["pixel_values"]
    with torch.no_grad():
        got = model(input_ids=ids, pixel_values=pixels).logits[0]
        full = plain(input_ids=ids, pixel_values=pixels).logits[0]
        outliers = [negative_image(plain, "llava", {"pixel_values": pixels[i : i + 1]}, 2, False) for i in (0, 1)]
        embed = plain.get_input_embeddings()
        short = torch.cat([embed(ids[0, :1]), *outliers, embed(ids[0, -2:])])[None]
        negative = plain(inputs_embeds=short).logits[0]
    torch.testing.assert_close(got[-2:], 2 * full[-2:] - negative[-2:])
    torch.testing.assert_close(got[:1], 2 * full[:1] - negative[:1])  # before the image both branches agree
    torch.testing.assert_close(got[1:33], full[1:33])  # image tokens have no counterpart


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_without_a_cache(name: str) -> None:
    model = patchattn.patch_model(vlms.make(name), "damro", top_k=2, score=SCORE[name])
    given = vlms.single(vlms.inputs(name), 1)
    expected = decode(model, given)
    tokens, steps = decode(model, given, use_cache=False)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(steps, expected[1], rtol=1e-4, atol=1e-4)


def test_a_tuple_and_chosen_logits() -> None:
    model, given = patchattn.patch_model(vlms.make("llava"), "damro", top_k=2), vlms.inputs("llava")
    with torch.no_grad():
        full = model(**given).logits
        torch.testing.assert_close(model(**given, return_dict=False)[0], full)
        torch.testing.assert_close(model(**given, logits_to_keep=2).logits, full[:, -2:])
        torch.testing.assert_close(model(**given, logits_to_keep=torch.tensor([0, 20])).logits, full[:, [0, 20]])


class TestErrors:
    @pytest.mark.parametrize("name", ["llava_siglip", "qwen2_5_vl"])
    def test_no_class_token(self, name: str) -> None:
        with pytest.raises(NotImplementedError, match=r"no class token .CLS.*score=\"received\""):
            patchattn.patch_model(vlms.make(name), "damro")

    def test_no_image(self) -> None:
        model = patchattn.patch_model(vlms.make("llava"), "damro", top_k=2)
        with pytest.raises(ValueError, match="no image in row 0"):
            model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=1)

    def test_no_language_head(self) -> None:
        model = vlms.make("llava").model
        with pytest.raises(NotImplementedError, match="LlavaModel has no language modelling head"):
            patchattn.patch_model(model, "damro")

    def test_more_outliers_than_patches(self) -> None:
        model = patchattn.patch_model(vlms.make("llava"), "damro", top_k=17)
        with pytest.raises(ValueError, match="top_k is 17, but an image has 16 tokens to choose from"):
            model(**vlms.inputs("llava"))

    def test_layers_that_are_not_there(self) -> None:
        with pytest.raises(ValueError, match=r"no attention in layer 3 of model\.vision_tower, which has 3 layers"):
            patchattn.patch_model(vlms.make("llava"), "damro", vision_layer=3)
        with pytest.raises(NotImplementedError, match="within windows only"):
            patchattn.patch_model(vlms.make("qwen2_5_vl"), "damro", score="received", vision_layer=0)
        model = patchattn.patch_model(vlms.make("llava"), "damro", top_k=2)
        with pytest.raises(NotImplementedError, match="model's configuration"):
            model(**vlms.inputs("llava"), vision_feature_layer=-1)

    def test_image_tokens_made_elsewhere(self) -> None:
        """Features computed before the patch, or of another image than the last, are not taken for those seen."""
        model, given = vlms.make("llava"), vlms.inputs("llava")
        embed = model.get_input_embeddings()
        patchattn.patch_model(model, "damro", top_k=2)
        with torch.no_grad():
            embeddings = embed(given["input_ids"])
            model(**given)
            with pytest.raises(ValueError, match="not made by the patched model's vision encoder"):
                model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
            with pytest.raises(NotImplementedError, match="inputs_embeds alone"):
                model(inputs_embeds=embeddings[:, :5])

    def test_a_prompt_in_chunks(self) -> None:
        model = patchattn.patch_model(vlms.make("llava"), "damro", top_k=2)
        given = {**vlms.inputs("llava", rows=1), "max_new_tokens": 1}
        with pytest.raises(ValueError, match=r"in one piece|into chunks"):  # ours, or that of an older transformers
            model.generate(**given, prefill_chunk_size=8)

    def test_an_encoder_decoder(self) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {
            "model_type": "t5",
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 1,
            "num_heads": 4,
        }
        config = tf.InstructBlipConfig(
            vision_config=sizes, qformer_config=sizes, text_config=text, image_token_index=vlms.IMAGE
        )
        with pytest.raises(NotImplementedError, match="decoder-only"):
            patchattn.patch_model(tf.InstructBlipForConditionalGeneration(config), "damro")

    @pytest.mark.parametrize(("setting", "value"), [("alpha", -1.0), ("beta", 1.5), ("top_k", 0), ("task", "vqa")])
    def test_settings_out_of_range(self, setting: str, value: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=f"damro: {setting}"):
            patchattn.patch_model(vlms.make("llava"), "damro", **{setting: value})
