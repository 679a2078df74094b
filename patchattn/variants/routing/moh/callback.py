"""An active ratio that falls step by step while the Trainer runs."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .variant import anneal_active_heads


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
