"""Function vectors against the weights of a model, and effects of heads against plain hooks, one text at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchattn
from patchattn.core.head_vectors import HeadVectors
from patchattn.inspection.head_means import head_means
from patchattn.inspection.task_vectors import function_vector, indirect_effects

from .reference import DIM, HEADS, WIDTH, tiny_llama
from .test_task_vectors import MASK, PROMPT, ROWS, behind, padded

ANSWERS = [5, 17]


def with_biases(layers: int = 2) -> nn.Module:
    """Whose output projections have one."""
    model = tiny_llama(num_hidden_layers=layers, attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_the_vector_is_what_the_heads_write() -> None:
    model = with_biases()
    means = head_means(model, [padded("left")], rows="last")
    chosen = {0: [1, 3], 1: [0]}
    found = function_vector(model, means, chosen, layer=1)
    want = np.zeros(WIDTH)
    for layer, heads in chosen.items():
        weight = model.model.layers[layer].self_attn.o_proj.weight.detach().numpy()
        for head in heads:
            want += weight[:, head * DIM : (head + 1) * DIM] @ np.array(means.vectors[layer][head])
    assert list(found.vectors) == [1]
    np.testing.assert_allclose(found.vectors[1], want, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="no layer 5"):
        function_vector(model, means, chosen, layer=5)
    with pytest.raises(ValueError, match="counted from 0"):
        function_vector(model, means, {0: [9]}, layer=1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_effects_are_differences_of_likelihoods(side: str) -> None:
    model = with_biases()
    generator = torch.Generator().manual_seed(2)
    drawn = {
        layer: {head: torch.randn(DIM, generator=generator).tolist() for head in range(HEADS)} for layer in range(2)
    }
    means = HeadVectors.parse(drawn)
    found = indirect_effects(model, [padded(side)], [ANSWERS], means)
    for layer, head in np.ndindex(2, HEADS):
        mean = torch.tensor(drawn[layer][head], dtype=torch.float64)

        def put_in(module: nn.Module, args: Any, head: int = head, mean: torch.Tensor = mean) -> Any:
            states = args[0].clone()
            states[0, -1, head * DIM : (head + 1) * DIM] = mean
            return (states,)

        effects = []
        for tokens, answer in zip(ROWS, ANSWERS, strict=True):
            with torch.no_grad():
                before = model(torch.tensor([tokens])).logits[0, -1].softmax(-1)[answer]
                handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(put_in)
                after = model(torch.tensor([tokens])).logits[0, -1].softmax(-1)[answer]
                handle.remove()
            effects.append(float(after - before))
        got = found.sites[f"model.layers.{layer}.self_attn"].scores[head]
        np.testing.assert_allclose(got, np.mean(effects), rtol=1e-7, atol=1e-10)
    table = np.array([site.scores for site in found.sites.values()])
    best = np.unravel_index(table.argmax(), table.shape)
    assert found.highest(1).heads == {int(best[0]): (int(best[1]),)}
    with pytest.raises(ValueError, match="1 answers for 2 sequences"):
        indirect_effects(model, [padded(side)], [[1]], means)


def test_it_is_added_at_the_prompts_last_token_and_at_every_step() -> None:
    """Against one forward with a hook over all of the text."""
    model = with_biases(3)
    vector = torch.linspace(-2, 1, WIDTH, dtype=torch.float64)
    how: Any = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with patchattn.patched(model, "function_vectors", vectors={1: vector.tolist()}, strength=1.5):
        found = model.generate(PROMPT, attention_mask=MASK, pad_token_id=0, **how)

    def add(hidden: torch.Tensor) -> torch.Tensor:
        new = hidden.clone()
        new[:, 4:] += 1.5 * vector
        return new

    mask = torch.cat([MASK, torch.ones(2, 3, dtype=torch.long)], dim=1)
    handle = behind(model, 1, add)
    with torch.no_grad():
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        want = model(found.sequences[:, :-1], attention_mask=mask, position_ids=place).logits[:, 4:]
    handle.remove()
    torch.testing.assert_close(torch.stack(found.logits, 1).double(), want, rtol=1e-5, atol=1e-5)


def test_a_vector_of_zeros_changes_nothing() -> None:
    model = tiny_llama(num_hidden_layers=2)
    with torch.no_grad():
        plain = model(PROMPT, attention_mask=MASK).logits
        patchattn.patch_model(model, "function_vectors", vectors={0: [0.0] * WIDTH})
        assert torch.equal(model(PROMPT, attention_mask=MASK).logits, plain)
