"""What the demo measures of a model: accuracy, use of heads, speed, and whether undoing the patch is exact."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.patching import unpatch_model
from ..inspection.routing import routing_statistics
from .tasks import Batch, Task


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, batches: Sequence[Batch]) -> float:
    """Share of right answers."""
    scores = [task.score(model(**_inputs(batch)).logits, batch["labels"]) for batch in batches]
    return sum(right for right, _ in scores) / sum(count for _, count in scores)


@torch.no_grad()
def head_usage(model: nn.Module, batches: Sequence[Batch]) -> list[list[float]]:
    """Share of real tokens for which each head is on, per attention module; see `patchattn.routing_statistics`."""
    with routing_statistics(model) as statistics:
        for batch in batches:
            model(**_inputs(batch))
    return statistics.usage()


@torch.no_grad()
def tokens_per_second(models: Mapping[str, nn.Module], batch: Batch, rounds: int) -> dict[str, float]:
    """Median inference speed of each model, padding not counted.

    The models take turns, so that whatever else the machine does meets all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):  # the first round warms up
        for name, model in models.items():
            start = time.perf_counter()
            logits(model, batch)
            times[name].append(time.perf_counter() - start)
    tokens = int(_real_tokens(batch).sum())
    return {name: tokens / float(torch.tensor(taken[1:]).median()) for name, taken in times.items()}


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The model's output for a batch."""
    return model(**_inputs(batch)).logits


def undo(model: Any, *, is_patched: bool) -> nn.Module:
    """The base model again, out of the PeftModel that `add_lora` made around it."""
    model.delete_adapter("default")  # unload() alone would keep the trained head and variant
    base = model.unload()
    return unpatch_model(base) if is_patched else base


def _inputs(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "labels"}


def _real_tokens(batch: Batch) -> torch.Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
