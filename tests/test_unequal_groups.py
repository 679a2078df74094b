"""Variants behind surgery that leaves some kv heads more query heads than others."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn

from .behaviour import Case, accepted, close, decoded, text
from .families import FAMILIES, VOCABULARY, outputs

CASES = [case for case in accepted("llama", "attention", "cache") if case.variant != "prune"]
OUT = {0: [1, 5, 6, 7], 1: [4, 5, 6, 0]}  # of 8 query heads on 2 kv heads; they keep 3 and 1
# What they choose, keep or learn is of a kv head, for all query heads that share it.
OF_KV_HEADS = (
    *("a_vl", "adakv", "duo", "expected_attention", "h2o", "keydiff", "knorm", "pyramidkv", "snapkv", "think", "tova"),
    *("attention_bias", "cca", "differential", "dma", "meta_tokens", "mswa", "nosa", "nsa", "recycled", "squeezed"),
)
BY_SETTINGS = {"heads": ("edit", "value"), "hip": ("heads", "kv"), "lserve": ("heads", "kv"), "moba": ("heads", "kv")}
BY_DEFAULT = ("quest", "twilight")  # for kv heads, unless heads="query"
# Numbers of heads count, and parameters or draws by head: these are not those of the whole model, and need not be.
BY_NUMBER = ("act", "dex", "heads", "hyper", "longlora", "moh", "parallel_context", "fox")


def is_of_kv_heads(case: Case) -> bool:
    settings = dict(case.settings)
    if case.variant in BY_SETTINGS:
        name, value = BY_SETTINGS[case.variant]
        return settings.get(name) == value
    return case.variant in OF_KV_HEADS or (case.variant in BY_DEFAULT and settings.get("heads") != "query")


def pruned(case: Case, physical: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    settings = {"prune": {"heads": OUT, "physical": physical}, case.variant: dict(case.settings)}
    torch.manual_seed(0)
    return patchattn.patch_model(model, ["prune", case.variant], settings)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_of_kv_heads_is_refused_and_the_rest_is_that_of_masked_heads(case: Case) -> None:
    if is_of_kv_heads(case):
        with pytest.raises(NotImplementedError, match=f"'{case.variant}', with these .* kv heads that serve equally"):
            pruned(case, physical=True)
        return
    tokens = text(12)
    model, masked = pruned(case, True), pruned(case, False)
    cut, steps = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [7, 1, 3, 1])
    if case.variant not in BY_NUMBER:
        close(cut, outputs(masked, input_ids=tokens)[0])
        close(steps, decoded(masked, tokens, [7, 1, 3, 1]))


def test_surgery_behind_it_is_refused() -> None:
    settings: dict[str, Any] = {"prune": {"heads": {0: [1]}}, "gqa_convert": {"kv_heads": 1}}
    settings["flap"] = {"heads": {0: [0]}, "compensate": False}
    for other in ("gqa_convert", "flap"):
        model = FAMILIES["llama"].make()
        before = outputs(model, **FAMILIES["llama"].inputs())[0]
        with pytest.raises(
            NotImplementedError, match=f"'{other}', with these .* 'prune' leaves some of model.layers.0"
        ):
            patchattn.patch_model(model, ["prune", other], {name: settings[name] for name in ("prune", other)})
        assert torch.equal(before, outputs(model, **FAMILIES["llama"].inputs())[0])


def test_heads_that_are_masked_keep_their_numbers() -> None:
    """Behind `flap` heads have other numbers than `prune` was given."""
    settings = {"prune": {"heads": {0: [1]}, "physical": False}, "flap": {"heads": {0: [0]}, "compensate": False}}
    model = patchattn.patch_model(FAMILIES["llama"].make(), ["prune", "flap"], settings)
    with pytest.raises(NotImplementedError, match=r"masks some of 4 heads of model\.layers\.0"):
        outputs(model, **FAMILIES["llama"].inputs())
