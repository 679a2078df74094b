"""VAR against attention matrices written out from the equations, in float64."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import settings as how
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

import patchattn
from patchattn.call import AttentionCall, LayerContext
from patchattn.hooks import IMAGE_TOKENS, RESIDUAL, enclosing_layer
from patchattn.variants.var import VAR, VARConfig

from . import vlms

DIMS = [3, 17]
# Random weights have no massive activations: a threshold at which some tokens are sinks and some are not.
LOW = {
    "sink_dims": DIMS,
    "sink_threshold": 1.0,
    "max_sink_share": 0.8,
    "min_image_share": 0.1,
    "first_layer": 0,
    "except_last": False,
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"move_fraction": 1.0, "max_sink_share": 0.9, "min_image_share": 0.05},
    {"move_fraction": 0.25, "max_sink_share": 1.0, "min_image_share": 0.0, "first_layer": 1},
    {"except_last": True, "sink_threshold": 1.4, "max_sink_share": 0.5, "min_image_share": 0.2},
]
FAMILIES = ["llava", "llava_next", "qwen2_5_vl"]
DEFAULTS = {"move_fraction": 0.4, "max_sink_share": 0.5, "min_image_share": 0.2}


def redistribute(weights: np.ndarray, sink: np.ndarray, image: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """The equations on one head's matrix `(N, N)`, zero where not visible; sinks and image tokens `(N,)`."""
    s, out = {**DEFAULTS, **settings}, weights.copy()
    for i, row in enumerate(weights):
        seen = [t for t in range(len(row)) if row[t] > 0]
        of_image = sum(row[t] for t in seen if image[t])
        of_visual_sinks = sum(row[t] for t in seen if image[t] and sink[t])
        of_others = sum(row[t] for t in seen if image[t] and not sink[t])
        if image[i] or of_visual_sinks == 0 or of_others == 0:
            continue
        if of_image < s["min_image_share"] or of_visual_sinks / of_image > s["max_sink_share"]:
            continue
        budget = 0.0
        for t in seen:
            if sink[t]:
                budget += s["move_fraction"] * row[t]
                out[i, t] = (1 - s["move_fraction"]) * row[t]
        for t in seen:
            if image[t] and not sink[t]:
                out[i, t] = row[t] + budget * row[t] / of_others
    return out


