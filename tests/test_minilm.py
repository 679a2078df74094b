"""MiniLM's losses against loops over sequences, heads and tokens in float64."""

from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.training.minilm import attention_streams, minilm_loss

from .families import FAMILIES
from .reference import DIM, HEADS, KV_HEADS, rotate, tiny_llama

IDS = torch.tensor([[3, 7, 1, 9, 22, 5], [8, 2, 4, 30, 11, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
PLACES = (MASK.cumsum(-1) - 1).clamp(min=0)


def softmax(scores: list[float]) -> np.ndarray:
    powers = np.exp(np.array(scores) - max(scores))
    return powers / powers.sum()


def divergence(teacher: np.ndarray, student: np.ndarray) -> float:
    return float(sum(p * np.log(p / q) for p, q in zip(teacher, student, strict=True)))


def relation(stream: np.ndarray, heads: int) -> np.ndarray:
    """`(heads, T, T)` of one sequence's real tokens `(T, W)`."""
    size = stream.shape[1] // heads
    found = []
    for head in range(heads):
        part = stream[:, head * size : (head + 1) * size]
        found.append([softmax([x @ y / np.sqrt(size) for y in part]) for x in part])
    return np.array(found)


def captured(model: Any, before: bool) -> dict[str, np.ndarray]:
    """`(B, T, W)` queries, keys and values of the last layer, from hooks and transformers' own rotation."""
    seen: dict[str, torch.Tensor] = {}
    attention = model.model.layers[-1].self_attn
    handles = [
        getattr(attention, f"{n[0]}_proj").register_forward_hook(lambda _m, _a, out, n=n: seen.__setitem__(n, out))
        for n in ("query", "key", "value")
    ]
    with torch.no_grad():
        model(IDS, attention_mask=MASK, position_ids=PLACES)
    for handle in handles:
        handle.remove()
    found = {name: stream.numpy() for name, stream in seen.items()}
    if not before:
        for name, heads in (("query", HEADS), ("key", KV_HEADS)):
            turned = found[name].reshape(2, 6, heads, DIM).copy()
            for b, t, h in np.ndindex(2, 6, heads):
                turned[b, t, h] = rotate(turned[b, t, h], int(PLACES[b, t]))
            found[name] = turned.reshape(2, 6, -1)
    return found


def recorded(model: Any, **how: Any) -> Any:
    with attention_streams(model, **how) as streams:
        model(IDS, attention_mask=MASK, position_ids=PLACES)
    return streams


@pytest.mark.parametrize("rotary", ["after", "before"])
@pytest.mark.parametrize(("heads", "weights"), [(None, (1 / 3, 1 / 3, 1 / 3)), (2, (0.5, 0.0, 2.0)), (16, (1, 1, 1))])
def test_v2(heads: int | None, weights: tuple[float, float, float], rotary: Any) -> None:
    student, teacher = tiny_llama(1, num_hidden_layers=2), tiny_llama(2, num_hidden_layers=1)
    found = [recorded(model, rotary=rotary) for model in (student, teacher)]
    got = minilm_loss(*found, relation_heads=heads, weights=weights)
    ours, theirs = (captured(model, rotary == "before") for model in (student, teacher))
    count, total = heads or HEADS, 0.0
    for name, weight in zip(("query", "key", "value"), weights, strict=True):
        for row in range(2):
            real = MASK[row].bool().numpy()
            pairs = zip(relation(theirs[name][row][real], count), relation(ours[name][row][real], count), strict=True)
            rows = [divergence(p, q) for one, other in pairs for p, q in zip(one, other, strict=True)]
            total += weight * sum(rows) / (count * real.sum()) / 2
    assert total > 0.01
    np.testing.assert_allclose(float(got.detach()), total, rtol=1e-6)


def test_v1() -> None:
    student, teacher = tiny_llama(1, num_hidden_layers=2), tiny_llama(2, num_hidden_layers=1)
    got = minilm_loss(recorded(student), recorded(teacher), version="v1")
    ours, theirs = (captured(model, False) for model in (student, teacher))
    total = 0.0
    for row in range(2):
        real = MASK[row].bool().numpy()
        length, rows = int(real.sum()), []
        for head in range(HEADS):
            for i in range(length):
                shares = []
                for streams in (theirs, ours):
                    query = streams["query"][row][real].reshape(length, HEADS, DIM)[i, head]
                    keys = streams["key"][row][real].reshape(length, KV_HEADS, DIM)[: i + 1, head // 2]
                    shares.append(softmax([query @ key / np.sqrt(DIM) for key in keys]))
                rows.append(divergence(*shares))
        total += sum(rows) / (HEADS * length) / 2
        pairs = zip(*(relation(streams["value"][row][real], KV_HEADS) for streams in (theirs, ours)), strict=True)
        values = [divergence(p, q) for one, other in pairs for p, q in zip(one, other, strict=True)]
        total += sum(values) / (KV_HEADS * length) / 2
    np.testing.assert_allclose(float(got.detach()), total, rtol=1e-6)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_student_like_its_teacher_has_no_loss_and_learns_nothing(version: Any) -> None:
    student, teacher = tiny_llama(1), tiny_llama(1)
    loss = minilm_loss(recorded(student), recorded(teacher), version=version)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12
    gradients = [p.grad for p in student.model.layers[0].self_attn.parameters() if p.grad is not None]
    assert gradients
    assert max(float(g.abs().max()) for g in gradients) < 1e-9
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_descending_the_loss_lowers_it_and_a_patched_student_learns(version: Any) -> None:
    student, teacher = patchattn.patch_model(tiny_llama(1), "ssa"), tiny_llama(2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = minilm_loss(recorded(student), recorded(teacher), version=version)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_what_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="3 relation heads do not divide the width 32 of the query"):
        minilm_loss(recorded(model), recorded(model), relation_heads=3)
    with pytest.raises(ValueError, match="32 relation heads do not divide the width 16 of the key"):
        minilm_loss(recorded(model), recorded(model), relation_heads=32)
    other = tiny_llama(num_key_value_heads=4)
    with pytest.raises(ValueError, match="2 value heads and the teacher 4"):
        minilm_loss(recorded(model), recorded(other), version="v1")
    with pytest.raises(ValueError, match="version must be"):
        minilm_loss(recorded(model), recorded(model), version="v3")  # type: ignore[arg-type]
    with attention_streams(model) as empty, pytest.raises(ValueError, match="No attention was recorded"):
        minilm_loss(empty, empty)
    with attention_streams(model) as short:
        model(IDS[:, :3])
    with pytest.raises(ValueError, match="must see the same tokens, got 2 x 6 and 2 x 3"):
        minilm_loss(recorded(model), short)
    with pytest.raises(ValueError, match="0 attention modules in layer 5"), attention_streams(model, 5):
        pass
    fused = attention_streams(FAMILIES["gpt2"].make(), rotary="before")
    with pytest.raises(NotImplementedError, match="no projection of its own"), fused:
        pass
