"""Exclusive self-attention against loops in float64, and against the module of NeoMME."""

from typing import Any

import pytest
import torch
from transformers import NeoMMEConfig, SegformerConfig, SegformerModel
from transformers.models.neomme import modeling_neomme

import patchattn

from .behaviour import variant_parameters
from .families import outputs
from .reference import HEADS, KV_HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
ALPHA = torch.tensor([0.3, -0.7, 1.5, 0.0], dtype=torch.float64)


def patched(**settings: Any) -> Any:
    model = patchattn.patch_model(tiny_llama(num_hidden_layers=2), "exclusive", **settings)
    for parameter in variant_parameters(model).values():
        with torch.no_grad():
            parameter.copy_(ALPHA)
    return model


def look(model: Any, at: str, **inputs: Any) -> tuple[Any, torch.Tensor]:
    """The first call of the first layer, outside of the variant or inside of it, and what it gave."""
    seen: list[Any] = []
    with torch.no_grad(), patchattn.probed(model, lambda *found: seen.append(found), at=at):
        model(**inputs)
    return seen[0]


@pytest.mark.parametrize("learned", [True, False])
def test_by_loops(learned: bool) -> None:
    model = patched(learned=learned)
    mask = torch.ones_like(TOKENS)
    mask[1, :2] = 0
    call, plain = look(model, "base", input_ids=TOKENS, attention_mask=mask)
    _, got = look(model, "model", input_ids=TOKENS, attention_mask=mask)
    share = ALPHA.tanh() if learned else torch.ones(HEADS).double()
    for sequence in range(2):
        for row in mask[sequence].nonzero()[:, 0].tolist():
            for head in range(HEADS):
                own = call.value[sequence, head // (HEADS // KV_HEADS), row]
                o = plain[sequence, row, head]
                want = o - share[head] * (o @ own) / (own @ own) * own
                torch.testing.assert_close(got[sequence, row, head], want, rtol=0, atol=1e-12)
                if not learned:
                    assert abs(float(got[sequence, row, head] @ own)) < 1e-12


def test_as_neomme_computes_it() -> None:
    config = NeoMMEConfig(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
    native = modeling_neomme.NeoMMEExclusiveSelfAttention(config).double()
    with torch.no_grad():
        native.alpha.copy_(ALPHA)
    model = patched()
    call, plain = look(model, "base", input_ids=TOKENS)
    _, got = look(model, "model", input_ids=TOKENS)
    with torch.no_grad():
        want = native(plain, call.value)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # theirs makes unit values in float32


def test_the_start_is_the_model_and_learns_at_once() -> None:
    model = tiny_llama()
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "exclusive")
    assert torch.equal(outputs(model, input_ids=TOKENS)[0], before)
    logits = model(TOKENS).logits
    (logits * torch.randn_like(logits)).sum().backward()
    (alpha,) = variant_parameters(model).values()
    assert alpha.shape == (HEADS,)
    assert bool((alpha.grad.abs() > 0).all())


def test_a_static_cache_and_chunks_are_one_forward() -> None:
    model = patched()
    mask = torch.ones_like(TOKENS)
    mask[1, :2] = 0
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(TOKENS, attention_mask=mask, position_ids=place).logits
        cache, found = None, []
        for start, end in ((0, 3), (3, 6), (6, 7)):
            how = {"attention_mask": mask[:, :end], "position_ids": place[:, start:end], "cache": cache}
            out = model(TOKENS[:, start:end], use_cache=True, **how)
            cache = out.cache
            found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1)[0], want[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(torch.cat(found, 1)[1, 2:], want[1, 2:], rtol=0, atol=1e-9)
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    kinds = (model.generate(TOKENS, cache_implementation=kind, **how).logits for kind in (None, "static"))
    dynamic, static = (torch.stack(logits) for logits in kinds)
    torch.testing.assert_close(dynamic, static, rtol=0, atol=1e-6)


def test_refusals() -> None:
    model = tiny_llama()
    patchattn.patch_model(model, ["streaming_llm", "exclusive"], {"streaming_llm": {"sinks": 1, "recent": 4}})
    with pytest.raises(NotImplementedError, match="needs each token's own value"), torch.no_grad():
        model.generate(TOKENS.repeat(1, 8), max_new_tokens=2, pad_token_id=0, attention_mask=torch.ones(2, 56))

    sizes = {"depths": [1], "hidden_sizes": [16], "num_attention_heads": [1], "sr_ratios": [4], "strides": [4]}
    reducing = SegformerModel(SegformerConfig(num_encoder_blocks=1, patch_sizes=[7], mlp_ratios=[2], **sizes)).eval()
    patchattn.patch_model(reducing, "exclusive")
    with pytest.raises(NotImplementedError, match="64 queries meet 4 keys"), torch.no_grad():
        reducing(torch.randn(1, 3, 32, 32))
