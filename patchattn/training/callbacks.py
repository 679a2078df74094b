"""Routing statistics in the Trainer's log."""

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.observation import observe
from ..core.report import Observation
from ..inspection.routing import RoutingStatistics


class RoutingCallback(TrainerCallback):
    """Logs what routers do, whenever the Trainer logs: `trainer.add_callback(RoutingCallback(trainer))`.

    The entries are `routing/<layer>/entropy`, `routing/<layer>/balance` (see
    `patchattn.inspection.routing.LayerRouting`) and `routing/<layer>/head_<i>`, the share of tokens that use a head.
    Padding and evaluations are left out; several processes are counted together.

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
