"""Sinks against explicit sums in float64, and against the models of transformers that have some themselves."""

from typing import Any

import pytest
import torch
import transformers as tf

import patchattn

from .behaviour import randomise, variant_parameters
from .families import FAMILIES, outputs
from .reference import DIM, HEADS, KV_HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def heads_of_attention(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The call outside of all variants, and what it gave."""
    seen: list[Any] = []

    def see(call: Any, output: torch.Tensor) -> None:
        seen.append((call, output))

    with torch.no_grad(), patchattn.probed(model, see):
        model(tokens)
    return seen[0]


@pytest.mark.parametrize(("implementation", "tolerance"), [("sdpa", 1e-12), ("eager", 1e-6)])  # float32 inside
def test_every_row_is_a_softmax_with_one_more_term(implementation: str, tolerance: float) -> None:
    model = tiny_llama(attn_implementation=implementation)
    patchattn.patch_model(model, "sink")
    sinks = torch.tensor([-2.0, 0.5, 3.0, -0.3], dtype=torch.float64)
    with torch.no_grad():
        model.model.layers[0].self_attn.patchattn.sink.logit.copy_(sinks)
    call, got = heads_of_attention(model, TOKENS)
    for sequence in range(2):
        for head in range(HEADS):
            keys = call.key[sequence, head // (HEADS // KV_HEADS)]
            values = call.value[sequence, head // (HEADS // KV_HEADS)]
            for row in range(TOKENS.shape[1]):
                masses = [float((call.query[sequence, head, row] @ keys[j] * DIM**-0.5).exp()) for j in range(row + 1)]
                total = sum(masses) + float(sinks[head].exp())
                want = sum(mass / total * values[j] for j, mass in enumerate(masses))
                torch.testing.assert_close(got[sequence, row, head], want, rtol=0, atol=tolerance)


def test_the_model_at_the_limit_and_near_it_at_the_start() -> None:
    model = tiny_llama()
    before = outputs(model, input_ids=TOKENS)[0]
    with patchattn.patched(model, "sink", initial_logit=-1000.0):
        torch.testing.assert_close(outputs(model, input_ids=TOKENS)[0], before, rtol=0, atol=1e-12)
    patchattn.patch_model(model, "sink")
    assert patchattn.patch_info(model)["extra_parameters"] == HEADS
    logits = model(TOKENS).logits
    assert (logits - before).abs().max() > 0
    (logits * torch.randn_like(logits)).sum().backward()
    (logit,) = variant_parameters(model).values()
    assert bool((logit.grad.abs() > 0).all())


def test_off_by_one_has_a_sink_of_zero_and_nothing_to_train() -> None:
    model = patchattn.patch_model(tiny_llama(), "sink", preset="off_by_one")
    assert not list(variant_parameters(model))
    call, got = heads_of_attention(model, TOKENS)
    first = call.query[0, 0, 0] @ call.key[0, 0, 0] * DIM**-0.5
    want = first.exp() / (1 + first.exp()) * call.value[0, 0, 0]
    torch.testing.assert_close(got[0, 0, 0], want, rtol=1e-10, atol=1e-12)


def test_weights_leave_the_sink_out() -> None:
    model = patchattn.patch_model(tiny_llama(attn_implementation="eager"), "sink", initial_logit=1.0)
    weights = model(TOKENS, output_attentions=True).attentions[0]
    assert weights.shape == (2, HEADS, 7, 7)
    assert bool((weights.sum(-1) < 1).all())
    call, got = heads_of_attention(model, TOKENS)
    values = call.value.repeat_interleave(HEADS // KV_HEADS, dim=1)
    torch.testing.assert_close(got, (weights @ values).transpose(1, 2), rtol=1e-10, atol=1e-12)


def gpt_oss() -> torch.nn.Module:
    torch.manual_seed(0)
    config = tf.GptOssConfig(
        **SIZES, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"], pad_token_id=None
    )
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # grouped products know no float64
    model = tf.GptOssForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def test_a_llama_with_the_attention_of_gpt_oss_gives_what_gpt_oss_gives() -> None:
    native = gpt_oss().model
    sibling = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, attention_bias=True)).double().eval()
    patchattn.patch_model(sibling, "sink")
    theirs, ours = native.layers[0].self_attn, sibling.model.layers[0].self_attn
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing.unexpected_keys == ["sinks"]
    assert all("patchattn" in name for name in missing.missing_keys)
    with torch.no_grad():
        ours.patchattn.sink.logit.copy_(theirs.sinks)
    states = torch.randn(2, 7, 32, dtype=torch.float64)
    cos, sin = native.rotary_emb(states, torch.arange(7)[None])
    mask = torch.full((7, 7), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)[None, None]
    want, _ = theirs(hidden_states=states, position_embeddings=(cos, sin), attention_mask=mask)
    whole = tuple(torch.cat([table, table], dim=-1) for table in (cos, sin))
    for given in (None, mask):
        got, _ = ours(hidden_states=states, position_embeddings=whole, attention_mask=given)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_granite_with_the_weights_of_granite_swa_gives_what_it_gives() -> None:
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    own = tf.GraniteSWAConfig(**sizes, layer_types=["full_attention"], attention_multiplier=0.3, rms_norm_eps=1e-6)
    own._attn_implementation = "eager"
    native = tf.GraniteSWAForCausalLM(own).double().eval()
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.normal_(std=0.1)
        native.model.layers[0].self_attn.sinks.copy_(torch.tensor([0.7, -1.0, 2.0, 0.1]))
    plain = tf.GraniteConfig(**sizes, attention_multiplier=0.3, rms_norm_eps=1e-6)
    sibling = tf.GraniteForCausalLM(plain).double().eval()
    found = sibling.load_state_dict(native.state_dict(), strict=False)
    assert not found.missing_keys
    assert found.unexpected_keys == ["model.layers.0.self_attn.sinks"]
    patchattn.patch_model(sibling, "sink")
    with torch.no_grad():
        attention = sibling.model.layers[0].self_attn
        without = outputs(sibling, input_ids=TOKENS)[0]
        attention.patchattn.sink.logit.copy_(native.model.layers[0].self_attn.sinks)
    got, want = (outputs(model, input_ids=TOKENS)[0] for model in (sibling, native))
    assert float((without - want).abs().max()) > 1e-4
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_sink_of_the_model_is_joined_and_not_replaced() -> None:
    model, patched = gpt_oss(), gpt_oss()
    patchattn.patch_model(patched, "sink")
    ours = torch.tensor([0.7, -1.0, 2.0, 0.1], dtype=torch.float64)
    with torch.no_grad():
        patched.model.layers[0].self_attn.patchattn.sink.logit.copy_(ours)
        own = model.model.layers[0].self_attn.sinks
        own.copy_((own.exp() + ours.exp()).log())
    got, want = (outputs(one, input_ids=TOKENS)[0] for one in (patched, model))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_small_differences_of_the_logit(dtype: torch.dtype) -> None:
    """-5.02 is no number of bfloat16, nor is 1 / scaling here; the sink's mass must still be right to a percent."""
    from patchattn.softmax.channels import parts

    logit, inverse = torch.tensor(-5.02), torch.tensor(96**0.5)
    products = sum(b.double() * s.double() for b in parts(logit, dtype) for s in parts(inverse, dtype))
    assert abs(float(products) / 96**0.5 - -5.02) < 1e-4
    assert len(parts(logit.double(), torch.float64)) == 1


def test_left_padding_and_rows_that_see_nothing() -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "sink")
    randomise(model)
    alone = outputs(model, input_ids=TOKENS[:1])[0]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), TOKENS[:1]], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(TOKENS[:1])], dim=1)
    got = outputs(model, input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))[0]
    torch.testing.assert_close(got[:, 3:], alone, rtol=0, atol=1e-5)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: seen.append(output), layers=0):
        model(input_ids=padded, attention_mask=mask)
    assert not seen[0][:, :3].any()


