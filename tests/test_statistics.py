"""Statistics of temperatures against counting in numpy."""

import math

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.inspection.probabilities import attention_probabilities
from patchattn.inspection.temperatures import temperature_statistics
from patchattn.variants.temperature.ssa import position_coefficients

from .behaviour import randomise
from .families import FAMILIES, outputs
from .reference import DIM, HEADS, KV_HEADS, rotate, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [4, 4, 8, 30, 2, 6, 17]])
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])  # the second row is padded on its left
PADDED = {"input_ids": TOKENS * MASK, "attention_mask": MASK, "position_ids": (MASK.cumsum(-1) - 1).clamp(min=0)}
ROWS = (TOKENS[:1], TOKENS[1:, 2:])  # the same without padding


def layer_input(model: torch.nn.Module, tokens: torch.Tensor) -> np.ndarray:
    """`(T, E)` what the only attention module reads: the normalised embeddings."""
    with torch.no_grad():
        return model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))[0].numpy()


def brute_force(model: torch.nn.Module, factors) -> tuple[dict[str, list[float]], float, float]:
    """Temperatures of all real tokens, and spikiness without and with those of queries and keys, row by row.

    `factors(stream, x, n)` is one number per query head, or one for all.
    """
    module = model.model.layers[0].self_attn
    weights = {name: getattr(module, f"{name}_proj").weight.detach().numpy() for name in "qk"}
    values: dict[str, list[float]] = {"query": [], "key": [], "value": []}
    spikiness: list[list[float]] = [[], []]
    for tokens in ROWS:
        inputs = layer_input(model, tokens)
        for row, x in enumerate(inputs):
            for stream, seen in values.items():
                seen.extend(np.atleast_1d(factors(stream, x, row + 1)))
            for head in range(HEADS):
                query = rotate((weights["q"] @ x).reshape(HEADS, DIM)[head], row)
                for place, scaled in enumerate((False, True)):
                    logits = []
                    for column, y in enumerate(inputs[: row + 1]):
                        group = head // (HEADS // KV_HEADS)
                        key = rotate((weights["k"] @ y).reshape(KV_HEADS, DIM)[group], column)
                        both = np.broadcast_to(factors("query", x, row + 1), HEADS)[head]
                        both = both * np.broadcast_to(factors("key", y, column + 1), HEADS)[head]
                        logits.append(query @ key / np.sqrt(DIM) * (both if scaled else 1.0))
                    s = np.exp(np.array(logits) - max(logits))
                    s /= s.sum()
                    spikiness[place].append(np.abs(s).sum() / (len(s) * (s**2).sum()))
    return values, float(np.mean(spikiness[0])), float(np.mean(spikiness[1]))


def check(layer, values: dict[str, list[float]], before: float, after: float) -> None:
    for stream, spread in layer.streams.items():
        seen = np.array(values[stream])
        assert spread.count == len(seen)
        want = (seen.mean(), seen.std(), seen.min(), seen.max())
        np.testing.assert_allclose(
            (spread.mean, spread.std, spread.minimum, spread.maximum), want, rtol=1e-6, atol=1e-9
        )
    # transformers' rotary angles are float32
    np.testing.assert_allclose((layer.spikiness_before, layer.spikiness_after), (before, after), rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("key", [False, True], ids=["queries", "queries and keys"])
def test_ssa_with_padding(key: bool, implementation: str) -> None:
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    patchattn.patch_model(model, "ssa", key=key)
    randomise(model)
    variant = model.model.layers[0].self_attn.patchattn.ssa
    weights = {name: p.detach().numpy() for name, p in variant.named_parameters()}

    def factors(stream: str, x: np.ndarray, n: int) -> float:
        if stream == "key" and not key:
            return 1.0
        alpha = weights[f"{stream}_alpha"][0]
        return 1 + np.tanh(weights[f"{stream}_token"] @ x) + np.log(n) / (1 + np.exp(-alpha))

    with temperature_statistics(model) as statistics:
        outputs(model, **PADDED)
    (layer,) = statistics.layers()
    assert (layer.site.name, layer.variant) == ("model.layers.0.self_attn", "ssa")
    assert list(layer.streams) == (["query", "key", "value"] if key else ["query", "value"])
    check(layer, *brute_force(model, factors))


def test_ssmax_has_a_temperature_per_head() -> None:
    model = patchattn.patch_model(tiny_llama(), "ssmax")
    randomise(model)
    variant = model.model.layers[0].self_attn.patchattn.ssmax
    scale, bias = (p.detach().numpy() for p in (variant.scale, variant.bias))
    with temperature_statistics(model) as statistics:
        outputs(model, **PADDED)
    (layer,) = statistics.layers()
    assert list(layer.streams) == ["query"]
    check(layer, *brute_force(model, lambda stream, x, n: scale * np.log(n) + bias if stream == "query" else 1.0))


def test_logn() -> None:
    model = patchattn.patch_model(tiny_llama(), "logn", train_length=3)
    with temperature_statistics(model) as statistics:
        outputs(model, **PADDED)
    (layer,) = statistics.layers()
    factor = [math.log(max(n, 3), 3) for n in range(8)]
    check(layer, *brute_force(model, lambda stream, x, n: factor[n] if stream == "query" else 1.0))


def test_several_forwards_and_a_cache_add_up_to_one() -> None:
    model = patchattn.patch_model(tiny_llama(), "ssa")
    randomise(model)
    with temperature_statistics(model) as whole:
        outputs(model, **PADDED)
    with temperature_statistics(model) as parts:
        for row in ROWS:
            cache = DynamicCache(config=model.config)
            for chunk in row.split(2, dim=1):
                outputs(model, input_ids=chunk, **cache_argument(model, cache))
    (one,), (other,) = whole.layers(), parts.layers()
    for stream, spread in one.streams.items():
        np.testing.assert_allclose(list(vars(spread).values()), list(vars(other.streams[stream]).values()))
    np.testing.assert_allclose(other.spikiness_before, one.spikiness_before)
    np.testing.assert_allclose(other.spikiness_after, one.spikiness_after)


def test_a_padded_row_decodes_with_a_cache() -> None:
    model = patchattn.patch_model(tiny_llama(), "ssa", key=True)
    randomise(model)
    cache = DynamicCache(config=model.config)
    with temperature_statistics(model) as statistics:
        for start, end in ((0, 4), (4, 7)):
            given = {name: value[:, start:end] for name, value in PADDED.items()} | {"attention_mask": MASK[:, :end]}
            outputs(model, **given, **cache_argument(model, cache))
    with temperature_statistics(model) as whole:
        outputs(model, **PADDED)
    (layer,), (want,) = statistics.layers(), whole.layers()
    for stream, spread in want.streams.items():
        np.testing.assert_allclose(list(vars(layer.streams[stream]).values()), list(vars(spread).values()))
    with temperature_statistics(model) as first:  # of the keys in the cache the temperatures are not at hand
        outputs(model, **{name: value[:, :4] for name, value in PADDED.items()})
    assert layer.spikiness_before == pytest.approx(first.layers()[0].spikiness_before)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "t5", "mistral", "bert"])
