"""Running a model from one layer on: what the layers below it gave is kept, per batch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.sites import AttentionSite


class _Kept(nn.Module):
    """Stands for a layer, gives what was kept, and computes nothing."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a child: nothing of it is to be found
        self.output = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class _StopError(Exception):
    """The layer has run; the rest need not."""


class Replay:
    """The inputs of one layer of a model for some batches, moved up layer by layer.

    Args:
        model: a transformers model whose layers are in one list.
        site: an attention module of that list's tower.
        batches: keyword arguments of the model's forward, on its device.

    Raises:
        NotImplementedError: the layers are not in a list.
    """

    def __init__(self, model: nn.Module, site: AttentionSite, batches: list[Mapping[str, Any]]) -> None:
        parts = site.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        layers = None if number is None else model.get_submodule(".".join(parts[:number]))
        if not isinstance(layers, nn.ModuleList):
            raise NotImplementedError(f"The layers of {site.name} are not in one list, so that none can be left out.")
        self.model, self.layers, self.batches = model, layers, batches
        self.layer = 0
        self._kept: list[Any] = [None] * len(batches)  # output of the layer below, per batch

    @contextmanager
    def below(self, batch: int) -> Iterator[Mapping[str, Any]]:
        """Within it the model computes the layers from `self.layer` on; gives the arguments to call it with."""
        real = list(self.layers[: self.layer])
        for index, layer in enumerate(real):
            self.layers[index] = _Kept(layer, self._kept[batch])
        try:
            yield self.batches[batch]
        finally:
            for index, layer in enumerate(real):
                self.layers[index] = layer

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Move up to the inputs of `layer`, every layer below as the model has it now."""
        while self.layer < layer:
            for index in range(len(self.batches)):
                self._kept[index] = self._one_layer(index)
            self.layer += 1

    def _one_layer(self, batch: int) -> Any:
        seen: list[Any] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output)
            raise _StopError

        handle = self.layers[self.layer].register_forward_hook(keep)
        try:
            with self.below(batch) as inputs:
                self.model(**inputs, use_cache=False)
        except _StopError:
            return seen[0]
        finally:
            handle.remove()
        raise NotImplementedError(f"{type(self.model).__name__} does not run layer {self.layer}.")
