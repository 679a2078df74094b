"""Distillation: a patched model learns from the unpatched one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def distillation_loss(
    student: Any,
    teacher: Any,
    attention_mask: torch.Tensor | None = None,
    *,
    layers: Sequence[tuple[int, int]] | None = None,
    layer_weight: float = 1.0,
    logit_weight: float = 1.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """How far a student's layers and logits are from a teacher's.

    `layer_weight` times the mean squared error of hidden states over real tokens and width, mean over layers; plus
    `logit_weight` times `temperature^2 KL(teacher || student)` of the softmax of `logits / temperature`, mean over rows
    (of a single logit, a regression, the mean squared error).

    Args:
        student: output of a model on a batch, with `hidden_states` unless `layer_weight` is 0, and `logits` `(B, C)`
            unless `logit_weight` is 0.
        teacher: output of another on the same batch, likewise. Nothing goes back into it.
        attention_mask: `(B, T)`, 0 where hidden states are of padding; none without.
        layers: pairs of (index of the student's, index of the teacher's) hidden states to compare; by default all but
            the embeddings, which must then be equally many.
        layer_weight: of the part of hidden states.
        logit_weight: of the part of logits.
        temperature: of the softmaxes.

    Returns:
        A scalar with gradients.

    Raises:
        ValueError: an output lacks what is to be compared, shapes differ, or an argument is out of range.
    """
    if min(layer_weight, logit_weight) < 0 or not temperature > 0:
        raise ValueError(
            f"Expected weights of at least 0 and a temperature above 0, got {layer_weight}, {logit_weight} and "
            f"{temperature}."
        )
    parts = []
    if layer_weight:
        ours, theirs = (_of(output, "hidden_states", "output_hidden_states=True") for output in (student, teacher))
        if layers is None and len(ours) != len(theirs):
            raise ValueError(
                f"The student has {len(ours)} hidden states, the teacher {len(theirs)}: say with layers=... which "
                "belong together."
            )
        pairs = [(index, index) for index in range(1, len(ours))] if layers is None else list(layers)
        if not pairs:
            raise ValueError("layers is empty: name hidden states to compare, or pass layer_weight=0.")
        errors = [_layer_error(ours[own], theirs[other].detach(), attention_mask) for own, other in pairs]
        parts.append(layer_weight * torch.stack(errors).mean())
    if logit_weight:
        ours, theirs = (_of(output, "logits", "a model with a head") for output in (student, teacher))
        if ours.shape != theirs.shape or ours.dim() != 2:
            raise ValueError(f"Expected logits (B, C) of both, got {tuple(ours.shape)} and {tuple(theirs.shape)}.")
        parts.append(logit_weight * _logit_error(ours.float(), theirs.detach().float(), temperature))
    if not parts:
        raise ValueError("Both weights are 0; there is nothing to distil.")
    return torch.stack(parts).sum()


def _layer_error(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if student.shape != teacher.shape:
        raise ValueError(
            f"Hidden states of shapes {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared."
        )
    error = (student.float() - teacher.float()).square().mean(-1)  # (B, T)
    if mask is None:
        return error.mean()
    real = mask.to(error.dtype)
    return (error * real).sum() / real.sum().clamp(min=1)


def _logit_error(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    if student.shape[-1] == 1:
        return (student - teacher).square().mean()
    ours, theirs = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def _of(output: Any, name: str, how: str) -> Any:
    value = getattr(output, name, None)
    if value is None:
        raise ValueError(f"{type(output).__name__} has no {name} to compare: it needs {how}.")
    return value