def test_probabilities_are_those_of_the_model(family: str) -> None:
    """Soft caps, sinks, position bias, windows, encoders: against the weights that the model itself returns."""
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
    for part in model.modules():  # transformers 5.17 sets it on T5, but not on its two halves
        if hasattr(part, "config"):
            part.config._attn_implementation_internal = "eager"
    patchattn.patch_model(model, "ssmax", initial_scale=0.2)
    seen: list[torch.Tensor] = []

    def keep(observation: patchattn.Observation) -> None:
        call = observation.source
        heads = [attention_probabilities(call, head) for head in range(call.query.shape[1])]
        seen.append(torch.stack(heads, dim=1))

    with patchattn.observe(model, keep), torch.no_grad():
        result = model(**inputs, output_attentions=True)
    if family == "t5":
        pairs = zip(result.decoder_attentions, result.cross_attentions, strict=True)
        want = [*result.encoder_attentions, *(attention for pair in pairs for attention in pair)]
    else:
        want = result.attentions
    assert len(seen) == len(want)
    for got, expected in zip(seen, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_attention_without_preferences_is_not_spiky() -> None:
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.weight.data.zero_()
    patchattn.patch_model(model, "ssa")
    with temperature_statistics(model) as statistics:
        outputs(model, **PADDED)
    (layer,) = statistics.layers()
    assert layer.spikiness_before == pytest.approx(1.0)
    assert layer.spikiness_after == pytest.approx(1.0)


def test_padding_of_the_other_sequence_is_left_out() -> None:
    model, inputs = FAMILIES["t5"].make(), FAMILIES["t5"].inputs()
    patchattn.patch_model(model, "ssa", modules="EncDecAttention")
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 6:] = 0
    with temperature_statistics(model) as statistics:
        outputs(model, **inputs, attention_mask=mask)
    for layer in statistics.layers():
        assert layer.streams["value"].count == int(mask.sum())
        assert layer.streams["query"].count == inputs["decoder_input_ids"].numel()


def test_two_variants_on_a_layer_are_kept_apart() -> None:
    model = patchattn.patch_model(tiny_llama(), ["ssa", "ssmax"])
    randomise(model)
    with temperature_statistics(model) as statistics:
        outputs(model, **PADDED)
        ssa, ssmax = statistics.layers()
        assert (ssa.variant, ssmax.variant) == ("ssa", "ssmax")
        assert ssmax.spikiness_before == pytest.approx(ssa.spikiness_after, rel=1e-6)
        statistics.reset()
        with pytest.raises(ValueError, match="No temperature was reported"):
            statistics.layers()


def test_without_a_query_temperature_there_is_no_spikiness() -> None:
    model = patchattn.patch_model(tiny_llama(), "ssa", query=False)
    with temperature_statistics(model) as statistics:
        outputs(model, **PADDED)
    (layer,) = statistics.layers()
    assert layer.spikiness_before is layer.spikiness_after is None


def test_position_coefficients_are_read_off_the_parameters() -> None:
    model = patchattn.patch_model(tiny_llama(num_hidden_layers=2), "ssa", initial_alpha=0.0)
    model.model.layers[1].self_attn.patchattn.ssa.value_alpha.data.fill_(math.log(3.0))
    want = {"model.layers.0.self_attn": {"query": 0.5, "value": 0.5}}
    want["model.layers.1.self_attn"] = {"query": 0.5, "value": pytest.approx(0.75)}
    assert position_coefficients(model) == want


def test_what_has_no_temperatures_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="not patched"), temperature_statistics(model):
        pass
    patchattn.patch_model(model, "moh")
    with pytest.raises(ValueError, match=r"carries SSA with position_aware=True"):
        position_coefficients(model)
    with temperature_statistics(model) as statistics:
        outputs(model, **PADDED)
    with pytest.raises(ValueError, match="No temperature was reported"):
        statistics.layers()
