"""APE: against pieces that the plain model encodes alone, and against its formula written out in float64."""

from typing import Any

import numpy as np
import pytest
import torch

import patchattn

from .families import FAMILIES
from .pieces import check_second_turn, encoded, in_chunks
from .reference import DIM, HEADS, KV_HEADS, layer_in_and_out, rotate, tiny_llama

IDS = torch.randint(3, 60, (16,), generator=torch.Generator().manual_seed(6))
PREFIX, PIECES, REST = 2, [(2, 5), (5, 10), (10, 12)], 12
SPANS: list[list[Any]] = [["prefix", 0, 2], *(["document", *piece] for piece in PIECES)]
PLACES = [0, 1, *(2 + t for start, end in PIECES for t in range(end - start)), *range(7, 11)]


def sees(row: int, key: int) -> bool:
    own = next((piece for piece in PIECES if piece[0] <= row < piece[1]), None)
    return key <= row and (row >= REST or key < PREFIX or (own is not None and key >= own[0]))


def by_loops(module: Any, inputs: np.ndarray, temperature: float, scale: float) -> np.ndarray:
    """Output `(T, E)` of a layer for one sequence `(T, E)`: two softmaxes for what follows the pieces, then weighed."""
    weights = {name: getattr(module, f"{name}_proj").weight.detach().numpy() for name in "qkvo"}
    queries, keys, values = ((inputs @ weights[name].T).reshape(len(inputs), -1, DIM) for name in "qkv")
    rows = []
    for row in range(len(inputs)):
        heads = []
        for head in range(HEADS):
            own = head // (HEADS // KV_HEADS)
            logits = {
                key: rotate(queries[row, head], PLACES[row] - PLACES[key]) @ keys[key, own] / DIM**0.5
                for key in range(row + 1)
                if sees(row, key)
            }
            context = {key: s / temperature for key, s in logits.items() if row >= REST and PREFIX <= key < REST}
            others = {key: s for key, s in logits.items() if key not in context}
            groups = [(others, np.log(np.sum(np.exp(list(others.values())))))]
            if context:
                groups.append((context, np.log(np.sum(np.exp(list(context.values()))))))
            share = [np.exp(groups[0][1]), *(np.exp(scale * temperature * lse) for _, lse in groups[1:])]
            heads.append(
                sum(
                    part / sum(share) * sum(np.exp(s - lse) * values[key, own] for key, s in group.items())
                    for part, (group, lse) in zip(share, groups, strict=True)
                )
            )
        rows.append(weights["o"] @ np.concatenate(heads))
    return np.stack(rows)


@pytest.mark.parametrize(("temperature", "scale"), [(0.5, 0.8), (1.0, 0.6), (1.7, 1.0)])
def test_the_formula(temperature: float, scale: float) -> None:
    settings = {"spans": SPANS, "temperature": temperature, "scale": scale}
    model = patchattn.patch_model(tiny_llama(), "ape", settings)
    inputs, found = layer_in_and_out(model, IDS[None] % 50)
    expected = by_loops(model.model.layers[0].self_attn, inputs[0], temperature, scale)
    np.testing.assert_allclose(found[0], expected, atol=2e-6)  # the model's angles are float32
    plain = by_loops(model.model.layers[0].self_attn, inputs[0], 1.0, 1.0)
    assert np.abs(plain - expected)[REST:].max() > 1e-3


def alone(model: Any, order: list[int]) -> torch.Tensor:
    """Logits of the rest behind pieces that the plain model encoded each behind the prefix."""
    _, prefix = encoded(model, IDS[:PREFIX], 0)
    pieces = [encoded(model, IDS[start:end], PREFIX, [prefix])[1] for start, end in (PIECES[i] for i in order)]
    return encoded(model, IDS[REST:], 7, [prefix, *pieces])[0]


def arranged(order: list[int]) -> tuple[torch.Tensor, list[list[Any]]]:
    """The text with pieces in another order, and its spans."""
    parts, spans, start = [IDS[:PREFIX]], [SPANS[0]], PREFIX
    for first, end in (PIECES[i] for i in order):
        parts.append(IDS[first:end])
        spans.append(["document", start, start + end - first])
        start += end - first
    return torch.cat([*parts, IDS[REST:]])[None], spans


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["llama"].make_exact()


@pytest.mark.parametrize("variant", ["ape", "parallel_context"])
def test_pieces_that_are_encoded_alone(model: Any, variant: str) -> None:
    expected = alone(model, [0, 1, 2])
    settings = {"temperature": 1.0, "scale": 1.0} if variant == "ape" else {}
    with patchattn.patched(model, variant, {"spans": SPANS, **settings}), torch.no_grad():
        found = model(IDS[None]).logits[0, REST:]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found - encoded(model, IDS, 0)[0][REST:]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("variant", "settings"),
    [("ape", {"temperature": 0.6, "scale": 0.8}), ("parallel_context", {}), ("parallel_context", {"top": 2})],
)
def test_permuting_pieces_leaves_what_follows(model: Any, variant: str, settings: dict[str, Any]) -> None:
    found = []
    with patchattn.patched(model, variant, settings), torch.no_grad():
        for order in ([0, 1, 2], [2, 0, 1]):
            ids, spans = arranged(order)
            with patchattn.marked(model, [spans]):
                found.append(model(ids).logits[0, REST:])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "settings"), [("ape", {"temperature": 0.6, "scale": 0.8}), ("parallel_context", {"top": 1})]
)
def test_padding_chunks_and_a_second_turn(model: Any, variant: str, settings: dict[str, Any]) -> None:
    """A batch of two orders, one padded by four, rotated by column."""
    (one, spans), (other, moved) = arranged([0, 1, 2]), arranged([1, 2, 0])
    padded = torch.cat([torch.nn.functional.pad(one, (4, 0)), torch.cat([other, IDS[None, :4]], dim=1)])
    mask = (padded > 0).long()
    with patchattn.patched(model, variant, settings), torch.no_grad():
        expected = []
        for ids, own in ((one, spans), (padded[1:], moved)):
            with patchattn.marked(model, [own]):
                expected.append(model(ids).logits[0])
        with patchattn.marked(model, [spans, moved]):
            found = model(padded, attention_mask=mask).logits
            chunks = in_chunks(model, padded, mask, (3, 8, *[1] * 3, 6))
            how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            check_second_turn(model, padded, mask, **how)
            beams = {**how, "attention_mask": mask, "num_beams": 2}
            assert torch.equal(model.generate(padded, **beams), model.generate(padded, use_cache=False, **beams))
    for logits in (found, chunks):
        torch.testing.assert_close(logits[0, 4:], expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logits[1], expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["ape", "parallel_context"])
def test_one_piece_is_the_model_itself(model: Any, variant: str) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "scale": 1.0} if variant == "ape" else {"top": 1}
    with torch.no_grad():
        plain = model(IDS[None]).logits
        for spans in ([["document", 0, 12]], [["prefix", 0, 2], ["document", 2, 12]]):
            with patchattn.patched(model, variant, {"spans": spans, **settings}):
                torch.testing.assert_close(model(IDS[None]).logits, plain, rtol=1e-6, atol=1e-6)


def test_what_is_refused() -> None:
    for family, says in (
        ("gpt2", "are learned"),
        ("bert", "does not support bidirectional"),
        ("mistral", "sliding window"),
    ):
        for variant in ("ape", "parallel_context"):
            with pytest.raises(NotImplementedError, match=says):
                patchattn.patch_model(FAMILIES[family].make(), variant)
