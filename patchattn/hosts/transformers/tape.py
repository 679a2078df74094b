"""What an attention module computes between the product of queries and keys and that of weights and values.

The calls of torch's functions in between are kept until the second product, in whose place variants are called.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .axes import is_followed
from .pattern import SOFTMAX, ExplicitCall, Pattern
from .products import Exchanged, Product, Step, UnknownPatternError, any_in, tensors_in

_NOTHING = Exchanged()

Attend = Callable[[Pattern | ExplicitCall], tuple[torch.Tensor, torch.Tensor | None]]


class Tape(TorchFunctionMode):
    """Follows one call of an attention module.

    Args:
        owner: the module, for messages.
        attend: computes what is to be in the place of the product with the values: output `(B, Tq, H, D)`, and weights.
    """

    def __init__(self, owner: str, attend: Attend) -> None:
        super().__init__()
        self.owner = owner
        self.attend = attend
        self.before: list[Step] = []  # calls that lead to queries, keys and values
        self.steps: list[Step] = []
        self.products: list[Product] = []
        self.scores: list[torch.Tensor] = []  # all that depends on a product
        self.weights: list[torch.Tensor] = []  # all that depends on a softmax of such
        self.exchanged = Exchanged()  # weights, once variants have changed them
        self.withheld = False  # they have none to give
        self.closed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._called(Step(func, args, kwargs or {}))
        except UnknownPatternError as reason:
            raise self.refusal(reason) from None

    def refusal(self, reason: UnknownPatternError) -> NotImplementedError:
        """What to raise of a module whose attention is not known."""
        return NotImplementedError(
            f"{self.owner} computes attention itself, in a way that patchattn does not know: {reason}. Leave it out "
            "with modules=... or layers=..."
        )

    def _called(self, step: Step) -> Any:
        if step.func is F.scaled_dot_product_attention:
            return self._explicit(step)
        taken = list(tensors_in((step.args, step.kwargs)))
        of_weights = any_in(taken, self.weights)
        product = Product.of(step)
        if product is not None and of_weights:
            return self._close(product)
        if self.closed and of_weights and self.withheld:
            raise UnknownPatternError("its weights are read behind their product with values, and a variant gives none")
        step.result = step.again(self.exchanged) if self.closed and of_weights else step.again(_NOTHING)
        results = step.results()
        of_scores = of_weights or any_in(taken, self.scores)
        if not results or (product is None and not of_scores):
            if not self.closed and is_followed(step):
                self.before.append(step)
            return step.result
        if step.name == SOFTMAX and of_scores:
            self._refuse_second(of_weights or bool(self.weights))
            self.weights += results
        elif of_weights:
            self.weights += results
        else:
            self.scores += results
        if not self.closed:
            self.steps.append(step)
            if product is not None:
                self.products.append(product)
        return step.result

    def _close(self, product: Product) -> torch.Tensor:
        self._refuse_second(self.closed)
        pattern = Pattern(self.steps, self.products, product, self.before)
        output, weights = self.attend(pattern)
        self.closed, self.before, self.steps, self.products, self.scores = True, [], [], [], []
        if weights is None:
            self.withheld = True
        elif weights is not pattern.weights:
            for old in self.weights:
                fits = weights.numel() == old.numel()
                new = pattern.scores_out.written(weights).reshape(old.shape) if fits else weights
                self.exchanged.take(old, new.to(old.dtype))
        return pattern.written(output)

    def _explicit(self, step: Step) -> torch.Tensor:
        self._refuse_second(self.closed or bool(self.weights))
        self.closed = True
        return self.attend(ExplicitCall(step))[0].transpose(1, 2)

    def _refuse_second(self, is_second: bool) -> None:
        if is_second:
            raise UnknownPatternError(
                "it attends more than once in a call, or uses its weights for more than its values"
            )

    def finished(self, output: Any) -> Any:
        """What the module gives, weights that variants have changed included.

        Raises:
            NotImplementedError: no attention was computed.
        """
        if not self.closed:
            what = "no softmax stands between a product of queries and keys and one with values"
            raise self.refusal(UnknownPatternError(what))
        if self.withheld:
            return _without(output, self.weights)
        return self.exchanged.of(output) if self.exchanged.has(output) else output


def _without(output: Any, weights: Sequence[torch.Tensor]) -> Any:
    """What a module gives, without its weights."""
    if isinstance(output, torch.Tensor):
        return None if any_in([output], weights) else output
    if type(output) in (tuple, list):
        return type(output)([_without(item, weights) for item in output])
    return output
