"""What temperatures do in a patched model: their spread per layer and stream, and how they sharpen attention."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from patchattn_kernels import scale_tokens

from ..core.call import AttentionCall
from ..core.observation import observe
from ..core.patching import active_chains
from ..core.report import Observation
from ..core.selection import base_model
from ..core.sites import AttentionSite
from .probabilities import attention_probabilities, of_head

STREAMS = ("query", "key", "value")
_NAMES = {f"{stream}_temperature": stream for stream in STREAMS}  # what variants report inverse temperatures as


@dataclass(frozen=True)
class Spread:
    """Distribution of the inverse temperatures of one stream.

    Attributes:
        count: number of values: real tokens, times heads where each has its own.
        mean, std: mean and standard deviation (of the values themselves: divided by `count`).
        minimum, maximum: smallest and largest value.
    """

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float


@dataclass(frozen=True)
class LayerTemperatures:
    """What one variant's temperatures did in one layer on real tokens, padding excluded.

    Attributes:
        site: the attention module.
        variant: name of the variant.
        streams: `query`, `key` or `value` to the spread of its inverse temperatures.
        spikiness_before, spikiness_after: of attention without and with the temperatures of queries and keys: mean over
            rows and heads of `||s||_1^2 / (n ||s||_2^2)`, where a row s is over n visible keys. It is 1 where attention
            is uniform and 1/n where it lies on one key; lower is spikier. `None` where it was not measured.
    """

    site: AttentionSite
    variant: str
    streams: dict[str, Spread]
    spikiness_before: float | None
    spikiness_after: float | None


class _Sums:
    """Running sums of numbers, in Python floats, which are float64."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0
        self.minimum, self.maximum = math.inf, -math.inf

    def add(self, values: torch.Tensor) -> None:
        if not values.numel():
            return
        values = values.cpu().double()  # not on the device: Apple's GPUs have no double
        self.count += values.numel()
        self.total += float(values.sum())
        self.squares += float(values.square().sum())
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def spread(self) -> Spread:
        mean = self.total / self.count
        variance = max(self.squares / self.count - mean**2, 0.0)
        return Spread(self.count, mean, math.sqrt(variance), self.minimum, self.maximum)


class _Layer:
    """What is collected of one variant in one layer."""

    def __init__(self, site: AttentionSite, variant: str) -> None:
        self.site, self.variant = site, variant
        self.streams: dict[str, _Sums] = {}
        self.before, self.after = _Sums(), _Sums()
        self.key: Observation | None = None  # the latest temperatures of keys

    @torch.no_grad()
    def add(self, seen: Observation) -> None:
        for name, values in seen.values.items():
            if name in _NAMES:
                self._add_values(self.streams.setdefault(_NAMES[name], _Sums()), values, seen)
        if "key_temperature" in seen.values:
            self.key = seen
        if "query_temperature" in seen.values and isinstance(seen.source, AttentionCall):
            self._add_spikiness(seen.source, seen.values["query_temperature"])

    @staticmethod
    def _add_values(sums: _Sums, values: torch.Tensor, seen: Observation) -> None:
        real = seen.real_tokens()
        if values.dim() == 3:
            real = real.unsqueeze(-1)
        values, real = torch.broadcast_tensors(values, real)
        sums.add(values[real])

    def _add_spikiness(self, call: AttentionCall, factor: torch.Tensor) -> None:
        plain = call.replace(query=_unscaled(call.query, factor))
        if self.key is not None:
            keys = self.key.values["key_temperature"]
            if self.key.source is not call.context.layer or keys.shape[1] not in (1, call.key.shape[2]):
                return  # keys of earlier calls: their temperatures are not at hand
            plain = plain.replace(key=_unscaled(call.key, keys))
            if not bool(plain.key.isfinite().all()):
                return
        seen, real = call.mask.seen(), call.mask.real()
        for head in range(call.query.shape[1]):
            counts = of_head(seen, head).sum(-1)
            rows = real & (counts > 0)
            known = rows & plain.query[:, head].isfinite().all(-1)  # a temperature of 0 leaves nothing to go back to
            for sums, one in ((self.before, plain), (self.after, call)):
                attention = attention_probabilities(one, head, seen)
                squares = attention.square().sum(-1) * counts
                sums.add((attention.sum(-1).square() / squares)[known.expand_as(squares)])

    def result(self) -> LayerTemperatures:
        known = [stream for stream in STREAMS if stream in self.streams and self.streams[stream].count]
        streams = {stream: self.streams[stream].spread() for stream in known}
        return LayerTemperatures(self.site, self.variant, streams, self.before.mean, self.after.mean)


def _unscaled(states: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """What `scale_tokens` made `states` of, in float32 at least; not finite where the factor is 0."""
    wide = torch.promote_types(states.dtype, torch.float32)
    return scale_tokens(states.to(wide), 1 / factor.to(states.dtype).to(wide))


class TemperatureStatistics:
    """Running statistics of what variants report of temperatures; see `temperature_statistics`."""

    def __init__(self) -> None:
        self._layers: dict[tuple[str, str], _Layer] = {}

    def add(self, variant: str, seen: Observation) -> None:
        """Count one observation of a variant; values that are not temperatures are passed over."""
        if not _NAMES.keys().isdisjoint(seen.values):
            self._layers.setdefault((seen.site.name, variant), _Layer(seen.site, variant)).add(seen)

    def reset(self) -> None:
        """Forget everything collected so far."""
        self._layers.clear()

    def layers(self) -> list[LayerTemperatures]:
        """One entry per layer and variant that has temperatures, in the order of their first run.

        Raises:
            ValueError: nothing was observed.
        """
        if not self._layers:
            raise ValueError(
                "No temperature was reported: no variant of the model has temperatures, as ssa, ssmax and logn do, or "
                "the model was not run while this was collected."
            )
        return [layer.result() for layer in self._layers.values()]


@contextmanager
def temperature_statistics(model: nn.Module) -> Iterator[TemperatureStatistics]:
    """Collect the temperatures of a patched model, and how they change attention, while the block runs.

    Nothing is stored but sums. Spikiness takes two softmaxes more per head, one head at a time, for every query
    temperature. Where keys are scaled it is measured only for calls that make all their keys themselves, such as a
    forward over a whole text: the temperatures of keys that come out of a cache are not at hand. Without a query
    temperature it is not measured.

    Args:
        model: patched with a variant that reports inverse temperatures (`ssa`, `ssmax`, `logn`).

    Yields:
        A `TemperatureStatistics`; read `layers()` inside the block or after it.

    Raises:
        ValueError: the model carries no variant.
    """
    statistics = TemperatureStatistics()
    chains = active_chains(base_model(model))
    if not chains:
        raise ValueError(f"{type(model).__name__} is not patched; there is nothing to observe.")
    with ExitStack() as stack:
        for chain in chains.values():
            for name in chain.names():
                stack.enter_context(observe(chain.get_submodule(name), partial(statistics.add, name)))
        yield statistics
