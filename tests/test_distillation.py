"""The distillation loss against numpy."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from patchattn.training import distillation_loss

from .experts import softmax


def rows(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def result(seed: int, states: int = 3, classes: int = 3) -> Any:
    hidden = tuple(rows(2, 4, 5, seed=seed + i) for i in range(states))
    return tf.modeling_outputs.SequenceClassifierOutput(logits=rows(2, classes, seed=seed + 9), hidden_states=hidden)


@pytest.mark.parametrize("masked", [True, False])
def test_distillation_loss(masked: bool) -> None:
    student, teacher = result(1), result(50)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]) if masked else None
    real = np.ones((2, 4), bool) if mask is None else mask.numpy().astype(bool)
    ours, theirs = ([h.numpy() for h in one.hidden_states] for one in (student, teacher))
    layer = np.mean([((ours[i] - theirs[i])[real] ** 2).mean() for i in (1, 2)])
    p, q = (softmax(one.logits.numpy() / 2.0) for one in (teacher, student))
    divergence = (p * (np.log(p) - np.log(q))).sum(-1).mean()
    got = distillation_loss(student, teacher, mask, layer_weight=0.7, logit_weight=0.2, temperature=2.0)
    assert float(got) == pytest.approx(0.7 * layer + 0.2 * 4.0 * divergence, rel=1e-5)
    last = ((ours[1] - theirs[2])[real] ** 2).mean()
    got = distillation_loss(student, teacher, mask, layers=[(1, 2)], logit_weight=0.0)
    assert float(got) == pytest.approx(last, rel=1e-5)
    one, other = result(1, classes=1), result(50, classes=1)
    expected = ((one.logits - other.logits).numpy() ** 2).mean()
    assert float(distillation_loss(one, other, layer_weight=0.0)) == pytest.approx(expected, rel=1e-5)


def test_distillation_reaches_the_student_alone() -> None:
    student, teacher = result(1), result(50)
    for one in (student, teacher):
        for tensor in (*one.hidden_states, one.logits):
            tensor.requires_grad_()
    distillation_loss(student, teacher).backward()
    assert all(tensor.grad is None for tensor in (*teacher.hidden_states, teacher.logits, student.hidden_states[0]))
    assert all(tensor.grad is not None for tensor in (*student.hidden_states[1:], student.logits))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer_weight": -1.0}, "weights of at least 0"),
        ({"temperature": 0.0}, "a temperature above 0"),
        ({"layer_weight": 0.0, "logit_weight": 0.0}, "nothing to distil"),
        ({"layers": []}, "layers is empty"),
        ({"teacher": result(1, states=4)}, "say with layers="),
        ({"teacher": result(1, classes=2)}, r"Expected logits \(B, C\)"),
        ({"teacher": tf.modeling_outputs.BaseModelOutput()}, "output_hidden_states=True"),
    ],
)
def test_distillation_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation_loss(result(1), arguments.pop("teacher", result(50)), **arguments)
