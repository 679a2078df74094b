"""examples/homer.py: one chunk is the model itself; what is dropped and merged is as written out."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .reference import tiny_llama

_SPEC = importlib.util.spec_from_file_location("homer", Path(__file__).parents[1] / "examples" / "homer.py")
assert _SPEC is not None
assert _SPEC.loader is not None
example: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["homer"] = example  # dataclasses look their module up
_SPEC.loader.exec_module(example)
IDS = torch.randint(3, 50, (30,), generator=torch.Generator().manual_seed(3))
PREFIX, CONTEXT, SUFFIX = IDS[:2], IDS[2:26], IDS[26:]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(num_hidden_layers=4, max_position_embeddings=64)


def test_one_chunk_is_the_model_itself(model: Any) -> None:
    read = example.homer(model, PREFIX, CONTEXT, SUFFIX, longest=30)
    with torch.no_grad():
        torch.testing.assert_close(read.logits, model(IDS[None]).logits[0, -1], rtol=1e-9, atol=1e-9)
        plain = model.generate(IDS[None], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert read.next_place == 30
    assert example.answer(model, read, 5) == plain[0, 30:].tolist()


def by_hand(model: Any, longest: int, warm_up: int) -> torch.Tensor:
    """Logits behind two chunks of four layers: leaves have those up to the middle, the root the others."""
    p, u, half = len(PREFIX), len(SUFFIX), len(CONTEXT) // 2
    layers, rotary = model.model.layers, model.model.rotary_emb
    per_level = (len(layers) - warm_up) // 2
    split = len(layers) - per_level
    leaves = []
    for part in (CONTEXT[:half], CONTEXT[half:]):
        ids = torch.cat([PREFIX, part, SUFFIX])[None]
        states = model(ids, output_hidden_states=True).hidden_states  # behind every layer
        module, inputs = layers[split - 1].self_attn, layers[split - 1].input_layernorm(states[split - 1])
        cos, sin = (table.double() for table in rotary(states[0], position_ids=torch.arange(p + half + u)[None]))

        def turned(x: torch.Tensor, cos: torch.Tensor = cos, sin: torch.Tensor = sin) -> torch.Tensor:
            x = x.view(x.shape[1], -1, 8)
            other = torch.cat([-x[..., 4:], x[..., :4]], dim=-1)
            return x * cos[0, :, None] + other * sin[0, :, None]

        query, key = turned(module.q_proj(inputs)), turned(module.k_proj(inputs))
        scores = [
            max(float(query[-1, head] @ key[token, head // 2]) for head in range(4)) for token in range(p, p + half)
        ]
        room = (longest - p - u) // 2
        kept = sorted(sorted(range(half), key=lambda token, scores=scores: -scores[token])[:room])
        leaves.append((states[split][0], [p + token for token in kept]))
    (one, first), (other, second) = leaves
    means = (one[:p] + other[:p]) / 2, (one[-u:] + other[-u:]) / 2
    hidden = torch.cat([means[0], one[first], other[second], means[1]])[None]
    places = torch.tensor([[*range(p), *first, *second, *range(p + half, p + half + u)]])
    tables = rotary(hidden, position_ids=places)
    for layer in layers[split:]:
        hidden = layer(hidden, position_ids=places, position_embeddings=tables)
    return model.lm_head(model.model.norm(hidden[:, -1]))[0]


@pytest.mark.parametrize(("longest", "warm_up"), [(20, 0), (22, 1)])
def test_two_chunks(model: Any, longest: int, warm_up: int) -> None:
    read = example.homer(model, PREFIX, CONTEXT, SUFFIX, longest=longest, warm_up=warm_up)
    with torch.no_grad():
        torch.testing.assert_close(read.logits, by_hand(model, longest, warm_up), rtol=1e-9, atol=1e-9)
    held = len(PREFIX) + 2 * ((longest - 6) // 2) + len(SUFFIX)
    assert [layer.keys.shape[2] for layer in read.cache.layers] == [held] * 4
    assert read.next_place == 2 + 12 + 4
    assert len(example.answer(model, read, 3)) == 3


def test_deeper_trees_and_biases(model: Any) -> None:
    """A bias that only far tokens have drops these first; a last chunk without a neighbour goes on alone."""
    near = torch.zeros(4, 64)
    near[:, 8:] = 1e6
    read = example.homer(model, PREFIX, CONTEXT[:21], SUFFIX, longest=14, warm_up=0, bias=near)
    assert read.cache.layers[0].keys.shape[2] <= 14
    plain = example.homer(model, PREFIX, CONTEXT[:21], SUFFIX, longest=14, warm_up=0)
    assert not torch.equal(read.logits, plain.logits)


def test_what_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="room for context"):
        example.homer(model, PREFIX, CONTEXT, SUFFIX, longest=7)
    with pytest.raises(ValueError, match="room for context"):
        example.homer(model, PREFIX, CONTEXT[:0], SUFFIX, longest=30)
    with pytest.raises(ValueError, match="need a layer each"):
        example.homer(model, PREFIX, CONTEXT, SUFFIX, longest=8, warm_up=2)
