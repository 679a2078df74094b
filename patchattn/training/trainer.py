"""What transformers' Trainer needs to train a patched model as its paper does."""

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..core.packing import SETTINGS
from .balance import Definition, balance_loss, check_routing
from .groups import move_fast_parameters

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class PatchedTrainerMixin(Base):
    """Adds the load-balance loss and the learning rate of scales to a Trainer.

        class PatchedTrainer(PatchedTrainerMixin, Trainer):
            pass

    Args:
        balance_weight: weight of the load-balance loss (see `balance_loss`); the paper of MoH takes 0.01. It is added
            to the training loss alone, not to that of an evaluation, as the mean over accumulated batches and
            processes.
        balance_definition: `paper` or `released`.
        scale_learning_rate: learning rate of what variants call fast parameters, such as SSA's alpha; they are then
            not decayed. `None` trains them like everything else.

    Raises:
        ValueError: the model has nothing to balance, or (when the optimizer is made) no such parameters.
    """

    def __init__(
        self,
        *args: Any,
        balance_weight: float = 0.0,
        balance_definition: Definition = "paper",
        scale_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.balance_weight = balance_weight
        self.balance_definition: Definition = balance_definition
        self.scale_learning_rate = scale_learning_rate
        if balance_weight:
            check_routing(self.model, balance_weight, balance_definition)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss; while training with the load-balance loss added."""
        compute = super().compute_loss
        if not (self.balance_weight and model.training):
            return compute(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        with balance_loss(model, self.balance_weight, self.balance_definition) as balance:
            result = compute(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        share = balance() / self._divisor(num_items_in_batch)
        return (result[0] + share, result[1]) if return_outputs else result + share

    def _divisor(self, num_items_in_batch: Any) -> int:
        """Over how many batches the Trainer does not average after `compute_loss`, because their loss is a share of
        the whole accumulated batch's already."""
        is_share = getattr(self, "loss_is_scaled_for_ga", None)
        if is_share is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_share = counted or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if is_share else 1

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The Trainer's optimizer, with the scales of variants in a group of their own."""
        is_new = self.optimizer is None
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.scale_learning_rate is not None:
            move_fast_parameters(optimizer, self.model, self.scale_learning_rate)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model, with the settings of its patch in the state dict, which PEFT looks for: DeepSpeed gathers
        parameters and buffers alone."""
        if state_dict:
            own = self.model.state_dict()  # sharded by DeepSpeed its tensors are empty
            state_dict = {**{name: own[name] for name in own if name.endswith(SETTINGS)}, **state_dict}
        super()._save(output_dir, state_dict)
