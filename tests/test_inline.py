"""Families that compute attention in their own code: what variants see there, against the model's own numbers."""

import copy
import math
import pickle
from collections.abc import Iterator

import pytest
import torch
import transformers as tf
from torch import nn

import patchattn
from patchattn.core.host import find_sites
from patchattn.core.registry import temporarily_registered
from patchattn.core.variant import VariantInfo

from .toys import Toy

TOKENS = torch.tensor([[5, 9, 3, 7, 4, 8, 6], [6, 3, 8, 5, 9, 4, 7]])
RIGHT = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
_TEXT = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SHORT = {**_TEXT, "max_position_embeddings": 40}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 3}
_FALCON = {"bos_token_id": 1, "eos_token_id": 2, "ffn_hidden_size": 48}

MODELS = {
    "bloom": lambda: tf.BloomModel(tf.BloomConfig(**_TEXT)),
    "mpt": lambda: tf.MptModel(tf.MptConfig(vocab_size=32, d_model=32, n_layers=2, n_heads=4, max_seq_len=32)),
    "falcon": lambda: tf.FalconModel(tf.FalconConfig(**_TEXT, **_FALCON)),
    "falcon eager": lambda: tf.FalconModel(tf.FalconConfig(**_TEXT, **_FALCON, attn_implementation="eager")),
    "falcon alibi": lambda: tf.FalconModel(
        tf.FalconConfig(**_TEXT, **_FALCON, alibi=True, multi_query=False, attn_implementation="eager")
    ),
    "gpt_neo": lambda: tf.GPTNeoModel(
        tf.GPTNeoConfig(vocab_size=32, hidden_size=32, max_position_embeddings=40, **_NEO, **_SPECIAL)
    ),
    "deberta": lambda: tf.DebertaModel(tf.DebertaConfig(**_SHORT, **_RELATIVE)),
    "deberta-v2": lambda: tf.DebertaV2Model(
        tf.DebertaV2Config(**_SHORT, **_RELATIVE, position_buckets=4, share_att_key=True)
    ),
    "mpnet": lambda: tf.MPNetModel(tf.MPNetConfig(**_SHORT, **_SPECIAL)),
    "roformer": lambda: tf.RoFormerModel(tf.RoFormerConfig(**_SHORT)),
    "xlnet": lambda: tf.XLNetModel(tf.XLNetConfig(vocab_size=32, d_model=32, n_layer=2, n_head=4, d_inner=48)),
    "xlm": lambda: tf.XLMModel(
        tf.XLMConfig(vocab_size=32, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=40)
    ),
    "blip text": lambda: tf.models.blip.modeling_blip_text.BlipTextModel(
        tf.BlipTextConfig(**_SHORT, **_SPECIAL, sep_token_id=2, is_decoder=False, encoder_hidden_size=32)
    ),
}
CAUSAL = ("bloom", "mpt", "falcon", "falcon eager", "falcon alibi", "gpt_neo")


class Recomputes(Toy):
    """Hands on the same numbers in other tensors, so that all is computed again; at another temperature of queries."""

    def attend(self, call, inner):
        factor = 1.0 + self.config.strength
        return inner(call.replace(query=call.query * factor, key=call.key.clone(), value=call.value.clone()))


class Weighs(Toy):
    """Takes the first head out, at the output."""

    def attend(self, call, inner):
        output, weights = inner(call)
        gate = torch.ones(output.shape[2], dtype=output.dtype)
        gate[0] = 1.0 - self.config.strength
        return output * gate[:, None], weights


class Nearest(Toy):
    """Lets a query see no key but its own and the one before it, by the mask."""

    def attend(self, call, inner):
        place = torch.arange(call.query.shape[2])
        away = place[:, None] - place
        return inner(call.seeing(((away == 0) | (away == 1))[None, None]))


def _info(name: str, variant: type[patchattn.Variant]) -> VariantInfo:
    words = {"title": "", "summary": "", "extra_parameters": ""}
    return VariantInfo(name=name, variant=variant, **words, arxiv_id=None, year=2026, needs_training=False)


@pytest.fixture(autouse=True)
def _variants() -> Iterator[None]:
    infos = (_info("recomputes", Recomputes), _info("weighs", Weighs), _info("nearest", Nearest))
    with temporarily_registered(infos[0]), temporarily_registered(infos[1]), temporarily_registered(infos[2]):
        yield


