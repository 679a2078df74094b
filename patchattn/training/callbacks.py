"""Trainer callbacks: routing statistics in the log, and an active ratio that falls step by step."""

from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.call import Observation
from ..core.observation import observe
from ..inspection.routing import RoutingStatistics
from ..variants.routing.moh import MoH


class RoutingCallback(TrainerCallback):
    """Logs what routers do, whenever the Trainer logs: `trainer.add_callback(RoutingCallback(trainer))`.

    The entries are `routing/<layer>/entropy`, `routing/<layer>/balance` (see `patchattn.inspection.routing.LayerRouting`) and
    `routing/<layer>/head_<i>`, the share of tokens that use a head. Padding and evaluations are left out; several
    processes are counted together.

    Args:
        trainer: whose log to write to.
        heads: log every head, as well as every layer.
    """

    def __init__(self, trainer: Any, *, heads: bool = True) -> None:
        self.trainer = trainer
        self.heads = heads
        self.statistics = RoutingStatistics()
        self._observing = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to count."""
        self._observing.close()  # of a training that was interrupted
        self.statistics.reset()
        self._observing.enter_context(observe(self.trainer.model, self._add))

    def _add(self, seen: Observation) -> None:
        if seen.module.training:
            self.statistics.add(seen)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what was counted, where the Trainer is about to log."""
        if not control.should_log:
            return
        if self.trainer.accelerator.num_processes > 1:
            self.statistics.reduce(self.trainer.accelerator)
        entries: dict[str, float] = {}
        for layer in self.statistics.layers():
            prefix = f"routing/{layer.site.name}"
            if layer.entropy is not None and layer.balance is not None:
                entries |= {f"{prefix}/entropy": layer.entropy, f"{prefix}/balance": layer.balance}
            if self.heads:
                entries |= {f"{prefix}/head_{head}": share for head, share in enumerate(layer.usage)}
        self.statistics.reset()
        self.trainer.log(entries)
        control.should_log = True  # the Trainer's own entry, with the loss, is still to come

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop to count."""
        self._observing.close()


class ActiveRatioCallback(TrainerCallback):
    """Lets MoH's active heads fall from all to their budget over the first steps of a training.

    The count depends on the step alone, so that a resumed training goes on where it was.

    Args:
        steps: optimizer steps until the budget is reached; 0 starts with it.

    Raises:
        ValueError: `steps` is negative or, when training begins, longer than the training.
    """

    def __init__(self, steps: int) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(f"steps must be an integer of at least 0, got {steps!r}.")
        self.steps = steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a training that would end above the budget."""
        if self.steps > state.max_steps:
            raise ValueError(
                f"The active ratio is to fall over {self.steps} steps, but the training has {state.max_steps}: the "
                "model would never run with the budget it is saved with."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the heads of this step."""
        anneal_active_heads(kwargs["model"], state.global_step, self.steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model with its budget."""
        anneal_active_heads(kwargs["model"], self.steps, self.steps)


def anneal_active_heads(model: nn.Module, step: int, steps: int) -> None:
    """Set how many heads MoH keeps at one step of continued training: all at step 0, its budget from `steps` on.

    What falls, linearly and rounded per layer, is the number of heads chosen among those that are not shared.

    Args:
        model: patched with `moh`, in whatever wrapper.
        step: counted from 0.
        steps: length of the fall.

    Raises:
        ValueError: the model has no MoH, or `step` is negative.
    """
    variants = [module for module in model.modules() if isinstance(module, MoH)]
    if not variants:
        raise ValueError(f"This {type(model).__name__} is not patched with MoH; it has no active heads to lower.")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}.")
    for variant in variants:
        variant.anneal(min(1.0, step / steps) if steps else 1.0)
