"""Masks that a user hands to the model: one per head, or filled with numbers of the user's own choice."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

import patchattn
from patchattn.core.given import real_tokens
from patchattn.inspection.attention_maps import attention_maps, attention_received
from patchattn.training import balance_loss

from .behaviour import randomise
from .test_masks import mask_of

LENGTH, HEADS = 8, 4
TOKENS = torch.randint(1, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
VARIANTS: dict[str, dict[str, Any]] = {
    "ssa": {},
    "ssmax": {"initial_scale": 0.7},
    "logn": {"train_length": 2},
    "act": {"alpha": 1.0, "keep_first": False},
    "moh": {"active_ratio": 0.5},
    "prune": {"heads": {0: [1]}, "physical": False},
}


def llama(kv_heads: int = HEADS, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_attention_heads": HEADS}
    config = tf.LlamaConfig(**sizes, num_key_value_heads=kv_heads, **{"num_hidden_layers": 1, **settings})
    model = tf.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)  # attention that is not uniform
    return model


def patched(model: nn.Module, variant: str) -> nn.Module:
    patchattn.patch_model(model, variant, **VARIANTS[variant])
    randomise(model)
    return model


def masks_of_heads() -> torch.Tensor:
    """`(2, H, T, T)` causal, each head with its own gaps, in which every token sees itself."""
    shown = torch.rand(2, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.6
    return (shown | torch.eye(LENGTH).bool()).tril()


def by_head(model: nn.Module, mask: torch.Tensor, **more: Any) -> torch.Tensor:
    """`(B, T, H, D)` what goes into the output projection of the only layer."""
    seen: list[torch.Tensor] = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(TOKENS, attention_mask=mask, **more)
    hook.remove()
    return seen[0].unflatten(-1, (HEADS, -1))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_head_does_under_its_mask_what_it_does_under_it_as_the_mask_of_all(
    variant: str, use_cache: bool, implementation: str
) -> None:
    model = patched(llama(attn_implementation=implementation), variant)
    masks = masks_of_heads()
    if implementation == "eager":  # which adds them
        masks = torch.zeros(masks.shape).masked_fill(~masks, torch.finfo(torch.float32).min)
    got = by_head(model, masks, use_cache=use_cache)
    for head in range(HEADS):
        alone = by_head(model, masks[:, head : head + 1], use_cache=use_cache)
        torch.testing.assert_close(got[:, :, head], alone[:, :, head], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[:, :, 1:], by_head(model, masks[:, :1], use_cache=use_cache)[:, :, 1:], atol=1e-3)


def test_compiled_too() -> None:
    model, masks = patched(llama(), "ssmax"), masks_of_heads()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        want = model(TOKENS, attention_mask=masks, use_cache=False).logits
        got = compiled(TOKENS, attention_mask=masks, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_query_heads_that_share_keys_must_see_the_same_where_keys_are_scaled(use_cache: bool) -> None:
    model, masks = patched(llama(kv_heads=2), "ssa"), masks_of_heads()
    with pytest.raises(NotImplementedError, match="mask per head"):
        model(TOKENS, attention_mask=masks, use_cache=use_cache)
    alike = masks[:, [0, 0, 2, 2]]
    got = by_head(model, alike, use_cache=use_cache)
    for head in range(HEADS):
        alone = by_head(model, alike[:, head : head + 1], use_cache=use_cache)
        torch.testing.assert_close(got[:, :, head], alone[:, :, head], rtol=1e-5, atol=1e-5)


def test_statistics_that_count_alike_in_all_heads_refuse_such_masks() -> None:
    model, masks = llama(), masks_of_heads()
    alike = masks[:, :1].expand(-1, HEADS, -1, -1)
    for look in (attention_received, attention_maps):
        with pytest.raises(NotImplementedError, match="masks per head"):
            look(model, {"input_ids": TOKENS, "attention_mask": masks})
        got, want = (
            look(model, {"input_ids": TOKENS, "attention_mask": mask}) for mask in (alike, alike[:, :1].clone())
        )
        for one, other in zip(got, want, strict=True):
            left, right = (x.share if look is attention_received else x.weights for x in (one, other))
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize("kind", ["bool", "added", "block"])
def test_counting_pair_by_pair(kind: str) -> None:
    shown = masks_of_heads()
    shown[0, :, 3] = False  # padding: no head shows it to itself
    shown[1, 1:, 2] = False  # one head does
    mask: Any = shown
    if kind == "added":
        mask = torch.zeros(shown.shape).masked_fill(~shown, -1e4)
    elif kind == "block":
        mask = create_block_mask(lambda b, h, i, j: shown[b, h, i, j], 2, HEADS, LENGTH, LENGTH, device="cpu")
    found = mask_of(mask, LENGTH, LENGTH)
    counts, pairs = found.counts(), found.seen()
    for b in range(2):
        for i in range(LENGTH):
            for h in range(HEADS):
                assert counts[b, i, h] == sum(bool(shown[b, h, i, j]) for j in range(LENGTH))
                assert pairs[b, h, i].tolist() == shown[b, h, i].tolist()
    said = real_tokens(mask, queries=LENGTH, keys=LENGTH, device=torch.device("cpu"))
    assert said.tolist() == found.real().tolist() == [[i != 3 for i in range(LENGTH)], LENGTH * [True]]


# --- masks that are added ---------------------------------------------------------------------------------------------

FILLERS = {"1e4": -1e4, "1e9": -1e9, "float16": torch.finfo(torch.float16).min, "bfloat16": -9984.0}
PADDING = 3


def padded(filler: float | None) -> torch.Tensor:
    """`(2, 1, T, T)` causal, the first row with padding on the left; bool without a filler."""
    shown = torch.ones(2, 1, LENGTH, LENGTH).tril().bool()
    shown[0, :, :, :PADDING] = False
    return shown if filler is None else torch.zeros(shown.shape).masked_fill(~shown, filler)


def real(logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits[0, PADDING:], logits[1]])


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_that_hides_a_key_does_so_for_variants(variant: str, use_cache: bool, filler: str) -> None:
    model = patched(llama(kv_heads=2, num_hidden_layers=2), variant)
    with torch.no_grad():
        want, got = (
            model(TOKENS, attention_mask=padded(number), use_cache=use_cache).logits
            for number in (None, FILLERS[filler])
        )
    torch.testing.assert_close(real(got), real(want), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("filler", FILLERS)
def test_losses_on_routers_count_real_tokens_only(filler: str) -> None:
    model = llama(num_hidden_layers=2)
    patchattn.patch_model(model, "moh", router="learned", active_ratio=0.5)
    randomise(model)
    losses = []
    for number in (None, FILLERS[filler]):
        with balance_loss(model, weight=1.0) as balance:
            model(TOKENS, attention_mask=padded(number))
            losses.append(balance())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("filler", FILLERS)
def test_the_mean_router_of_shrp_takes_the_mean_of_real_tokens(filler: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_attention_heads": HEADS}
    model = tf.BertModel(tf.BertConfig(num_hidden_layers=2, **sizes)).eval()
    patchattn.patch_model(model, "shrp", heads=2, router="mean")
    randomise(model)
    shown = torch.ones(2, 1, LENGTH, LENGTH).bool()
    shown[0, :, :, :PADDING] = False
    added = torch.zeros(shown.shape).masked_fill(~shown, FILLERS[filler])
    with torch.no_grad():
        want, got = (model(TOKENS, attention_mask=mask).last_hidden_state for mask in (shown, added))
    torch.testing.assert_close(real(got), real(want), rtol=1e-5, atol=1e-5)


def test_biases_in_the_mask_hide_nothing() -> None:
    """ALiBi, steep enough for the far keys to get no weight: they are counted, and the bias is added once."""
    length = 300
    distance = torch.arange(length)[:, None] - torch.arange(length)
    slopes = torch.tensor([0.5, 1.0, 4.0, 16.0]).view(1, HEADS, 1, 1)
    mask = (-slopes * distance).masked_fill(distance < 0, torch.finfo(torch.float32).min)
    assert mask[:, :, -1].min() < -4000
    assert mask_of(mask, length, length).counts().tolist() == [[HEADS * [i + 1] for i in range(length)]]


def test_markuplm_with_padding_on_the_left() -> None:
    """Its masks are filled with -1e4."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_attention_heads": HEADS}
    model = tf.MarkupLMModel(tf.MarkupLMConfig(num_hidden_layers=2, **sizes)).eval()
    patchattn.patch_model(model, "ssa")
    randomise(model)
    tokens = TOKENS[:1].clone()
    tokens[:, :PADDING] = model.config.pad_token_id
    shown, positions = torch.ones(1, LENGTH), torch.arange(LENGTH)[None] - PADDING + 2
    shown[:, :PADDING] = 0
    with torch.no_grad():
        got = model(tokens, attention_mask=shown, position_ids=positions.clamp(min=0)).last_hidden_state
        alone = model(tokens[:, PADDING:], position_ids=positions[:, PADDING:]).last_hidden_state
    torch.testing.assert_close(got[:, PADDING:], alone, rtol=1e-5, atol=1e-5)