def test_softcap_and_flash_attention_are_refused_by_name() -> None:
    from patchattn.core.mask import Mask
    from patchattn.softmax.slots import SlotVariant

    model = patchattn.patch_model(FAMILIES["gemma2"].make(), "sink")
    with pytest.raises(NotImplementedError, match="'sink' does not support softcap"):
        outputs(model, **FAMILIES["gemma2"].inputs())
    variant = patchattn.patch_model(tiny_llama(), "sink").model.layers[0].self_attn.patchattn.sink
    device, dtype = torch.device("cpu"), torch.float32
    mask = Mask(None, "tokens", 1, 4, 3, 3, 3, device, dtype, causal=True)

    class Call:
        pass

    call: Any = Call()
    call.mask = mask
    assert isinstance(variant, SlotVariant)
    with pytest.raises(NotImplementedError, match="Flash attention has no place for the slot of Sink"):
        variant.attend(call, lambda call: pytest.fail("it was computed"))


def test_nothing_can_come_after_it() -> None:
    with pytest.raises((ValueError, NotImplementedError), match="sink"):
        patchattn.patch_model(tiny_llama(), ["sink", "ssmax"])
    assert patchattn.patch_info(patchattn.patch_model(tiny_llama(), ["ssmax", "sink"]))["extra_parameters"] != 0