@pytest.fixture(params=list(MODELS), scope="module")
def built(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 if request.param == "xlnet" else 3.0) if parameter.dim() > 1 else parameter.add_(
                0.1 * torch.randn_like(parameter)
            )
    return request.param, model


@pytest.fixture
def model(built: tuple[str, nn.Module]) -> nn.Module:
    return copy.deepcopy(built[1])


@torch.no_grad()
def run(model: nn.Module, **given: object) -> torch.Tensor:
    return model(input_ids=TOKENS, attention_mask=RIGHT, **given)[0]


def real(output: torch.Tensor) -> torch.Tensor:
    return output[RIGHT.bool()]


def attended(model: nn.Module) -> list[tuple[patchattn.AttentionCall, torch.Tensor]]:
    """Calls and outputs of self-attention, layer by layer."""
    calls: list[tuple[patchattn.AttentionCall, torch.Tensor]] = []
    with patchattn.probed(model, lambda call, output: calls.append((call, output)), modules="^(?!.*cross)"):
        run(model)
    return calls


def test_every_layer_is_a_site_and_says_how_many_heads_it_has(model: nn.Module) -> None:
    sites = [site for site in find_sites(model) if not site.is_cross]
    assert [site.layer_index for site in sites] == [0, 1]
    assert all(site.inline and site.query_heads == 4 and site.head_dim == 8 for site in sites)


def test_computing_everything_again_changes_no_bit_and_unpatching_restores(model: nn.Module) -> None:
    expected, keys, text = run(model), list(model.state_dict()), repr(model)
    patchattn.patch_model(model, "recomputes", strength=0.0)
    assert torch.equal(run(model), expected)
    patchattn.unpatch_model(model)
    assert torch.equal(run(model), expected)
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_what_variants_see_makes_the_weights_and_outputs_of_the_model(
    built: tuple[str, nn.Module], model: nn.Module
) -> None:
    """Softmax over `scaling * q k + mask + bias` in float64 is what the model says it attends to."""
    own = None
    if built[0] not in ("falcon", "blip text"):
        model.set_attn_implementation("eager") if built[0].startswith("falcon") else None
        with torch.no_grad():
            own = model(input_ids=TOKENS, attention_mask=RIGHT, output_attentions=True).attentions
    for layer, (call, output) in enumerate(attended(model)):
        query, key, value = (each.double() for each in (call.query, call.key, call.value))
        scores = query @ key.transpose(2, 3) * call.scaling
        if call.kwargs.get("position_bias") is not None:
            scores = scores + call.kwargs["position_bias"].double()
        if call.mask.added() is not None:
            scores = scores + call.mask.added().double()
        weights = scores.masked_fill(~call.mask.seen(), -math.inf).softmax(-1)
        rows = RIGHT.bool()
        torch.testing.assert_close(
            (weights @ value).transpose(1, 2)[rows].float(), output[rows].float(), rtol=1e-4, atol=1e-5
        )
        if own is not None:
            torch.testing.assert_close(
                weights.transpose(1, 2)[rows].float(), own[layer].transpose(1, 2)[rows], rtol=1e-4, atol=1e-5
            )


def test_masks_count_the_tokens_that_are_there(built: tuple[str, nn.Module], model: nn.Module) -> None:
    for layer, (call, _) in enumerate(attended(model)):
        counts = torch.empty(2, 7, dtype=torch.long)
        for sequence in range(2):
            for row in range(7):
                seen = [key for key in range(7) if RIGHT[sequence, key] and (built[0] not in CAUSAL or key <= row)]
                if built[0] == "gpt_neo" and layer == 1:
                    seen = [key for key in seen if key > row - 3]
                counts[sequence, row] = len(seen)
        assert torch.equal(call.mask.counts().expand(2, -1)[RIGHT.bool()], counts[RIGHT.bool()])
        assert call.is_causal == (built[0] in CAUSAL)


