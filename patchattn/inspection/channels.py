"""Statistics of the channels that a projection reads, over all tokens of some data, in one pass."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.host import find_sites
from ..core.linear import LinearView
from ..core.probing import recording
from ..core.selection import base_model, input_device
from ..core.settings import nearest

Metric = Literal["wifv", "ifv", "wifn"]


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Of the inputs of one projection, over tokens that are not padding; float64, on the CPU.

    Attributes:
        tokens: how many there were.
        mean: `(C,)` of each channel.
        variance: `(C,)` around that mean, divided by `tokens - 1`.
        mean_abs: `(C,)` mean over examples of each one's mean of absolute values. Where a module gets tokens of which
            it is not known what example they are of, as an expert does, those of a call are one example.
        norm: `(C,)` l2 norm over all tokens.
    """

    tokens: int
    mean: torch.Tensor
    variance: torch.Tensor
    mean_abs: torch.Tensor
    norm: torch.Tensor


class RunningMoments:
    """Moments of rows that come in parts, merged by the rule of Chan et al. (1979), which large means do not upset."""

    def __init__(self) -> None:
        self.count = self.examples = 0
        self.mean = self.deviations = self.absolute = torch.zeros(0, dtype=torch.float64)

    def add(self, values: torch.Tensor, real: torch.Tensor) -> None:
        """Add examples `(B, T, C)`, of which the rows are counted that are `real` `(B, T)`."""
        values = as_double(values)
        real = real.to(values.device)
        rows = values[real]
        if not len(rows):
            return
        count, mean = len(rows), rows.mean(0)
        deviations = (rows - mean).square().sum(0).cpu()
        mean = mean.cpu()
        absolute, examples = sum_of_example_means(values.abs(), real)
        self.examples += examples
        if not self.count:
            self.count, self.mean, self.deviations, self.absolute = count, mean, deviations, absolute.cpu()
            return
        total, shift = self.count + count, mean - self.mean
        self.deviations = self.deviations + deviations + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.absolute = self.absolute + absolute.cpu()
        self.count = total

    def statistics(self) -> ChannelStatistics:
        """What they come to; ValueError for fewer than two rows, which have no variance."""
        if self.count < 2:
            raise ValueError(f"A variance needs at least two tokens, got {self.count}.")
        squares = self.deviations + self.count * self.mean.square()
        return ChannelStatistics(
            self.count, self.mean, self.deviations / (self.count - 1), self.absolute / self.examples, squares.sqrt()
        )

    def state(self) -> dict[str, torch.Tensor]:
        """What `load` takes."""
        counts = {"count": torch.tensor(self.count), "examples": torch.tensor(self.examples)}
        return {**counts, "mean": self.mean, "deviations": self.deviations, "absolute": self.absolute}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a state."""
        self.count, self.examples = int(state["count"]), int(state["examples"])
        self.mean, self.deviations, self.absolute = (state[name] for name in ("mean", "deviations", "absolute"))


def sum_of_example_means(values: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum over examples `(B, T, C)` of each one's mean over its `real` `(B, T)` rows, and how many have any: `(C,)`."""
    rows = real.sum(1)
    sums = values.where(real[..., None], 0.0).sum(1)
    return (sums / rows.clamp(min=1)[:, None]).sum(0), int((rows > 0).sum())


def as_double(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, where it is, but for Apple's GPUs, which have none."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def projection_weight(model: nn.Module, path: str, inputs: int | None = None) -> torch.Tensor:
    """`(E, C)` weight of a linear projection from C channels to E; half precision comes as float32.

    Args:
        model: it is in.
        path: of the projection.
        inputs: C, where it is known what comes before.

    Raises:
        ValueError: it carries an adapter.
        NotImplementedError: it is quantised, has no values, or reads something else than C channels.
    """
    view = LinearView.at(model, path)
    weight = view.weight
    if weight.is_meta:
        raise NotImplementedError(f"{path} has no values here: its weight is on the device 'meta'.")
    if inputs is not None and view.in_features != inputs:
        raise NotImplementedError(
            f"{path} reads {view.in_features} channels, but heads of {inputs} channels come before it."
        )
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def fluctuation(known: ChannelStatistics, weight: torch.Tensor, metric: Metric) -> torch.Tensor:
    """How much the output of a projection would lose if a channel were its mean (arXiv 2312.11983).

    Args:
        known: of what the projection reads.
        weight: `(E, C)` its weight.
        metric: `wifv`: variance times the squared norm of the weights, `ifv`: variance, `wifn`: mean absolute weight
            times the channel's root mean square.

    Returns:
        `(C,)`, float64.
    """
    weight = as_double(weight).cpu()
    if metric == "wifv":
        return known.variance * weight.square().sum(0)
    if metric == "ifv":
        return known.variance
    return weight.abs().mean(0) * known.norm / known.tokens**0.5


def standardised(scores: torch.Tensor) -> torch.Tensor:
    """Scores of one module less their mean, over their standard deviation."""
    return (scores - scores.mean()) / (scores.std() + 1e-20)


@torch.no_grad()
def channel_statistics(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, ChannelStatistics]:
    """Statistics of what some projections read, such as the output projections of attention and of MLPs.

    Padding is left out as the self-attention before a projection sees it. One pass, with memory for the channels only.

    Args:
        model: a transformers model in evaluation mode, patched or not.
        batches: keyword arguments of its forward; tensors are moved to its device.
        names: paths of modules that are called with `(..., C)`, such as `model.layers.0.mlp.down_proj`.

    Raises:
        ValueError: no such module, a model in training mode, fewer than two tokens.
        NotImplementedError: the model's attention does not go through transformers' registry; or a module gets a part
            of the tokens, as an expert does, of which some are padding.
    """
    if model.training:
        raise ValueError("Statistics need a model in evaluation mode: model.eval().")
    base = base_model(model)
    known = dict(base.named_modules())
    for name in names:
        if name not in known:
            raise ValueError(f"{type(base).__name__} has no module {name!r}{nearest(name, list(known))}")
    moments = {name: RunningMoments() for name in names}
    real: list[torch.Tensor] = []  # (B, T) of the self-attention that ran last

    def see(call: AttentionCall, output: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        real[:] = [call.mask.real().expand(call.query.shape[0], call.query.shape[2])]
        return output

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].flatten(0, -2)
            if real and len(rows) == real[0].numel():
                moments[name].add(rows.unflatten(0, real[0].shape), real[0])
                return
            if real and not bool(real[0].all()):
                raise NotImplementedError(
                    f"{name} gets {len(rows)} of {real[0].numel()} tokens, of which some are padding: which ones is "
                    "not known. Give batches without padding."
                )
            moments[name].add(rows[None], rows.new_ones(1, len(rows), dtype=torch.bool))

        return add

    handles = [known[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        with recording(model, [site for site in find_sites(base) if not site.is_cross], see):
            for batch in batches:
                real.clear()
                model(**on_device(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return {name: found.statistics() for name, found in moments.items()}


def on_device(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch whose tensors are where the model's parameters are; TypeError if it is not a batch."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Batches are a list of dictionaries, each what the model is called with; one of them is {batch!r}."
        )
    device = input_device(model)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