def are_sinks(hidden: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """`(..., T)` of hidden states `(..., T, E)`."""
    size = np.sqrt((hidden**2).mean(-1))
    return np.abs(hidden[..., settings["sink_dims"]]).max(-1) > settings["sink_threshold"] * size


@contextmanager
def brute_force(model: nn.Module, image: torch.Tensor, settings: dict[str, Any]) -> Iterator[nn.Module]:
    """The unpatched model, whose language model computes N x N matrices and redistributes them.

    Args:
        model: unpatched.
        image: `(B, N)` bool.
        settings: as VAR's.
    """
    hidden: dict[Any, np.ndarray] = {}
    changes = [0]

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        mask = attention_mask
        batch, heads, rows, dim = query.shape
        repeat = heads // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        visible = torch.ones(1, 1, rows, rows, dtype=torch.bool) if mask is None else mask > -1e30
        visible = visible.expand(batch, heads, -1, -1)
        logits = (query @ key.mT * (kwargs.get("scaling") or dim**-0.5)).double().masked_fill(~visible, -1e300)
        weights = (logits.softmax(-1) * visible).detach().numpy().copy()
        if module in hidden:
            sinks = are_sinks(hidden[module], settings)
            for b in range(batch):
                for h in range(heads):
                    changed = redistribute(weights[b, h], sinks[b], image[b].numpy(), settings)
                    changes[0] += int((changed != weights[b, h]).any())
                    weights[b, h] = changed
        weights = torch.from_numpy(weights)
        return (weights.to(value) @ value).transpose(1, 2), weights

    AttentionInterface.register("brute_force", attend)
    AttentionMaskInterface.register("brute_force", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    twin: Any = copy.deepcopy(model)
    twin.set_attn_implementation("brute_force")
    layers = twin.get_decoder().layers
    first, last = settings["first_layer"], len(layers) - settings["except_last"]
    for layer in layers[first:last]:
        layer.register_forward_pre_hook(
            lambda layer, args: hidden.update({layer.self_attn: args[0].detach().double().numpy()})
        )
    try:
        yield twin
        assert changes[0], "nothing was redistributed: the test shows nothing"
    finally:
        AttentionInterface._global_mapping.pop("brute_force")
        AttentionMaskInterface._global_mapping.pop("brute_force")


def logits_of(model: nn.Module, given: dict[str, Any], **extra: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**given, **extra).logits


def expected(model: nn.Module, given: dict[str, Any], settings: dict[str, Any]) -> torch.Tensor:
    with brute_force(model, given["input_ids"] == vlms.IMAGE, settings) as twin:
        return logits_of(twin, given, use_cache=False)


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    """Rotary angles of Qwen2.5-VL are of float32 positions, which padding shifts; `generate` adds in float32."""
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def exact(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return vlms.make(name, dtype=torch.float64), vlms.inputs(name, dtype=torch.float64)


def extended(given: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs with `(B, n)` more tokens of text."""
    longer = {**given, "input_ids": torch.cat([given["input_ids"], tokens], dim=1)}
    longer["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(tokens)], dim=1)
    if "mm_token_type_ids" in given:
        longer["mm_token_type_ids"] = torch.cat(
            [given["mm_token_type_ids"], torch.zeros_like(tokens, dtype=torch.int)], dim=1
        )
    return longer


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_forward_of_a_padded_batch(name: str, settings: dict[str, Any]) -> None:
    model, given = exact(name)
    wanted, plain = expected(model, given, {**LOW, **settings}), logits_of(model, given)
    patchattn.patch_model(model, "var", **{**LOW, **settings})
    real = given["attention_mask"].bool()
    got = logits_of(model, given)
    torch.testing.assert_close(got[real], wanted[real], rtol=1e-9, atol=1e-9)
    assert float((plain - wanted)[real].abs().max()) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_padded_batch_are_those_of_each_alone(name: str) -> None:
    model, given = exact(name)
    patchattn.patch_model(model, "var", **LOW)
    together = logits_of(model, given)
    for row in range(2):
        alone = vlms.single(given, row)
        close(together[row, given["attention_mask"][row].bool()], logits_of(model, alone)[0])


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_in_a_padded_batch(name: str, implementation: str) -> None:
    model, given = exact(name)
    base = copy.deepcopy(model)
    patchattn.patch_model(model, "var", **LOW)
    kind = None if implementation == "dynamic" else implementation
    found = model.generate(
        **given,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        cache_implementation=kind,
        disable_compile=True,
    )
    new = found.sequences[:, -4:]
    wanted = expected(base, extended(given, new), LOW)
    close(torch.stack(found.logits, dim=1).double(), wanted[:, -5:-1])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_beams(name: str) -> None:
    model, given = exact(name)
    base = copy.deepcopy(model)
    patchattn.patch_model(model, "var", **LOW)
    found = model.generate(
        **given,
        max_new_tokens=3,
        do_sample=False,
        num_beams=3,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    new = found.sequences[:, -3:]
    log_p = expected(base, extended(given, new), LOW)[:, -4:-1].log_softmax(-1)
    close(found.sequences_scores.double(), log_p.gather(-1, new[..., None]).sum((1, 2)))


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("chunks", [[2, 17, 3], [18, 1, 1, 1, 1]], ids=str)
def test_a_prompt_in_chunks(chunks: list[int], kind: str) -> None:
    """Text before the image, the image, and text token by token: marks of the image stay with the cache."""
    model, given = exact("llava")
    given = vlms.single(given, 0)
    wanted = expected(model, given, LOW)
    patchattn.patch_model(model, "var", **LOW)
    if kind == "none":
        close(logits_of(model, given, use_cache=False), wanted)
        return
    config = model.config.get_text_config()
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=30)
    parts = []
    for part in given["input_ids"].split(chunks, dim=1):
        pixels = {"pixel_values": given["pixel_values"]} if bool((part == vlms.IMAGE).any()) else {}
        parts.append(logits_of(model, {"input_ids": part, **pixels}, past_key_values=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, rtol=1e-9, atol=1e-9)


def test_several_images_and_text_between_them() -> None:
    model, given = exact("llava")
    image = torch.full((1, 16), vlms.IMAGE)
    text = torch.tensor([[5, 9]]), torch.tensor([[7, 8, 9]]), torch.tensor([[6, 7]])
    several = {
        "input_ids": torch.cat([text[0], image, text[1], image, text[2]], dim=1),
        "pixel_values": given["pixel_values"],
    }
    wanted = expected(model, several, LOW)
    patchattn.patch_model(model, "var", **LOW)
    torch.testing.assert_close(logits_of(model, several), wanted, rtol=1e-9, atol=1e-9)


def test_a_cropped_cache_goes_on() -> None:
    """What is known of a key does not depend on later ones, so that tokens can be taken back."""
    model, given = exact("llava")
    given = vlms.single(given, 0)
    wanted = expected(model, given, LOW)
    patchattn.patch_model(model, "var", **LOW)
    cache = DynamicCache(config=model.config.get_text_config())
    other = extended({**given, "input_ids": given["input_ids"][:, :-2]}, torch.tensor([[30, 31, 32]]))
    logits_of(model, {"input_ids": other["input_ids"], "pixel_values": given["pixel_values"]}, past_key_values=cache)
    cache.crop(-3)
    got = logits_of(model, {"input_ids": given["input_ids"][:, -2:]}, past_key_values=cache)
    torch.testing.assert_close(got, wanted[:, -2:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_weights_of_the_eager_implementation(name: str) -> None:
    model, given = vlms.make(name), vlms.inputs(name)  # in float64 eager's padded rows are NaN
    model.set_attn_implementation("eager")
    with brute_force(model, given["input_ids"] == vlms.IMAGE, LOW) as twin, torch.no_grad():
        wanted = twin(**given, output_attentions=True).attentions
    patchattn.patch_model(model, "var", **LOW)
    with torch.no_grad():
        attentions = model(**given, output_attentions=True).attentions
    real = given["attention_mask"].bool()[:, None].expand(-1, 4, -1)
    for got, exactly in zip(attentions, wanted, strict=True):
        close(got[real].double(), exactly[real])
        torch.testing.assert_close(got[real].sum(-1), torch.ones(int(real.sum())))


def test_what_is_reported() -> None:
    model, given = exact("llava")
    image = given["input_ids"] == vlms.IMAGE
    inputs: list[torch.Tensor] = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    patchattn.patch_model(model, "var", **LOW)
    seen: list[dict[str, torch.Tensor]] = []
    with patchattn.observe(model, lambda observation: seen.append(observation.values)):
        logits_of(model, given)
    assert len(seen) == 2
    for values, hidden in zip(seen, inputs, strict=True):
        assert torch.equal(values["image_keys"], image)
        np.testing.assert_array_equal(values["sink_keys"], are_sinks(hidden.numpy(), LOW))
        assert not bool(values["image_centric"][image].any())
        assert bool(values["image_centric"].any())


# --- one call ---------------------------------------------------------------------------------------------------------


def one_call(
    rows: int, image: slice, seed: int, settings: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """VAR on random tensors: its output `(2, N, D)`, the equations' weights `(2, N, N)`, and the values."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 2, rows, 8, generator=generator).to(dtype) for _ in "qkv")
    hidden = torch.randn(1, rows, 32, generator=generator).to(dtype)
    marks = torch.zeros(1, rows, dtype=torch.bool)
    marks[:, image] = True
    model = vlms.make("llava")
    (site, *_) = [s for s in patchattn.find_sites(model) if "language_model" in s.name]
    module = model.get_submodule(site.name)
    variant = VAR(VARConfig(**{**LOW, **settings}), site)
    context = LayerContext(module=module, layer_input=hidden, memory=None, attention_mask=None, arguments={})
    told = {IMAGE_TOKENS: marks, RESIDUAL: hidden}
    call = AttentionCall(query, key, value, None, told, module, site, "sdpa", context)

    def inner(call: AttentionCall) -> Any:
        out = nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, is_causal=True)
        return out.transpose(1, 2), None

    got = variant.attend(call, inner)[0][0].transpose(0, 1)
    visible = torch.ones(rows, rows, dtype=torch.bool).tril()
    logits = (query.double() @ key.double().mT * 8**-0.5).masked_fill(~visible, -torch.inf)
    sinks = are_sinks(hidden[0].double().numpy(), {**LOW, **settings})
    weights = logits[0].softmax(-1).numpy()
    changed = np.stack([redistribute(w, sinks, marks[0].numpy(), settings) for w in weights])
    return got, changed, value[0]


@how(max_examples=30, deadline=None)
@for_all(
    rows=st.integers(2, 20),
    start=st.integers(0, 8),
    length=st.integers(0, 12),
    seed=st.integers(0, 1000),
    move=st.floats(0.01, 1.0),
    most=st.floats(0.0, 1.0),
    least=st.floats(0.0, 1.0),
    threshold=st.floats(0.0, 3.0),
)
def test_any_settings_on_any_tensors(
    rows: int, start: int, length: int, seed: int, move: float, most: float, least: float, threshold: float
) -> None:
    settings = {
        "move_fraction": move,
        "max_sink_share": most,
        "min_image_share": least,
        "sink_threshold": threshold,
    }
    got, changed, value = one_call(rows, slice(start, start + length), seed, settings)
    np.testing.assert_allclose(changed.sum(-1), 1.0, rtol=1e-12)
    assert (changed >= 0).all()
    np.testing.assert_allclose(got, changed @ value.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_twice_the_weights_rounded(dtype: torch.dtype) -> None:
    """The released form rounds the new weights to the model's dtype."""
    settings = {"max_sink_share": 0.9, "min_image_share": 0.0, "sink_threshold": 1.5}
    got, changed, value = one_call(64, slice(2, 40), 0, settings, dtype)
    assert got.dtype == dtype
    weights = torch.from_numpy(changed)
    reference = weights @ value.double()
    rounded = (weights.to(dtype) @ value).double()
    assert float((got.double() - reference).abs().max()) <= 2 * float((rounded - reference).abs().max())


def test_bfloat16_model_stays_near_the_exact_one() -> None:
    model, given = exact("llava")
    patchattn.patch_model(model, "var", **LOW)
    wanted = logits_of(model, given)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    got = logits_of(model.bfloat16(), half)
    real = given["attention_mask"].bool()
    assert got.dtype == torch.bfloat16
    error, spread = (got.double() - wanted)[real], wanted[real]
    assert float(error.pow(2).mean().sqrt()) < 0.15 * float(spread.std())


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
    logits_of(model, start, past_key_values=cache)
    torch._dynamo.reset()
    model.model.language_model.compile(fullgraph=True, backend="aot_eager")
    close(logits_of(model, given, use_cache=False), wanted)
    close(logits_of(model, {"input_ids": given["input_ids"][:, -1:]}, past_key_values=cache), wanted[:, -1:])
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
            ("sink_dims", [-1], "VARConfig.sink_dims"),
            ("sink_dims", 3, "VARConfig.sink_dims"),
            ("sink_dims", [1.5], "VARConfig.sink_dims"),
            ("move_fraction", 1.1, "VARConfig.move_fraction"),
            ("max_sink_share", -0.1, "VARConfig.max_sink_share"),
            ("min_image_share", "0.2", "VARConfig.min_image_share"),
            ("first_layer", -1, "VARConfig.first_layer"),
            ("except_last", 1, "VARConfig.except_last"),
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
        for keyword, missing in ((IMAGE_TOKENS, "which of its tokens are image tokens"), (RESIDUAL, "what entered")):

            def without(module: Any, args: Any, kwargs: Any, keyword: str = keyword) -> Any:
                return args, {name: value for name, value in kwargs.items() if name != keyword}

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
        past = model(**given, use_cache=True).past_key_values
        patchattn.patch_model(model, "var", **LOW)
        with pytest.raises(ValueError, match="the cache was filled without it"):
            model(input_ids=torch.tensor([[5]]), past_key_values=past)