def test_a_temperature_acts_on_the_products_of_queries_and_keys_alone(
    built: tuple[str, nn.Module], model: nn.Module
) -> None:
    """Weights at twice the queries are those of before times `exp(scaling * q k)`, normalised; biases stay."""
    if built[0] in ("falcon", "blip text"):
        pytest.skip("this model gives no weights")
    (call, _), before = attended(model)[0], _attentions(model)[0].double()
    patchattn.patch_model(model, "recomputes", strength=1.0)
    after = _attentions(model)[0].double()
    products = torch.einsum("bhid,bhjd->bhij", call.query.double(), call.key.expand(-1, 4, -1, -1).double())
    expected = (before.log() + call.scaling * products).softmax(-1)
    rows = RIGHT.bool()
    torch.testing.assert_close(after.transpose(1, 2)[rows], expected.transpose(1, 2)[rows], rtol=1e-4, atol=1e-5)
    assert float((after - before).abs().max()) > 0.01


def _attentions(model: nn.Module) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=RIGHT, output_attentions=True).attentions  # type: ignore[no-any-return]


VALUES = {
    "bloom": lambda m: m.h[0].self_attention.query_key_value,
    "mpt": lambda m: m.blocks[0].attn.Wqkv,
    "falcon alibi": lambda m: m.h[0].self_attention.query_key_value,
    "gpt_neo": lambda m: m.h[0].attn.attention.v_proj,
    "deberta-v2": lambda m: m.encoder.layer[0].attention.self.value_proj,
    "mpnet": lambda m: m.encoder.layer[0].attention.attn.v,
    "roformer": lambda m: m.encoder.layer[0].attention.self.value,
}


def test_a_gate_takes_the_very_head_out_whose_values_are_zero(built: tuple[str, nn.Module], model: nn.Module) -> None:
    if built[0] not in VALUES:
        pytest.skip("its values are not in rows of one matrix")
    gated = copy.deepcopy(model)
    patchattn.patch_model(gated, "weighs", layers=0)
    projection = VALUES[built[0]](model)
    # By head, then queries, keys, values; or these after each other; or values alone.
    rows = {"bloom": slice(16, 24), "falcon alibi": slice(16, 24), "mpt": slice(64, 72)}.get(built[0], slice(0, 8))
    plain = run(model)
    with torch.no_grad():
        projection.weight[rows] = 0.0
        if projection.bias is not None:
            projection.bias[rows] = 0.0
    torch.testing.assert_close(real(run(gated)), real(run(model)), rtol=1e-5, atol=1e-5)
    assert float((real(run(model)) - real(plain)).abs().max()) > 0.01


def test_another_mask_leaves_the_keys_that_it_shows(built: tuple[str, nn.Module], model: nn.Module) -> None:
    if built[0] in ("falcon", "blip text"):
        pytest.skip("this model gives no weights")
    before = _attentions(model)[0].double()
    patchattn.patch_model(model, "nearest", layers=0)
    after = _attentions(model)[0].double()
    place = torch.arange(7)
    away = place[:, None] - place
    kept = before * ((away == 0) | (away == 1))
    expected, rows = kept / kept.sum(-1, keepdim=True), RIGHT.bool()
    torch.testing.assert_close(after.transpose(1, 2)[rows], expected.transpose(1, 2)[rows], rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_are_patched_and_independent(model: nn.Module) -> None:
    patchattn.patch_model(model, "recomputes", strength=0.5)
    expected = run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin), expected)
        patchattn.unpatch_model(twin)
        assert not torch.equal(run(twin), expected)
    assert torch.equal(run(model), expected)


def test_gradients_of_other_queries_are_those_of_a_scaled_projection(
    built: tuple[str, nn.Module], model: nn.Module
) -> None:
    """Where queries are a projection's output alone, twice the queries are that projection twice as large."""
    if built[0] not in ("gpt_neo", "mpnet", "roformer"):
        pytest.skip("its queries also make biases, or are a part of a larger projection")
    plain, patched = copy.deepcopy(model), model
    patchattn.patch_model(patched, "recomputes", strength=1.0)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if any(part in name for part in (".q_proj.", ".q.", ".query.")):
                parameter.mul_(2.0)
    gradients = []
    for each in (plain, patched):
        each(input_ids=TOKENS, attention_mask=RIGHT)[0][RIGHT.bool()].square().sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        factor = 2.0 if any(part in name for part in (".q_proj.", ".q.", ".query.")) else 1.0
        torch.testing.assert_close(gradients[1][name], factor * gradient, rtol=1e-3, atol=1e-4)
