"""VAR: what goes with images and what without, its sink dimensions, and what it refuses."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import patchattn
from patchattn.core.hooks import enclosing_layer
from patchattn.core.kv_caches import cache_argument, find_cache
from patchattn.core.run import RESIDUAL, RUN
from patchattn.vision.marks import IMAGE_TOKENS

from . import vlms
from .var_reference import (
    LOW,
    brute_force,
    close,
    exact,
    expected,
    logits_of,
)

# --- images, and what goes without --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_text_alone_is_left_as_it_is(name: str) -> None:
    model = vlms.make(name)
    tokens = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    before = logits_of(model, {"input_ids": tokens})
    patchattn.patch_model(model, "var", **LOW)
    assert torch.equal(logits_of(model, {"input_ids": tokens}), before)


def test_embeddings_alone_are_refused() -> None:
    model = vlms.make("llava")
    embeddings = torch.randn(1, 5, 32)
    patchattn.patch_model(model, "var", **LOW)
    logits_of(model, {"input_ids": torch.tensor([[3, 4, 5, 6, 7]])})  # whose ids are not those of the next call
    with pytest.raises(NotImplementedError, match=r"VAR needs input_ids .* got inputs_embeds alone"):
        model(inputs_embeds=embeddings)


def test_the_parts_of_a_model_called_by_themselves() -> None:
    """The model without a head, patched; and the language model of a patched one."""
    model, given = exact("llava")
    whole = patchattn.patch_model(copy.deepcopy(model), "var", **LOW)
    with torch.no_grad():
        wanted = whole(**given, output_hidden_states=True).hidden_states[-1]
        headless = patchattn.patch_model(model.model, "var", **LOW)
        assert torch.equal(headless(**given).last_hidden_state, wanted)
        ids = torch.tensor([[3, 4, 5]])
        text = whole(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        for how_called in ((ids,), ()):
            extra = {} if how_called else {"input_ids": ids}
            assert torch.equal(whole.model.language_model(*how_called, **extra).last_hidden_state, text)


def test_video_tokens_count_as_image_tokens() -> None:
    model, given = vlms.make("qwen2_5_vl"), vlms.inputs("qwen2_5_vl", rows=1)
    video = model.config.video_token_id = 60
    moving = {
        "input_ids": given["input_ids"].masked_fill(given["input_ids"] == vlms.IMAGE, video),
        "pixel_values_videos": given["pixel_values"],
        "video_grid_thw": given["image_grid_thw"],
        "mm_token_type_ids": given["mm_token_type_ids"] * 2,
        "second_per_grid_ts": torch.ones(1),
    }
    patchattn.patch_model(model, "var", **LOW)
    seen: list[torch.Tensor] = []
    with patchattn.observe(model, lambda observation: seen.append(observation.values["image_keys"])):
        logits_of(model, moving)
    assert torch.equal(seen[0], moving["input_ids"] == video)


def test_gradients_with_activation_checkpointing() -> None:
    """Layers run again after other forwards: what belongs to a call travels with it."""
    gradients = []
    for checkpointing in (False, True):
        model, given = exact("llava")
        patchattn.patch_model(model, "var", **LOW).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**given, use_cache=False).logits.pow(2).mean()
        logits_of(model, {"input_ids": given["input_ids"][:, :2]}, use_cache=False)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


def test_compiled() -> None:
    """The language model without a graph break, from the image on and in a step on a static cache."""
    model, given = vlms.make("llava"), vlms.single(vlms.inputs("llava"), 0)
    patchattn.patch_model(model, "var", **LOW)
    wanted = logits_of(model, given, use_cache=False)
    cache = StaticCache(model.config.get_text_config(), max_cache_len=30)
    start = {"input_ids": given["input_ids"][:, :-1], "pixel_values": given["pixel_values"]}
    logits_of(model, start, **cache_argument(model, cache))
    torch._dynamo.reset()
    model.model.language_model.compile(fullgraph=True, backend="eager")
    close(logits_of(model, given, use_cache=False), wanted)
    close(logits_of(model, {"input_ids": given["input_ids"][:, -1:]}, **cache_argument(model, cache)), wanted[:, -1:])
    torch._dynamo.reset()


@pytest.mark.parametrize("together", [["var", "damro"], ["damro", "var"]])
def test_with_damro_both_branches_are_redistributed(together: list[str]) -> None:
    """Contrast of two explicit forwards of the equations: all of the image, and its outliers alone."""
    model, given = exact("llava")
    given = vlms.single(given, 1)
    ids = given["input_ids"]
    (spots,) = (ids[0] == vlms.IMAGE).nonzero(as_tuple=True)
    # The outliers are DAMRO's business and tested there; taken from its own report.
    twin = patchattn.patch_model(copy.deepcopy(model), "damro", top_k=12)
    scores: list[torch.Tensor] = []
    with patchattn.observe(twin, lambda observation: scores.append(observation.values["outlier_score"])):
        features = twin.model.get_image_features(given["pixel_values"])
    features = getattr(features, "pooler_output", features)
    best = scores[0][0, 1:].topk(12).indices
    with torch.no_grad():
        text = model.get_input_embeddings()(ids[0])
        image = (features[0] if isinstance(features, list | tuple) else features).reshape(16, -1)[best]
        short = torch.cat([text[: spots[0]], image, text[spots[-1] + 1 :]])[None]
        marks = torch.zeros(1, short.shape[1], dtype=torch.bool)
        marks[0, 2:14] = True
        with brute_force(model, marks, LOW) as other:
            negative = other(inputs_embeds=short).logits[0]
    full = expected(model, given, LOW)[0]
    patchattn.patch_model(model, together, {"var": LOW, "damro": {"top_k": 12, "alpha": 1.0, "beta": 0.0}})
    got = logits_of(model, given)[0]
    after = len(ids[0]) - int(spots[-1]) - 1
    torch.testing.assert_close(got[-after:], (2 * full[-after:] - negative[-after:]), rtol=1e-6, atol=1e-6)


# --- sink dimensions --------------------------------------------------------------------------------------------------


def planted(dims: dict[int, float], layer: int = 1) -> nn.Module:
    """A LLaVA, 4 layers of width 64, in which what enters a layer has massive activations on the first token."""
    import transformers as tf

    text = {**vlms._TEXT, "hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16}
    config = tf.LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=tf.CLIPVisionConfig(**vlms._VISION),
        image_token_id=vlms.IMAGE,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).eval()
    language_model: Any = model.model.language_model
    before = language_model.layers[layer - 1]
    with torch.no_grad():  # its MLP gives the same large output whatever its input, but for the sign
        embedded = language_model(inputs_embeds=model.get_input_embeddings()(torch.tensor([[1]])))
        assert embedded.last_hidden_state.isfinite().all()
        for dim, value in dims.items():
            before.mlp.down_proj.weight[dim] = value * torch.ones(before.mlp.down_proj.weight.shape[1])
    return model


def ratios_of(model: nn.Module) -> np.ndarray:
    """`(layers, E)` from hooks: size of every activation that enters a layer, over the root mean square; of BOS."""
    entered: list[np.ndarray] = []
    layers: Any = model.get_decoder().layers  # type: ignore[operator]
    handles = [
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0][0, 0].numpy())) for layer in layers
    ]
    logits_of(model, {"input_ids": torch.tensor([[1]])})
    for handle in handles:
        handle.remove()
    return np.stack([np.abs(x) / np.sqrt((x.astype(np.float64) ** 2).mean()) for x in entered])


def test_sink_dims_are_found_and_saved(tmp_path: Any) -> None:
    model = planted({5: 1e4, 40: 1e4}, layer=2).train()
    ratios = ratios_of(model)
    assert set(np.flatnonzero(ratios[2] > 4.0)) == {5, 40}
    with pytest.raises(ValueError, match="found no massive activation"):
        patchattn.patch_model(model, "var", first_layer=0, layers=[0, 1], sink_threshold=4.5)
    patchattn.patch_model(model, "var", sink_threshold=4.0)
    assert model.training
    (patch,) = patchattn.patch_info(model)["patches"]
    assert patch["config"]["sink_dims"] == [5, 40]
    assert patch["sites"] == ["model.language_model.layers.2.self_attn"]  # neither the first two nor the last
    patchattn.save_patch(model, tmp_path)
    fresh = patchattn.load_patch(planted({}), tmp_path)
    assert patchattn.patch_info(fresh)["patches"][0]["config"]["sink_dims"] == [5, 40]


def test_the_largest_ratio_is_named_where_none_is_massive() -> None:
    model = vlms.make("llava")
    ratios = ratios_of(model)[:1]
    wanted = rf"largest is {ratios.max():.1f} times .* in dimension {ratios.argmax()}, and sink_threshold is 20"
    with pytest.raises(ValueError, match=wanted):
        patchattn.patch_model(model, "var", first_layer=0)
    assert not patchattn.patch_info(model)["patches"]


def test_a_preset_has_the_released_dimensions() -> None:
    assert patchattn.variant_info("var").configure({"preset": "llava_1_5_7b"}).sink_dims == (1415, 2533)


class TestErrors:
    def test_a_model_without_images(self) -> None:
        with pytest.raises(NotImplementedError, match="'var' does not support without_images, which LlamaForCausalLM"):
            patchattn.patch_model(LlamaForCausalLM(LlamaConfig(**vlms._TEXT)), "var")

    def test_a_query_former(self) -> None:
        with pytest.raises(NotImplementedError, match="come from a query former"):
            patchattn.patch_model(vlms.make("instructblip"), "var", **LOW)

    def test_no_chosen_module_in_the_language_model(self) -> None:
        with pytest.raises(ValueError, match=r"VAR acts in model\.language_model; none of the chosen"):
            patchattn.patch_model(vlms.make("llava"), "var", modules="vision_tower", **LOW)

    def test_all_layers_left_alone(self) -> None:
        with pytest.raises(ValueError, match=r"leaves all of the chosen layers alone with first_layer=2"):
            patchattn.patch_model(vlms.make("llava"), "var", sink_dims=[1])

    def test_no_weights_yet(self) -> None:
        with torch.device("meta"):
            model = vlms._BUILDERS["llava"]()
        with pytest.raises(ValueError, match="weights, which this model does not have yet"):
            patchattn.patch_model(model, "var", first_layer=0)

    @pytest.mark.parametrize(
        ("setting", "value", "error"),
        [
            ("sink_dims", [], "is empty"),
            ("sink_dims", [32], "must lie between 0 and 31"),
            ("sink_dims", [-1], "sink_dims"),
            ("sink_dims", 3, "sink_dims"),
            ("sink_dims", [1.5], "sink_dims"),
            ("move_fraction", 1.1, "move_fraction"),
            ("max_sink_share", -0.1, "max_sink_share"),
            ("min_image_share", "0.2", "min_image_share"),
            ("first_layer", -1, "first_layer"),
            ("except_last", 1, "except_last"),
        ],
    )
    def test_settings(self, setting: str, value: Any, error: str) -> None:
        with pytest.raises((ValueError, TypeError), match=error):
            patchattn.patch_model(vlms.make("llava"), "var", **{**LOW, setting: value})

    def test_dropout(self) -> None:
        model = patchattn.patch_model(vlms.make("llava"), "var", **LOW)
        for layer in model.model.language_model.layers:
            layer.self_attn.attention_dropout = 0.1
        with pytest.raises(NotImplementedError, match="'var' does not support dropout"):
            model.train()(**vlms.inputs("llava"))

    def test_a_layer_that_hands_nothing_on(self) -> None:
        model = patchattn.patch_model(vlms.make("llava"), "var", **LOW)
        attention = model.model.language_model.layers[1].self_attn
        for fact, missing in ((IMAGE_TOKENS, "which of its tokens are image tokens"), (RESIDUAL, "what entered")):

            def without(module: Any, args: Any, kwargs: Any, fact: str = fact) -> Any:
                facts = {name: told for name, told in kwargs[RUN].facts.items() if name != fact}
                return args, {**kwargs, RUN: replace(kwargs[RUN], facts=facts)}

            handle = attention.register_forward_pre_hook(without, with_kwargs=True)
            with pytest.raises(NotImplementedError, match=rf"layers\.1\.self_attn\) was not told {missing}"):
                model(**vlms.inputs("llava"))
            handle.remove()

    def test_an_attention_module_in_no_layer(self) -> None:
        assert enclosing_layer("model.layers.3.blocks.10.self_attn") == "model.layers.3.blocks.10"
        assert enclosing_layer("0.attention") == "0"
        with pytest.raises(NotImplementedError, match=r"model\.attention is in no numbered layer"):
            enclosing_layer("model.attention")

    def test_a_cache_filled_without_it(self) -> None:
        model = vlms.make("llava")
        given = vlms.single(vlms.inputs("llava"), 0)
        past = find_cache(model(**given, use_cache=True).values())
        patchattn.patch_model(model, "var", **LOW)
        with pytest.raises(ValueError, match="the cache was filled without it"):
            model(input_ids=torch.tensor([[5]]), **cache_argument(model, past))
