"""DeCoRe against two forwards of the unpatched model, one of them with hooks that mask heads."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

import patchattn
from patchattn.core.patching import active_chains, applied_patches
from patchattn.variants.decoding.decore import DeCoRe, DeCoReConfig

from .reference import DIM, HEADS, KV_HEADS, WIDTH, tiny_llama
from .test_decoding import decode

PROMPT = torch.tensor([[3, 7, 1, 9, 22, 5]])
MASKED = {0: [1], 1: [0, 3]}


def model_of(kind: str = "llama") -> Any:
    if kind == "llama":
        made: Any = tiny_llama(num_hidden_layers=2)
    else:  # every layer's window is shorter than the prompt
        torch.manual_seed(0)
        sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM, "sliding_window": 4}
        made = MistralForCausalLM(MistralConfig(**sizes, **heads)).double().eval()
        for parameter in made.parameters():
            parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    return made


@torch.no_grad()
def masked_logits(model: nn.Module, tokens: torch.Tensor, first: int, mask: str) -> torch.Tensor:
    """Of one forward over a text whose heads are masked from one row on; every query head has one of its own."""

    def hook(layer: int) -> Any:
        def zeroed(states: torch.Tensor) -> torch.Tensor:
            states = states.clone().unflatten(-1, (HEADS, DIM))
            states[:, first:, MASKED[layer]] = 0.0
            return states.flatten(-2)

        return zeroed

    handles = []
    for index, layer in enumerate(model.model.layers):
        zeroed, attention = hook(index), layer.self_attn
        if mask == "query":
            handles.append(attention.q_proj.register_forward_hook(lambda _m, _a, out, zeroed=zeroed: zeroed(out)))
        else:
            handles.append(
                attention.o_proj.register_forward_pre_hook(lambda _m, args, zeroed=zeroed: (zeroed(args[0]),))
            )
    found = model(tokens).logits
    for handle in handles:
        handle.remove()
    return found


def contrast(base: torch.Tensor, masked: torch.Tensor, alpha: float | None, cap: float, scale: float) -> torch.Tensor:
    """`(T, V)`, token by token in Python floats."""
    rows = []
    for one, other in zip(base.tolist(), masked.tolist(), strict=True):
        total = math.log(sum(math.exp(x) for x in one))
        entropy = -sum(math.exp(x - total) * (x - total) for x in one)
        strength = min(entropy / scale, cap) if alpha is None else alpha
        rows.append([(1 + strength) * x - strength * y for x, y in zip(one, other, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("mask", ["output", "query"])
@pytest.mark.parametrize(
    ("settings", "alpha", "cap", "scale"),
    [
        ({}, None, math.inf, 1.0),
        ({"alpha": 0.5}, 0.5, math.inf, 1.0),
        ({"alpha_cap": 1.5}, None, 1.5, 1.0),
        ({"scale_alpha": True}, None, math.inf, math.log(50)),
        ({"rows": "all"}, None, math.inf, 1.0),
    ],
)
def test_steps_are_those_of_two_forwards(
    settings: dict[str, Any], alpha: float | None, cap: float, scale: float, mask: str, kind: str
) -> None:
    model = model_of(kind)
    patchattn.patch_model(model, "decore", heads=MASKED, mask=mask, **settings)
    tokens, steps = decode(model, {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)})
    patchattn.unpatch_model(model)
    whole = torch.cat([PROMPT, tokens], dim=1)[:, :-1]
    first = 0 if settings.get("rows") == "all" else 5
    with torch.no_grad():
        base = model(whole).logits[0, 5:]
    want = contrast(base, masked_logits(model, whole, first, mask)[0, 5:], alpha, cap, scale)
    torch.testing.assert_close(steps[0].double(), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(steps[0].double(), base, atol=1e-2)


@pytest.mark.parametrize(("kind", "rows"), [("llama", 1), ("mistral", 6)])
def test_the_prompt_is_computed_once_where_layers_keep_all_keys(kind: str, rows: int) -> None:
    model, lengths = patchattn.patch_model(model_of(kind), "decore", heads=MASKED), []
    model.model.layers[0].register_forward_hook(lambda _, args, output: lengths.append(args[0].shape[1]))
    decode(model, {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)})
    assert lengths == [6, rows, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_prompt_ends_where_logits_are_asked_for(use_cache: bool, kind: str) -> None:
    model = patchattn.patch_model(model_of(kind), "decore", heads=MASKED, mask="query", alpha=1.0)
    with torch.no_grad():
        got = model(PROMPT, logits_to_keep=3, use_cache=use_cache).logits
    patchattn.unpatch_model(model)
    with torch.no_grad():
        want = 2 * model(PROMPT).logits - masked_logits(model, PROMPT, 3, "query")
    torch.testing.assert_close(got, want[:, 3:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("asked", [0, torch.tensor([1, 5, 3])])
def test_all_logits_of_a_prompt_are_those_of_two_forwards(asked: Any, kind: str) -> None:
    """Without logits_to_keep the prompt ends with the last token; those before it are in the branch as in the model."""
    model = model_of(kind)
    base = model(PROMPT).logits[0]
    wanted = contrast(base, masked_logits(model, PROMPT, 5, "query")[0], None, math.inf, 1.0)
    patchattn.patch_model(model, "decore", heads=MASKED, mask="query")
    found = model(PROMPT, logits_to_keep=asked, use_cache=True).logits[0]
    torch.testing.assert_close(found, wanted if isinstance(asked, int) else wanted[asked], rtol=1e-5, atol=1e-5)


def test_prompts_padded_on_the_right_are_masked_at_their_last_token() -> None:
    model = model_of()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    patchattn.patch_model(model, "decore", heads=MASKED, alpha=1.0)
    with torch.no_grad():
        got = model(PROMPT.expand(2, -1), attention_mask=mask).logits
    patchattn.unpatch_model(model)
    for row, length in enumerate((6, 4)):
        prompt = PROMPT[:, :length]
        with torch.no_grad():
            want = 2 * model(prompt).logits - masked_logits(model, prompt, length - 1, "output")
        torch.testing.assert_close(got[row, :length], want[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [None, 0.5, 7.0])
@pytest.mark.parametrize("rows", ["last", "all"])
def test_a_branch_like_the_model_leaves_its_logits(
    rows: str, alpha: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"input_ids": PROMPT.repeat(2, 1), "attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])}
    model = model_of()
    want = decode(model, given)[1]
    monkeypatch.setattr(DeCoRe, "attend", lambda self, call, inner: inner(call))
    patchattn.patch_model(model, "decore", heads=MASKED, alpha=alpha, rows=rows)
    torch.testing.assert_close(decode(model, given)[1], want, rtol=1e-5, atol=1e-5)


def test_the_worked_example() -> None:
    """p = (1/2, 1/4, 1/4) with an entropy of 1.0397 nats, against (1/4, 1/2, 1/4)."""
    model = patchattn.patch_model(model_of(), "decore", heads=MASKED)
    variant = next(iter(active_chains(model).values())).variants()["decore"]
    base, masked = (torch.tensor([[p]]).log() + shift for p, shift in (([0.5, 0.25, 0.25], 3), ([0.25, 0.5, 0.25], -1)))
    found = variant.combine(base, [masked]).softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[[0.7345, 0.0869, 0.1786]]]), rtol=0, atol=5e-5)


def test_it_is_on_the_layers_of_its_heads_alone() -> None:
    model = patchattn.patch_model(model_of(), "decore", heads={1: [2]})
    assert [patch.sites for patch in applied_patches(model)] == [("model.layers.1.self_attn",)]
    assert patchattn.variant_info("decore").configure({"preset": "released_code"}).mask == "query"


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="needs heads to mask"):
        patchattn.patch_model(model_of(), "decore")
    with pytest.raises(ValueError, match="counted from 0"):
        patchattn.patch_model(model_of(), "decore", heads={1: [4]})
    with pytest.raises(ValueError, match="leave out alpha, or them"):
        DeCoReConfig(heads=MASKED, alpha=0.5, alpha_cap=1.0)
