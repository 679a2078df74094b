"""Training of one patched model: LoRA, the variant's own parameters and a new head."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..core.host import find_sites
from .tasks import Batch, Task

_WARMUP = 0.1  # share of the steps
_CLIP = 1.0  # largest gradient norm
SCALE_LR = 1e-2  # of variants' scales, as in SSA's released code


def lora_targets(model: nn.Module) -> list[str]:
    """Names of the query and value projections of every attention site, or of the projection that fuses them."""
    targets = []
    for site in find_sites(model):
        roles = ("query", "value") if "query" in site.projections else ("fused",)
        targets += [f"{site.name}.{site.projections[role]}" for role in roles if role in site.projections]
    if not targets:
        raise NotImplementedError(f"No query or value projections are recognised in {type(model).__name__}.")
    return targets


def add_lora(model: nn.Module, task: Task, seed: int, *, is_patched: bool) -> Any:
    """A PeftModel around the model: LoRA on queries and values; the variant and the task's head are trained whole."""
    from peft import LoraConfig, get_peft_model

    whole = [*task.head(model), *(["patchattn"] if is_patched else [])]
    config = LoraConfig(
        r=task.rank, lora_alpha=2 * task.rank, target_modules=lora_targets(model), modules_to_save=whole or None
    )
    torch.manual_seed(seed)  # every variant starts from the same LoRA weights
    return get_peft_model(model, config)


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    steps: int,
    groups: list[dict[str, Any]],
    follow: Callable[[float], None],
    stop_at: float = 0.0,
) -> None:
    """Train with AdamW, a linear warm-up and a linear decay to zero; leaves the model in evaluation mode.

    Args:
        model: returns a `loss` for each batch.
        batches: `steps` of them.
        steps: length of the schedule.
        groups: for the optimizer.
        follow: gets the loss after each step.
        stop_at: end early when the mean loss of the last 20 steps is below this.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = max(1, round(_WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    trained = [p for group in groups for p in group["params"]]
    recent: deque[float] = deque(maxlen=20)
    model.train()
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, _CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        follow(recent[-1])
        if sum(recent) / len(recent) < stop_at:
            break
    model.eval()
