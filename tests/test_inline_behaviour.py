"""The invariants of a patched model, on families that compute attention in their own code; what is refused there."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.core.host import find_sites
from patchattn.core.kv_caches import cache_argument

from .behaviour import randomise, snapshot
from .families import each_of, shortened

pytestmark = pytest.mark.usefixtures("toys")

_TEXT = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}
_XGLM = {"vocab_size": 32, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}
_MPT = {"vocab_size": 32, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32, "expansion_ratio": 2}

MODELS = {
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(**_TEXT, **_SPECIAL)),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(**_MPT)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**_TEXT, **_SPECIAL, ffn_hidden_size=48)),
    "deberta-v2": lambda: tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**_TEXT, **_RELATIVE, max_position_embeddings=40)),
    "xglm": lambda: tf.XGLMForCausalLM(tf.XGLMConfig(**_XGLM, **_SPECIAL)),
}
DECODERS = ("bloom", "mpt", "falcon")
TOYS = ("toy_mask", "toy_state", "toy_gate", "toy_rule")
TOKENS = torch.tensor([[5, 9, 3, 7, 4, 8, 6, 11, 10], [6, 3, 8, 5, 9, 4, 7, 10, 12]])


family = each_of(MODELS)


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MODELS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def patched(family: str, toy: str) -> nn.Module:
    model = patchattn.patch_model(make(family), toy)
    randomise(model)
    return model


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor, **given: object) -> torch.Tensor:
    return model(input_ids=tokens, **given).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("toy", TOYS)
def test_neutral_is_the_model_and_a_patch_is_saved_and_undone(family: str, toy: str, tmp_path: Path) -> None:
    model = make(family)
    plain = logits(model, TOKENS)
    patchattn.patch_model(model, toy, strength=0.0)
    assert torch.equal(logits(model, TOKENS), plain)
    patchattn.unpatch_model(model)
    before = snapshot(model)
    patchattn.patch_model(model, toy)
    randomise(model)
    changed = logits(model, TOKENS)
    assert float((changed - plain).abs().max()) > 1e-3
    patchattn.save_patch(model, tmp_path)
    assert torch.equal(logits(patchattn.load_patch(make(family), tmp_path), TOKENS), changed)
    patchattn.unpatch_model(model)
    assert torch.equal(logits(model, TOKENS), plain)
    assert str(snapshot(model)) == str(before)


@pytest.mark.parametrize("toy", TOYS)
def test_padding_changes_no_real_token(family: str, toy: str) -> None:
    model = patched(family, toy)
    for side, real in (("left", slice(3, None)), ("right", slice(0, 6))):
        if side == "left" and family not in DECODERS:
            continue  # its absolute positions count padding
        mask = torch.ones_like(TOKENS)
        mask[1] = 0
        mask[1, real] = 1
        together = logits(model, TOKENS * mask, attention_mask=mask)
        alone = logits(model, TOKENS[1:, real])
        torch.testing.assert_close(together[1:, real], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[:1], logits(model, TOKENS[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("family", DECODERS)
def test_left_padded_decoding_in_chunks_and_steps_is_one_forward_of_each_text(family: str, toy: str) -> None:
    model = patched(family, toy)
    mask = torch.ones_like(TOKENS)
    mask[1, :3] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = [DynamicCache(config=model.config)]
    if family != "bloom":  # whose own biases are of the keys that its mask tells of
        caches.append(StaticCache(config=model.config, max_cache_len=12))
    for cache in caches:
        parts, done = [], 0
        for size in (5, 1, 2, 1):
            chunk = slice(done, done + size)
            done += size
            given = {"attention_mask": mask[:, :done], **cache_argument(model, cache)}
            if family == "falcon":
                given["position_ids"] = places[:, chunk]
            parts.append(logits(model, TOKENS[:, chunk], use_cache=True, **given))
        together = torch.cat(parts, dim=1)
        torch.testing.assert_close(together[:1], logits(model, TOKENS[:1]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[1:, 3:], logits(model, TOKENS[1:, 3:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("toy", ["toy_state", "toy_gate"])
def test_activation_checkpointing_gives_the_same_gradients(family: str, toy: str) -> None:
    model = patched(family, toy).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        model.zero_grad()
        torch.manual_seed(1)  # dropout
        model(input_ids=TOKENS).logits.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert any("patchattn" in name for name in gradients[0]) == (toy == "toy_gate")
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.slow  # the compiler follows every step of the tape
def test_it_compiles_whole_after_a_first_call(family: str) -> None:
    model = shortened(patched(family, "toy_mask"))
    given = {"use_cache": False} if family in DECODERS else {}
    expected = logits(model, TOKENS, **given)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, TOKENS, **given), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_a_model_does_not_say_before_its_first_call_is_not_guessed_where_that_is_compiled() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(shortened(patched("deberta-v2", "toy_gate")), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="does not say whether it is causal: call the model once before it is compiled"):
        logits(compiled, TOKENS)


def test_what_a_cache_stores_is_not_changed(family: str) -> None:
    model = patched(family, "toy_store")
    if family == "deberta-v2":
        assert bool(logits(model, TOKENS).isfinite().all())
        return
    assert bool(logits(model, TOKENS, use_cache=False).isfinite().all())
    with pytest.raises(NotImplementedError, match="'toy_store' would change what its kv cache stores"):
        logits(model, TOKENS, use_cache=True)


def test_heads_are_masked_and_not_cut(family: str) -> None:
    model = make(family)
    before = logits(model, TOKENS)
    with pytest.raises(NotImplementedError, match="cannot be cut into heads: it computes attention in its own code"):
        patchattn.patch_model(model, "prune", heads={0: [1]})
    assert torch.equal(logits(model, TOKENS), before)
    patchattn.patch_model(model, "prune", heads={0: [1]}, physical=False)
    assert float((logits(model, TOKENS) - before).abs().max()) > 1e-3


@pytest.mark.parametrize("family", DECODERS)
def test_no_key_of_a_cache_is_dropped(family: str) -> None:
    model = patchattn.patch_model(make(family), "streaming_llm", sinks=1, recent=3)
    with pytest.raises(NotImplementedError, match=r"cannot drop keys|does not support position_bias"):
        logits(model, TOKENS, use_cache=True)


def test_a_check_says_that_no_fused_kernel_takes_its_place(family: str) -> None:
    report = patchattn.check_patch(make(family), TOKENS, "toy_gate")
    (name,) = {site.module_class for site in find_sites(make(family))}
    assert report.passed, str(report)
    assert report.inline == [name]
    assert f"note: {name}: attention in the model's own code, so that no fused kernel takes its place" in str(report)


def refused(model: nn.Module, says: str, **given: torch.Tensor) -> None:
    model.eval()
    assert all(site.inline for site in find_sites(model))
    inputs = {"input_ids": TOKENS[:, :8], **given}
    with torch.no_grad():
        before = model(**inputs)[0]
        patchattn.patch_model(model, "moh", active_ratio=0.5)
        with pytest.raises(NotImplementedError, match=says):
            model(**inputs)
        patchattn.unpatch_model(model)
        assert torch.equal(model(**inputs)[0], before)


def test_heads_that_talk_before_their_softmax_are_refused_by_name() -> None:
    config = tf.DebertaConfig(**_TEXT, max_position_embeddings=40, talking_head=True, relative_attention=False)
    refused(tf.DebertaModel(config), r"DisentangledSelfAttention \(encoder.layer.0.*0 products reach the softmax")


def test_scores_in_chunks_are_refused_by_name() -> None:
    config = tf.LongformerConfig(**_TEXT, **_SPECIAL, max_position_embeddings=40, attention_window=4)
    refused(tf.LongformerModel(config), r"LongformerSelfAttention \(encoder.layer.0.*does not know")


def test_two_streams_in_one_module_are_refused_by_name() -> None:
    model = tf.XLNetModel(tf.XLNetConfig(vocab_size=32, d_model=32, n_layer=1, n_head=4, d_inner=48))
    perm, target = torch.zeros(2, 8, 8), torch.zeros(2, 1, 8)
    perm[:, :, -1], target[:, 0, -1] = 1.0, 1.0
    refused(model, "attends more than once in a call", perm_mask=perm, target_mapping=target)


def test_what_reads_the_layers_input_is_refused_where_its_width_is_not_told() -> None:
    model = tf.XLNetModel(tf.XLNetConfig(vocab_size=32, d_model=32, n_layer=1, n_head=4, d_inner=48))
    with pytest.raises(NotImplementedError, match="cannot tell the input width"):
        patchattn.patch_model(model, "moh", router="learned")
