"""One view of a linear layer, however it is stored: torch's, transformers' Conv1D, adapted, dispatched, quantised."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers.pytorch_utils import Conv1D

Storage = Literal["plain", "adapted", "dispatched", "quantised"]
Side = Literal["rows", "columns"]


@dataclass(frozen=True, eq=False)
class LinearView:
    """A linear layer `x W^T + b` with W as `(out, in)`, whatever the layer holds it as.

    The widths are known of every linear layer, and the numbers where they are stored as such. What makes queries, keys
    and values at once is one layer: those of a head are `weight[index]` and `bias[index]`, with the `index` that
    `surgery.projections.head_projections` gives.

    Attributes:
        module: the layer.
        path: where in the model it is, for messages.
        in_features, out_features: widths.
    """

    module: nn.Module
    path: str
    in_features: int
    out_features: int

    @classmethod
    def of(cls, module: nn.Module, path: str = "") -> "LinearView | None":
        """The view of a module, `None` if it is not a linear layer."""
        base: Any = module.base_layer if is_adapted(module) else module
        if isinstance(base, Conv1D):
            return cls(module, path, int(base.nx), int(base.nf))
        if hasattr(base, "in_features") and hasattr(base, "out_features"):
            return cls(module, path, int(base.in_features), int(base.out_features))
        return None

    @classmethod
    def at(cls, model: nn.Module, path: str) -> "LinearView":
        """The view of the linear layer at a path of a model; NotImplementedError if there is none."""
        module = model.get_submodule(path)
        view = cls.of(module, path)
        if view is None:
            raise NotImplementedError(f"{path} ({type(module).__name__}) is quantised or not a plain linear layer.")
        return view

    @property
    def storage(self) -> Storage:
        """How the layer holds its weight.

        `plain`: as a tensor of its own; `adapted`: wrapped by a PEFT adapter; `dispatched`: held by accelerate, which
        may have it elsewhere until the layer runs; `quantised`: in any other way, a shard and a layer that computes
        something else with its weight included.
        """
        if is_adapted(self.module):
            return "adapted"
        if not self._is_plain():
            return "quantised"
        return "dispatched" if is_dispatched(self.module) else "plain"

    @property
    def stores_inputs_first(self) -> bool:
        """Whether the layer's own tensor is `(in, out)`."""
        return isinstance(self.module, Conv1D)

    @property
    def trains(self) -> bool:
        """Whether the layer's weight is to get gradients."""
        weight: Any = self.module.weight
        return bool(weight.requires_grad)

    @property
    def weight(self) -> torch.Tensor:
        """`(out, in)`, detached, in the layer's dtype; without values (on `meta`) while the model has none.

        It shares the layer's memory, unless accelerate keeps the weight elsewhere, from where it is fetched.

        Raises:
            ValueError: the layer carries an adapter, so that no one tensor is its weight.
            NotImplementedError: it is quantised, or computes something else with its weight.
        """
        with self._fetched() as layer:
            weight = cast(torch.Tensor, layer.weight).detach()
            return weight.mT if self.stores_inputs_first else weight

    @property
    def bias(self) -> torch.Tensor:
        """`(out,)`, zeros where the layer has none; otherwise as `weight`."""
        with self._fetched() as layer:
            bias = cast(torch.Tensor | None, layer.bias)
            if bias is None:
                return cast(torch.Tensor, layer.weight).new_zeros(self.out_features)
            return bias.detach()

    def check_cut(self) -> None:
        """ValueError or NotImplementedError if outputs or inputs of the layer cannot be left out."""
        where, storage = self.path, self.storage
        if storage == "adapted":
            raise ValueError(
                f"{where} carries a PEFT adapter: prune before adding adapters, or merge_and_unload() first."
            )
        if is_dispatched(self.module):
            raise NotImplementedError(f"{where} is offloaded or dispatched by accelerate: prune before that.")
        if storage != "plain":
            raise self._unreadable()
        if "weight" not in self.module._parameters:
            raise NotImplementedError(
                f"{where} computes its weight from other tensors: prune before parametrising or wrapping it."
            )

    def cut(self, side: Side, index: torch.Tensor) -> dict[str, Any]:
        """What the layer's attributes become when only some of its outputs (rows) or inputs (columns) remain.

        Args:
            side: which of them.
            index: `(n,)` those that remain.

        Returns:
            Parameters, which train if those before did, and widths, by attribute.

        Raises:
            ValueError: it carries an adapter.
            NotImplementedError: it is quantised, offloaded, or makes its weight anew in every call.
        """
        self.check_cut()
        layer: Any = self.module
        outputs, inputs = ("nf", "nx") if self.stores_inputs_first else ("out_features", "in_features")
        dim = int((side == "columns") != self.stores_inputs_first)
        values = {"weight": selected(layer.weight, dim, index), outputs if side == "rows" else inputs: len(index)}
        if side == "rows" and layer.bias is not None:
            values["bias"] = selected(layer.bias, 0, index)
        return values

    def _is_plain(self) -> bool:
        """Whether the layer computes `x W^T + b` with a `weight` and a `bias` that are just their numbers."""
        layer: Any = self.module
        forward = type(layer).forward
        instead = vars(layer).get("forward")  # accelerate sets one, and leaves the class's own there afterwards
        is_own = instead is None or is_dispatched(layer) or getattr(instead, "__func__", None) is forward
        tensors = {*layer._parameters, *layer._buffers}
        if forward not in (nn.Linear.forward, Conv1D.forward) or not is_own or not tensors <= {"weight", "bias"}:
            return False
        size = (self.out_features, self.in_features)
        sizes = {"weight": size[::-1] if self.stores_inputs_first else size, "bias": (self.out_features,)}
        held = {"weight": layer.weight, **({} if layer.bias is None else {"bias": layer.bias})}
        return all(_is_plain_tensor(tensor) and tensor.shape == sizes[name] for name, tensor in held.items())

    @contextmanager
    def _fetched(self) -> Iterator[Any]:
        """The layer with its numbers in it, wherever accelerate has them."""
        if self.storage == "adapted":
            raise ValueError(
                f"{self.path} carries a PEFT adapter, whose weight is not in it: merge_and_unload() first."
            )
        if self.storage == "quantised":
            raise self._unreadable()
        layer: Any = self.module
        with align_module_device(layer) if layer.weight.is_meta else nullcontext():
            yield layer

    def _unreadable(self) -> NotImplementedError:
        return NotImplementedError(
            f"{self.path} ({type(self.module).__name__}) is quantised or not a plain linear layer."
        )


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is wrapped by an adapter of PEFT."""
    return hasattr(module, "base_layer")


def is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate holds the tensors of a module, or moves what it is called with."""
    return hasattr(module, "_hf_hook")


def selected(tensor: nn.Parameter, dim: int, index: torch.Tensor) -> nn.Parameter:
    """A parameter made of some rows, or columns, of another."""
    with torch.no_grad():
        chosen = tensor.index_select(dim, index.to(tensor.device))
    return nn.Parameter(chosen, requires_grad=tensor.requires_grad)


def _is_plain_tensor(tensor: Any) -> bool:
    """Not of a subclass, such as a quantised tensor that says it is floating-point, or a shard."""
    return type(tensor) in (nn.Parameter, torch.Tensor) and tensor.is_floating_point() and tensor.element_size() > 1
