"""Heads that share an axis with sequences, or have one of five: told apart by where they come from."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.core.registry import temporarily_registered
from patchattn.hosts.transformers.tape import Tape

from .families import each_of, shortened
from .test_inline import Recomputes, Weighs, _info

TOKENS = torch.tensor([[5, 9, 3, 7, 4, 8, 6], [6, 3, 8, 5, 9, 4, 7], [7, 7, 3, 4, 9, 5, 6], [3, 4, 5, 6, 7, 8, 9]])
RIGHT = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 7, [1] * 4 + [0] * 3])
_WIDTHS = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_IMAGE = {"image_size": 16, "patch_size": 4, "hidden_size": 32}
_MVP = {**_WIDTHS, **_HEADS, **_SPECIAL, "vocab_size": 32, "max_position_embeddings": 40}
_STAGES = {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "masked_unit_size": [4, 4], "num_query_pool": 1}

MODELS = {
    "mvp": lambda: tf.MvpModel(tf.MvpConfig(**_MVP)),
    "fsmt": lambda: tf.FSMTModel(
        tf.FSMTConfig(langs=["a", "b"], src_vocab_size=32, tgt_vocab_size=32, **_WIDTHS, **_HEADS, **_SPECIAL)
    ),
    "vitdet": lambda: tf.VitDetModel(
        tf.VitDetConfig(
            **_IMAGE,
            num_hidden_layers=2,
            num_attention_heads=4,
            window_block_indices=[0],
            window_size=2,
            use_relative_position_embeddings=True,
        )
    ),
    "hiera": lambda: tf.HieraModel(tf.HieraConfig(image_size=[64, 64], **_STAGES)),
}
# The module whose first head is taken out, its values' projection and rows.
VALUES = {
    "mvp": (r"^encoder.layers.0.self_attn$", lambda m: m.encoder.layers[0].self_attn.v_proj, slice(0, 8)),
    "fsmt": (r"^encoder.layers.0.self_attn$", lambda m: m.encoder.layers[0].self_attn.v_proj, slice(0, 8)),
    "vitdet": (r"^encoder.layer.0.attention$", lambda m: m.encoder.layer[0].attention.qkv, slice(64, 72)),
    "hiera": (r"^encoder.stages.1.layers.1.attn$", lambda m: m.encoder.stages[1].layers[1].attn.qkv, slice(64, 80)),
}


@pytest.fixture(autouse=True)
def _variants(toys: None) -> Iterator[None]:
    with temporarily_registered(_info("recomputes", Recomputes)), temporarily_registered(_info("weighs", Weighs)):
        yield


family = each_of(MODELS)


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MODELS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(family: str) -> dict[str, Any]:
    """As many sequences as heads: their number says nothing."""
    if family in ("mvp", "fsmt"):
        return {"input_ids": TOKENS, "attention_mask": RIGHT, "decoder_input_ids": TOKENS[:, :4], "use_cache": False}
    size = 64 if family == "hiera" else 16
    return {"pixel_values": torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))}


@torch.no_grad()
def run(model: nn.Module, family: str) -> torch.Tensor:
    return model(**inputs(family))[0]  # type: ignore[no-any-return]


def test_computing_everything_again_changes_nothing(family: str) -> None:
    model = make(family)
    expected = run(model, family)
    patchattn.patch_model(model, "toy_mask", strength=0.0)
    assert torch.equal(run(model, family), expected)
    patchattn.unpatch_model(model)
    patchattn.patch_model(model, "recomputes", strength=0.0)
    torch.testing.assert_close(run(model, family), expected, rtol=1e-5, atol=1e-5)


def test_what_variants_see_makes_the_output(family: str) -> None:
    """Softmax over `scaling * q k + mask + bias` in float64, and its product with the values."""
    model = make(family)
    calls: list[tuple[Any, torch.Tensor]] = []
    with patchattn.probed(model, lambda call, output: calls.append((call, output))):
        run(model, family)
    assert len(calls) == {"mvp": 6, "fsmt": 6, "vitdet": 2, "hiera": 3}[family]
    for call, output in calls:
        query, key, value = (each.double() for each in (call.query, call.key, call.value))
        scores = query @ key.transpose(2, 3) * call.scaling
        for added in (call.kwargs.get("position_bias"), call.mask.added()):
            scores = scores if added is None else scores + added.double()
        weights = scores.masked_fill(~call.mask.seen(), -torch.inf).softmax(-1)
        torch.testing.assert_close((weights @ value).transpose(1, 2).float(), output, rtol=1e-4, atol=1e-5)
        assert call.query.shape[1] == call.site.query_heads


def test_a_gate_takes_the_very_head_out_whose_values_are_zero(family: str) -> None:
    pattern, projection, rows = VALUES[family]
    plain, gated, model = run(make(family), family), make(family), make(family)
    patchattn.patch_model(gated, "weighs", modules=pattern)
    with torch.no_grad():
        projection(model).weight[rows] = 0.0
        projection(model).bias[rows] = 0.0
    expected = run(model, family)
    torch.testing.assert_close(run(gated, family), expected, rtol=1e-5, atol=1e-5)
    assert float((expected - plain).abs().max()) > 1e-3


def test_padding_changes_no_real_token() -> None:
    model = patchattn.patch_model(make("mvp"), "toy_gate").encoder
    with torch.no_grad():
        together = model(TOKENS, RIGHT)[0]
        for text in (1, 3):
            count = int(RIGHT[text].sum())
            alone = model(TOKENS[text : text + 1, :count])[0]
            torch.testing.assert_close(together[text, :count], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("toy", ["toy_mask", "toy_gate"])
@torch.no_grad()
def test_decoding_in_steps_is_one_forward(toy: str) -> None:
    model = patchattn.patch_model(make("mvp"), toy)
    given = {"input_ids": TOKENS, "attention_mask": RIGHT}
    whole = model(**given, decoder_input_ids=TOKENS, use_cache=False)[0]
    cache, parts = tf.EncoderDecoderCache(tf.DynamicCache(), tf.DynamicCache()), []
    for place in range(7):
        step = TOKENS[:, place : place + 1]
        parts.append(model(**given, decoder_input_ids=step, use_cache=True, **cache_argument(model, cache))[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model = patchattn.patch_model(make("mvp"), "toy_gate").train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)  # dropout
        model(**inputs("mvp"))[0].square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert any("patchattn" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mvp", "vitdet", "hiera"])  # FSMT asks the device for its padding
def test_it_compiles_whole_after_a_first_call(family: str) -> None:
    model = patchattn.patch_model(make(family), "toy_mask")
    model = shortened(model) if family == "vitdet" else model
    expected = run(model, family)
    torch._dynamo.reset()
    torch.testing.assert_close(
        run(torch.compile(model, backend="eager", fullgraph=True), family), expected, rtol=1e-4, atol=1e-5
    )


def test_what_reads_the_input_is_refused_where_sequences_do_not_come_first() -> None:
    model = patchattn.patch_model(make("fsmt"), "moh", active_ratio=0.5, router="learned")
    with pytest.raises(NotImplementedError, match="cannot tell which row is which"), torch.no_grad():
        model(input_ids=TOKENS[:, :4], decoder_input_ids=TOKENS[:, :4])  # as many tokens as sequences


def test_a_variant_that_needs_token_ids_is_refused_where_a_model_embeds_patches() -> None:
    with pytest.raises(NotImplementedError, match="landmark needs token ids, and VitDetModel embeds none"):
        patchattn.patch_model(make("vitdet"), "landmark", token=1)


# What a module may write: the same attention, over 3 sequences with 3 heads, so that no number tells one from another.
HIDDEN = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))


def _merged(states: torch.Tensor) -> torch.Tensor:
    return F.linear(states, WEIGHT).view(3, 5, 3, 4).transpose(1, 2).reshape(9, 5, 4)


def _of_unknown_make(states: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bte,ef->btf", states, WEIGHT).view(3, 5, 3, 4).transpose(1, 2).reshape(9, 5, 4)


def _heads_first(states: torch.Tensor) -> torch.Tensor:
    return F.linear(states, WEIGHT).view(3, 5, 3, 4).permute(2, 0, 1, 3).reshape(9, 5, 4)


def _tokens_first(states: torch.Tensor) -> torch.Tensor:
    return F.linear(states.transpose(0, 1).contiguous(), WEIGHT).view(5, 9, 4).transpose(0, 1)


def _by_index(states: torch.Tensor) -> torch.Tensor:
    both = F.linear(states, torch.cat([WEIGHT, WEIGHT])).view(3, 5, 2, 3, 4)
    return (both[:, :, 1] * 0.5 + both[..., 0, :, :] * 0.5).permute(0, 2, 1, 3).flatten(0, 1)


def _seen(made: Any) -> Any:
    found = []

    def attend(pattern: Any) -> Any:
        found.append(pattern)
        return (pattern.weights @ pattern.value).transpose(1, 2), pattern.weights

    with Tape("Mine", attend):
        query = made(HIDDEN)
        torch.bmm(torch.bmm(query, query.mT).softmax(-1), query)
    return found[0]


@pytest.mark.parametrize("made", [_merged, _tokens_first, _by_index])
def test_heads_and_sequences_of_one_size_are_told_apart(made: Any) -> None:
    wanted = (HIDDEN @ WEIGHT.T).view(3, 5, 3, 4).transpose(1, 2)
    torch.testing.assert_close(_seen(made).query, wanted)


def test_sequences_that_do_not_come_first_in_the_input_are_said_to_be_so() -> None:
    assert _seen(_merged).leads_by_sequence
    turned = torch.nn.Parameter(WEIGHT)
    found = []
    states = HIDDEN.transpose(0, 1).contiguous()
    with Tape("Mine", lambda p: found.append(p) or ((p.weights @ p.value).transpose(1, 2), p.weights)):
        query = F.linear(states, turned).view(5, 9, 4).transpose(0, 1)
        torch.bmm(torch.bmm(query, query.mT).softmax(-1), query)
    assert not found[0].leads_by_sequence


@pytest.mark.parametrize("made", [_of_unknown_make, _heads_first])
def test_heads_that_cannot_be_followed_are_refused(made: Any) -> None:
    with pytest.raises(NotImplementedError, match="heads are not told apart from sequences"):
        _seen(made)


def test_a_softmax_over_parts_of_the_rows_is_refused() -> None:
    with Tape("Mine", lambda p: ((p.weights @ p.value).transpose(1, 2), p.weights)):
        query = F.linear(torch.randn(2, 4, 12), WEIGHT).view(2, 4, 3, 4).transpose(1, 2).reshape(6, 4, 4)
        weights = torch.bmm(query, query.mT).view(6, 4, 2, 2).softmax(-1).view(6, 4, 4)
        with pytest.raises(NotImplementedError, match="its softmax is over dimension -1"):
            torch.bmm(weights, query)
