"""FocusICL: against readings of each batch written out in float64, one softmax each, which are then merged."""

from typing import Any

import numpy as np
import pytest
import torch

import patchattn

from .families import FAMILIES
from .pieces import check_second_turn, in_chunks
from .reference import DIM, HEADS, KV_HEADS, layer_in_and_out, rotate, tiny_llama

IDS = torch.randint(3, 50, (16,), generator=torch.Generator().manual_seed(6))
PREFIX, DEMONSTRATIONS, REST = 2, [(2, 5), (5, 10), (10, 12)], 12
SPANS: list[list[Any]] = [["prefix", 0, 2], *(["demonstration", *one] for one in DEMONSTRATIONS)]


def by_loops(module: Any, inputs: np.ndarray, size: int, trivial: float) -> np.ndarray:
    """Output `(T, E)` of a layer for one sequence `(T, E)`, batches having `size` demonstrations."""
    groups = [DEMONSTRATIONS[start : start + size] for start in range(0, len(DEMONSTRATIONS), size)]
    batches = [range(group[0][0], group[-1][1]) for group in groups]
    behind = PREFIX + max(map(len, batches)) - REST
    places = {token: token for token in range(PREFIX)} | {token: behind + token for token in range(REST, len(inputs))}
    places |= {token: PREFIX + number for batch in batches for number, token in enumerate(batch)}
    weights = {name: getattr(module, f"{name}_proj").weight.detach().numpy() for name in "qkvo"}
    queries, keys, values = ((inputs @ weights[name].T).reshape(len(inputs), -1, DIM) for name in "qkv")
    rows = []
    for row in range(len(inputs)):
        heads = []
        for head in range(HEADS):
            own = head // (HEADS // KV_HEADS)
            logit = {
                key: rotate(queries[row, head], places[row] - places[key]) @ keys[key, own] / DIM**0.5
                for key in range(row + 1)
            }
            read = [batch for batch in batches if row >= REST or row in batch] or [range(0)]
            dropped: list[int] = []
            if row >= REST:
                context = sorted(range(PREFIX, REST), key=lambda key, logit=logit: logit[key])
                dropped = context[: int(trivial * len(context) + 1e-9)]
            readings, sums = [], []
            for batch in read:  # a prompt of its own: prefix, batch, what follows
                seen = [
                    key
                    for key in logit
                    if (key < PREFIX or key in batch or (row >= REST <= key)) and key not in dropped
                ]
                exponentials = np.exp([logit[key] for key in seen])
                sums.append(exponentials.sum())
                readings.append(exponentials @ values[seen, own] / sums[-1])
            heads.append(np.array(sums) @ readings / np.sum(sums))
        rows.append(weights["o"] @ np.concatenate(heads))
    return np.stack(rows)


@pytest.mark.parametrize(("batch", "trivial"), [(1, 0.0), (1, 0.3), (2, 0.45), (None, 0.6)])
def test_the_formula(batch: int | None, trivial: float) -> None:
    model = patchattn.patch_model(tiny_llama(), "focus_icl", spans=SPANS, batch=batch, trivial=trivial)
    inputs, found = layer_in_and_out(model, IDS[None])
    module = model.model.layers[0].self_attn
    expected = by_loops(module, inputs[0], batch or len(DEMONSTRATIONS), trivial)
    np.testing.assert_allclose(found[0], expected, atol=2e-6)  # the model's angles are float32
    plain = by_loops(module, inputs[0], len(DEMONSTRATIONS), 0.0)
    assert np.abs(plain - expected)[REST:].max() > 1e-3


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["llama"].make_exact()


def arranged(order: list[int]) -> tuple[torch.Tensor, list[list[Any]]]:
    """The text with demonstrations in another order, and its spans."""
    parts, spans, start = [IDS[:PREFIX]], [SPANS[0]], PREFIX
    for first, end in (DEMONSTRATIONS[number] for number in order):
        parts.append(IDS[first:end])
        spans.append(["demonstration", start, start + end - first])
        start += end - first
    return torch.cat([*parts, IDS[REST:]])[None], spans


def test_batches_of_one_are_in_no_order(model: Any) -> None:
    found = []
    with patchattn.patched(model, "focus_icl", batch=1, trivial=0.3), torch.no_grad():
        for order in ([0, 1, 2], [2, 0, 1]):
            ids, spans = arranged(order)
            with patchattn.marked(model, [spans]):
                found.append(model(ids).logits[0, REST:])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [3, None])
def test_one_batch_with_nothing_trivial_is_the_model_itself(model: Any, batch: int | None) -> None:
    with torch.no_grad():
        plain = model(IDS[None]).logits
        with patchattn.patched(model, "focus_icl", spans=SPANS, batch=batch, trivial=0.0):
            torch.testing.assert_close(model(IDS[None]).logits, plain, rtol=1e-6, atol=1e-6)


def test_padding_chunks_and_a_second_turn(model: Any) -> None:
    """A batch of two orders with one and two batches, one padded by four, rotated by column."""
    (one, spans), (other, moved) = arranged([0, 1, 2]), arranged([1, 2, 0])
    moved = [moved[0], ["demonstration", 2, 9], moved[3]]
    padded = torch.cat([torch.nn.functional.pad(one, (4, 0)), torch.cat([other, IDS[None, :4]], dim=1)])
    mask = (padded > 0).long()
    with patchattn.patched(model, "focus_icl", batch=1, trivial=0.3), torch.no_grad():
        expected = []
        for ids, own in ((one, spans), (padded[1:], moved)):
            with patchattn.marked(model, [own]):
                expected.append(model(ids).logits[0])
        with patchattn.marked(model, [spans, moved]):
            found = model(padded, attention_mask=mask).logits
            chunks = in_chunks(model, padded, mask, (3, 8, *[1] * 3, 6))
            how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            check_second_turn(model, padded, mask, **how)
    for logits in (found, chunks):
        torch.testing.assert_close(logits[0, 4:], expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logits[1], expected[1], rtol=1e-6, atol=1e-6)


def test_what_is_refused() -> None:
    for family, says in (
        ("gpt2", "are learned"),
        ("bert", "does not support bidirectional"),
        ("mistral", "sliding window"),
        ("gemma2", "sliding window"),
    ):
        with pytest.raises(NotImplementedError, match=says):
            patchattn.patch_model(FAMILIES[family].make(), "focus_icl", batch=1)
    llama = FAMILIES["llama"].make()
    for settings in ({"trivial": 1.0}, {"trivial": -0.1}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            patchattn.patch_model(llama, "focus_icl", settings)
    with pytest.raises(ValueError, match="are in none"):
        patchattn.patch_model(llama, "focus_icl", spans=[["demonstration", 0, 2], ["demonstration", 3, 5]])
    assert not any(site["variants"] for site in patchattn.patch_info(llama).sites)
