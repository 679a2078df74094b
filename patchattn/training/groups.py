"""Optimizer groups: parameters of variants that need a learning rate of their own."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..core.variant import Variant


def optimizer_groups(
    model: nn.Module, learning_rate: float, *, scale_learning_rate: float = 1e-2, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Trainable parameters for an optimizer, those that variants call fast in a group of their own.

    Such a parameter, as SSA's alpha, has to travel several units, where the entries of a matrix move by hundredths.

    Args:
        model: a model of which some parameters are trainable.
        learning_rate: of everything else.
        scale_learning_rate: of the variants' fast parameters; SSA's released code trains its own with 1e-2.
        weight_decay: of matrices; vectors, scalars and fast parameters are not decayed.

    Returns:
        Up to three groups, for example for `torch.optim.AdamW(groups)`; empty ones are left out.

    Raises:
        ValueError: nothing is trainable.
    """
    fast = fast_parameters(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"No parameter of this {type(model).__name__} is trainable.")
    rest = [p for p in trained if id(p) not in fast]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "lr": learning_rate, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in fast], "lr": scale_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def move_fast_parameters(optimizer: Optimizer, model: nn.Module, scale_learning_rate: float) -> None:
    """Put the fast parameters of an optimizer that has not stepped yet into a group of their own.

    Raises:
        ValueError: no variant has any that is trained.
    """
    fast = fast_parameters(model)
    moved: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        moved += [p for p in group["params"] if id(p) in fast]
        group["params"] = [p for p in group["params"] if id(p) not in fast]
    if not moved:
        raise ValueError(
            "A learning rate is given for the scales of variants, but no variant of the model has any that is trained."
        )
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    optimizer.add_param_group({"params": moved, "lr": scale_learning_rate, "weight_decay": 0.0})


def fast_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that the model's variants call fast."""
    return {id(p) for module in model.modules() if isinstance(module, Variant) for p in module.fast_parameters()}
