"""Meta tokens against explicit sums in float64, and against a kv cache that holds the same keys and values."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument

from .behaviour import randomise, variant_parameters
from .families import outputs
from .reference import DIM, HEADS, KV_HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
COUNT = 3


def live(initial_logit: float | None, **extra: Any) -> Any:
    model = patchattn.patch_model(tiny_llama(**extra), "meta_tokens", tokens=COUNT, initial_logit=initial_logit)
    randomise(model)
    return model


@pytest.mark.parametrize(("implementation", "tolerance"), [("sdpa", 1e-12), ("eager", 1e-6)])  # float32 inside
@pytest.mark.parametrize("initial_logit", [0.0, None])
@pytest.mark.parametrize("padded", [False, True])
def test_every_row_sees_them_before_the_text(
    implementation: str, tolerance: float, initial_logit: float | None, padded: bool
) -> None:
    model = live(initial_logit, attn_implementation=implementation)
    own = model.model.layers[0].self_attn.patchattn.meta_tokens
    mask = torch.ones_like(TOKENS)
    mask[1, :3] = 1 - int(padded)
    seen: list[Any] = []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: seen.append((call, output))):
        model(TOKENS, attention_mask=mask)
    call, got = seen[0]
    for sequence in range(2):
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            more = 0.0 if initial_logit is None else own.logit[head].item() - float(torch.tensor(COUNT).double().log())
            for row in mask[sequence].nonzero()[:, 0].tolist():
                query = call.query[sequence, head, row] * DIM**-0.5
                pairs = [
                    (query @ key + more, value) for key, value in zip(own.key[group], own.value[group], strict=True)
                ]
                for j in range(row + 1):
                    if mask[sequence, j]:
                        pairs.append((query @ call.key[sequence, group, j], call.value[sequence, group, j]))
                masses = [logit.exp() for logit, _ in pairs]
                want = sum(mass / sum(masses) * value for mass, (_, value) in zip(masses, pairs, strict=True))
                torch.testing.assert_close(got[sequence, row, head], want.detach(), rtol=0, atol=tolerance)


@torch.no_grad()
def test_the_papers_are_keys_and_values_at_the_head_of_a_cache() -> None:
    model = live(None, num_hidden_layers=2)
    found = model(TOKENS).logits
    plain = patchattn.unpatch_model(live(None, num_hidden_layers=2))
    cache = DynamicCache(config=plain.config)
    for number, layer in enumerate(model.model.layers):
        own = layer.self_attn.patchattn.meta_tokens
        cache.update(own.key.expand(2, -1, -1, -1), own.value.expand(2, -1, -1, -1), number)
    places = torch.arange(TOKENS.shape[1])[None]
    mask = torch.ones(2, COUNT + TOKENS.shape[1], dtype=torch.long)
    want = plain(TOKENS, attention_mask=mask, position_ids=places, **cache_argument(plain, cache)).logits
    torch.testing.assert_close(found, want, rtol=0, atol=1e-10)


def test_of_zeros_they_weigh_as_one_sink() -> None:
    model = patchattn.patch_model(tiny_llama(), "meta_tokens", tokens=COUNT, initial_std=0.0, initial_logit=-0.75)
    other = patchattn.patch_model(tiny_llama(), "sink", initial_logit=-0.75)
    got, want = (outputs(each, input_ids=TOKENS)[0] for each in (model, other))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_model_at_the_limit_near_it_at_the_start_and_what_is_trained() -> None:
    model = tiny_llama()
    before = outputs(model, input_ids=TOKENS)[0]
    with patchattn.patched(model, "meta_tokens", initial_logit=-1000.0):
        assert torch.equal(outputs(model, input_ids=TOKENS)[0], before)
    torch.manual_seed(0)
    patchattn.patch_model(model, "meta_tokens")
    assert patchattn.patch_info(model)["extra_parameters"] == 2 * 128 * KV_HEADS * DIM + HEADS
    logits = model(TOKENS).logits
    assert 0 < float((logits.detach() - before).abs().max()) < 0.1 * float(before.abs().max())
    (logits * torch.randn_like(logits)).sum().backward()
    for parameter in variant_parameters(model).values():
        assert bool((parameter.grad.abs() > 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_token_by_token_is_one_forward(dtype: torch.dtype) -> None:
    model = live(0.5, num_hidden_layers=2).to(dtype)
    cache, found = DynamicCache(config=model.config), []
    want = model(TOKENS).logits
    for part in TOKENS.split([3, 1, 2, 1], dim=1):
        found.append(model(part, **cache_argument(model, cache)).logits)
        assert cache.get_seq_length() == sum(part.shape[1] for part in found)  # they are not in the cache
    near = 1e-10 if dtype == torch.float64 else 0.05 * float(want.abs().max())
    torch.testing.assert_close(torch.cat(found, 1), want, rtol=0, atol=near)


def test_capped_logits_are_refused() -> None:
    assert "softcap" not in patchattn.variant_info("meta_tokens").capabilities
    with pytest.raises(ValueError, match="tokens"):
        patchattn.patch_model(tiny_llama(), "meta_tokens", tokens=0)
