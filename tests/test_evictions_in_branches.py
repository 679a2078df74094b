"""Decoding with a second branch while keys are dropped: both branches drop theirs, each as a model alone would."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument, find_cache
from patchattn.decoding.text import context_spans

from .behaviour import Case, cases
from .evictions import stored
from .families import FAMILIES

APART = {"duo"}  # stores heads apart, for which one variant must be alone
FIRST = pytest.mark.parametrize(
    "case",
    [case for case in cases("cache") if not case.example and not (case.variant in APART or case.refusal("llama"))],
    ids=str,
)
STEPS = 6
SPANS = [(2, 6), (1, 3)]
LENGTHS = [12, 9]
MASKED = {0: [1], 1: [0, 3]}
HOW: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": STEPS}


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[int(place >= 12 - length) for place in range(12)] for length in LENGTHS])
    return ids * mask, mask


def model_of(case: Case, order: list[str], settings: dict[str, Any]) -> Any:
    model = FAMILIES["llama"].make_exact()
    given = {case.variant: dict(case.settings), **settings}
    for name in order:
        patchattn.patch_model(model, name, given[name])
    return model


@torch.no_grad()
def forced(model: Any, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`(STEPS, V)` logits behind a prompt `(T,)` and each of some tokens `(STEPS,)` but the last."""
    cache = DynamicCache()
    parts = [prompt[None], *tokens[:-1, None, None]]
    return torch.cat([model(part, **cache_argument(model, cache)).logits[0, -1:] for part in parts])


def decoded(model: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    found = model.generate(**given, **HOW, return_dict_in_generate=True, output_logits=True)
    return found.sequences[:, -STEPS:], torch.stack(found.logits, dim=1), find_cache(found.values())


def forgotten(cache: Any) -> list[float]:
    """By layer, how many columns are stored no longer."""
    layers = [layer for layer in cache.layers if layer.keys.shape[-1] > 1]  # without those of which tokens are real
    return [layer.get_seq_length() - stored(layer) for layer in layers]


@pytest.mark.parametrize("is_outer", [True, False], ids=["outer", "inner"])
@FIRST
def test_cad_contrasts_two_models_that_forget(case: Case, is_outer: bool) -> None:
    order = ["cad", case.variant] if is_outer else [case.variant, "cad"]
    (ids, mask), alpha = prompts(), 1.0
    with context_spans(SPANS):
        tokens, logits, cache = decoded(
            model_of(case, order, {"cad": {"alpha": alpha}}), input_ids=ids, attention_mask=mask
        )
    alone = model_of(case, [case.variant], {})
    for row, (length, (start, stop)) in enumerate(zip(LENGTHS, SPANS, strict=True)):
        prompt = ids[row, 12 - length :]
        bare = torch.cat([prompt[:start], prompt[stop:]])
        full, less = (forced(alone, text, tokens[row]) for text in (prompt, bare))
        torch.testing.assert_close(logits[row].double(), (1 + alpha) * full - alpha * less, rtol=1e-5, atol=1e-5)
    assert len(forgotten(cache)) == 4
    assert all(forgotten(cache))


@FIRST
def test_decore_contrasts_two_models_that_forget(case: Case) -> None:
    order = ["decore", case.variant]
    (ids, mask), alpha = prompts(), 1.5
    decore = {"heads": MASKED, "rows": "all", "alpha": alpha}
    tokens, logits, cache = decoded(model_of(case, order, {"decore": decore}), input_ids=ids, attention_mask=mask)
    alone, masked = (model_of(case, [case.variant], {}) for _ in range(2))
    for number, layer in enumerate(masked.model.layers):

        def zeroed(module: Any, args: Any, number: int = number) -> tuple[torch.Tensor]:
            heads = args[0].clone().unflatten(-1, (4, -1))
            heads[:, :, MASKED[number]] = 0.0
            return (heads.flatten(-2),)

        layer.self_attn.o_proj.register_forward_pre_hook(zeroed)
    for row, length in enumerate(LENGTHS):
        full, less = (forced(model, ids[row, 12 - length :], tokens[row]) for model in (alone, masked))
        torch.testing.assert_close(logits[row].double(), (1 + alpha) * full - alpha * less, rtol=1e-5, atol=1e-5)
    assert len(forgotten(cache)) == 4
    assert all(forgotten(cache))


@FIRST
def test_a_second_branch_of_beams_and_of_the_last_row(case: Case) -> None:
    """Beams have the scores of their own tokens; a branch that takes over a prompt's keys elsewhere computes them."""
    ids, mask = prompts()
    model = model_of(case, ["decore", case.variant], {"decore": {"heads": MASKED, "rows": "last", "alpha": 1.0}})
    given = {"input_ids": ids, "attention_mask": mask}
    how = {**HOW, "return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0, "num_beams": 3}
    beams = model.generate(**given, **how)
    tokens, cache, total = beams.sequences[:, 12:], DynamicCache(), 0.0
    for step in range(STEPS):
        new = ids if step == 0 else tokens[:, step - 1 : step]
        seen = torch.cat([mask, torch.ones(2, step, dtype=torch.long)], dim=1)
        places = (seen.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        with torch.no_grad():
            found = model(
                new, attention_mask=seen, position_ids=places, logits_to_keep=1, **cache_argument(model, cache)
            ).logits[:, -1]
        total = total + found.log_softmax(-1).gather(-1, tokens[:, step : step + 1])[:, 0]
    torch.testing.assert_close(beams.sequences_scores.double(), total.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cad", "decore"])
def test_a_second_branch_is_refused_where_heads_are_apart(name: str) -> None:
    case = next(case for case in cases("cache") if case.variant == "duo")
    settings = {"cad": {}, "decore": {"heads": MASKED, "rows": "all"}}
    (ids, mask), model = prompts(), model_of(case, ["duo", name], settings)
    with context_spans(SPANS), pytest.raises(NotImplementedError, match=f"heads apart, and the variants .*'{name}'"):
        model.generate(ids, attention_mask=mask, **HOW)
