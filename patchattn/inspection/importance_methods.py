"""How heads are scored: one class per method. Each sees every call of attention, and keeps a few numbers per head."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.probe import Place
from ..core.selection import base_model
from ..core.sites import AttentionSite
from ..surgery.projections import head_projections, output_projection
from .channels import (
    Metric,
    RunningMoments,
    as_double,
    fluctuation,
    projection_weight,
    standardised,
    sum_of_example_means,
)
from .probabilities import attention_probabilities, seen_by_all_heads

Per = Literal["token", "example", "batch"]
Loss = Callable[[Any, Mapping[str, Any]], torch.Tensor]
State = dict[str, torch.Tensor]


class Method(ABC):
    """One way to score heads.

    Args:
        model: a `base_model`.
        sites: attention modules to score.
    """

    needs_data: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = False
    at: ClassVar[Place] = "model"  # see `recording`

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        self.model = model
        self.sites = {site.name: site for site in sites}
        self.tokens = dict.fromkeys(self.sites, 0)

    def see(self, call: AttentionCall, output: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Look at the output of heads `(B, Tq, H, D)` of one call; what is returned goes on."""
        batch, rows = output.shape[:2]
        real = call.mask.real().expand(batch, rows)
        self.tokens[call.site.name] += int(real.sum())
        return self.add(call, output, real)

    def add(self, call: AttentionCall, output: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """`see`, and which rows `(B, Tq)` are text rather than padding."""
        return output

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model is called with."""
        return batch

    def end_batch(self, outputs: Any, batch: Mapping[str, Any]) -> None:  # noqa: B027 - most need not know
        """The model has run on a batch."""

    @abstractmethod
    def scores(self, normalise: bool) -> dict[str, torch.Tensor]:
        """`(H,)` of every attention module; the higher, the more it is worth to keep."""

    def state(self) -> State:
        """All that was summed up; `load` takes it."""
        return {f"tokens.{name}": torch.tensor(count) for name, count in self.tokens.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a state."""
        self.tokens = {name: int(state[f"tokens.{name}"]) for name in self.tokens}


class SummedMethod(Method):
    """A method whose score is a mean of one number per head."""

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        super().__init__(model, sites)
        self.sums = {site.name: torch.zeros(site.query_heads or 0, dtype=torch.float64) for site in sites}
        self.counts = dict.fromkeys(self.sites, 0)

    def sum_up(self, name: str, total: torch.Tensor, count: int) -> None:
        """Add the sum `(H,)` over `count` tokens, examples or batches."""
        self.sums[name] = self.sums[name] + total.cpu()
        self.counts[name] += count

    def scores(self, normalise: bool) -> dict[str, torch.Tensor]:
        means = {name: total / max(self.counts[name], 1) for name, total in self.sums.items()}
        return by_layer_norm(means) if normalise else means

    def state(self) -> State:
        counts = {f"count.{name}": torch.tensor(count) for name, count in self.counts.items()}
        return {**super().state(), **counts, **{f"sum.{name}": total for name, total in self.sums.items()}}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        super().load(state)
        self.sums = {name: state[f"sum.{name}"] for name in self.sums}
        self.counts = {name: int(state[f"count.{name}"]) for name in self.counts}


def by_layer_norm(scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Divide the scores of each attention module by their l2 norm, as Michel et al. (2019) do."""
    return {name: score / (score.norm() + 1e-20) for name, score in scores.items()}


@dataclass
class _Gate:
    """The gates of one call."""

    site: str
    value: torch.Tensor  # (B, T, H), ones
    real: torch.Tensor  # (B, T)


class Michel(SummedMethod):
    """|dL / dgate|: how much the loss changes when a head is gated down (arXiv 1905.10650)."""

    needs_gradients = True

    def __init__(
        self, model: nn.Module, sites: Sequence[AttentionSite], per: Per = "token", loss: Loss | None = None
    ) -> None:
        super().__init__(model, sites)
        self.per, self.loss = per, loss
        self.gates: list[_Gate] = []

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.gates = []
        return batch if self.loss is not None else with_labels(self.model, batch)

    def add(self, call: AttentionCall, output: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        gate = torch.ones(output.shape[:3], device=output.device, requires_grad=True)
        self.gates.append(_Gate(call.site.name, gate, real))
        return output * gate[..., None].to(output.dtype)

    def end_batch(self, outputs: Any, batch: Mapping[str, Any]) -> None:
        loss = summed_loss(self.model, outputs, batch) if self.loss is None else self.loss(outputs, batch)
        gates, self.gates = self.gates, []
        gradients = torch.autograd.grad(loss, [gate.value for gate in gates], allow_unused=True)
        whole: dict[str, torch.Tensor] = {}
        for gate, gradient in zip(gates, gradients, strict=True):
            found = torch.zeros_like(gate.value) if gradient is None else gradient  # None: the loss does not see it
            found = as_double(found).masked_fill(~gate.real[..., None], 0.0)
            if self.per == "token":
                self.sum_up(gate.site, found.abs().sum((0, 1)), int(gate.real.sum()))
            elif self.per == "example":
                self.sum_up(gate.site, found.sum(1).abs().sum(0), len(found))
            else:
                whole[gate.site] = whole.get(gate.site, 0.0) + found.sum((0, 1))
        for name, total in whole.items():
            self.sum_up(name, total.abs(), 1)


class AMP(SummedMethod):
    """Mean l1 norm of what a head adds to the layer's output, its values through its slice of the output projection.

    First over the tokens of an example, then over examples, as the released code does (arXiv 2504.21174).
    """

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        super().__init__(model, sites)
        self.paths = {site.name: output_projection(model, site) for site in sites}

    def add(self, call: AttentionCall, output: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        heads, dim = output.shape[2:]
        weight = projection_weight(self.model, self.paths[call.site.name], heads * dim)
        values = output.to(weight.dtype)
        parts = [values[:, :, head] @ weight[:, head * dim : (head + 1) * dim].mT for head in range(heads)]
        norms = torch.stack([as_double(part.abs().sum(-1)) for part in parts], dim=-1)  # (B, T, H)
        self.sum_up(call.site.name, *sum_of_example_means(norms, real.to(norms.device)))
        return output


class Entropy(SummedMethod):
    """How focused a head's attention is: one minus its entropy over that of uniform attention to the visible keys.

    Rows that see a single key are left out. With learned sinks, attention to keys is scaled to a sum of one first.
    """

    at = "base"  # the weights that the base implementation computes

    def add(self, call: AttentionCall, output: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        visible = seen_by_all_heads(call)
        counts = visible.sum(-1).expand(real.shape)
        rows = real & (counts > 1)
        most = as_double(counts[rows]).log()
        found = []
        for head in range(output.shape[2]):
            weights = as_double(attention_probabilities(call, head, visible[:, None])[rows])
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
            found.append((1.0 - torch.special.entr(weights).sum(-1) / most).sum())
        self.sum_up(call.site.name, torch.stack(found), int(rows.sum()))
        return output


class FLAP(Method):
    """How much the output would lose when a head's channels are replaced by their means (arXiv 2312.11983).

    The channels of the output projection's input are scored, standardised per layer, and averaged per head.
    """

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite], metric: Metric = "wifv") -> None:
        super().__init__(model, sites)
        self.metric = metric
        self.paths = {site.name: output_projection(model, site) for site in sites}
        self.moments = {site.name: RunningMoments() for site in sites}

    def add(self, call: AttentionCall, output: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        self.moments[call.site.name].add(output.flatten(2), real)
        return output

    def scores(self, normalise: bool) -> dict[str, torch.Tensor]:
        found = {}
        for name, moments in self.moments.items():
            known = moments.statistics()
            weight = projection_weight(self.model, self.paths[name], len(known.mean))
            channels = fluctuation(known, weight, self.metric)
            if normalise:
                channels = standardised(channels)
            found[name] = channels.view(self.sites[name].query_heads or 0, -1).mean(-1)
        return found

    def state(self) -> State:
        parts = {
            f"{key}.{name}": value for name, moments in self.moments.items() for key, value in moments.state().items()
        }
        return {**super().state(), **parts}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        super().load(state)
        for name, moments in self.moments.items():
            moments.load({key: state[f"{key}.{name}"] for key in moments.state()})


class Magnitude(Method):
    """Frobenius norm of all weights that belong to a head; those of a kv head count for each of its query heads."""

    needs_data = False

    def scores(self, normalise: bool) -> dict[str, torch.Tensor]:
        found = {}
        for site in self.sites.values():
            heads, kv_heads = site.query_heads or 0, site.kv_heads or site.query_heads or 0
            if heads % kv_heads:
                raise NotImplementedError(
                    f"{site.name} has {heads} query heads on {kv_heads} kv heads: which belong together is not known."
                )
            squares = torch.zeros(heads, dtype=torch.float64)
            for part in head_projections(self.model, site):
                weight = projection_weight(self.model, part.projection).cpu().double()
                per_channel = weight.square().sum(1 if part.side == "rows" else 0)
                each = per_channel[part.index].sum(-1)
                squares += each if part.of == "query" else each.repeat_interleave(heads // kv_heads)
            found[site.name] = squares.sqrt()
        return by_layer_norm(found) if normalise else found


class Random(Method):
    """Uniform in 0 to 1, from a seed: the baseline that every method should beat."""

    needs_data = False

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite], seed: int = 0) -> None:
        super().__init__(model, sites)
        self.seed = seed

    def scores(self, normalise: bool) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {
            site.name: torch.rand(site.query_heads or 0, generator=generator, dtype=torch.float64)
            for site in self.sites.values()
        }


METHODS: dict[str, type[Method]] = {
    "michel": Michel,
    "flap": FLAP,
    "amp": AMP,
    "entropy": Entropy,
    "magnitude": Magnitude,
    "random": Random,
}


def options(method: str) -> dict[str, Any]:
    """The options that a method takes, and their defaults."""
    parameters = list(inspect.signature(METHODS[method]).parameters.values())[2:]
    return {parameter.name: parameter.default for parameter in parameters}


def predicts_next_token(model: nn.Module) -> bool:
    """Whether its loss shifts labels: a causal language model."""
    base: Any = base_model(model)
    return bool(base.can_generate()) and not base.config.is_encoder_decoder


def with_labels(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with labels: its own, or the tokens of a causal language model but for padding; else ValueError."""
    if "labels" in batch:
        return batch
    if not predicts_next_token(model) or "input_ids" not in batch:
        raise ValueError(
            f"There are no labels in a batch of {type(model).__name__}. Only a causal language model takes its own "
            "tokens as labels; elsewhere give labels, or a loss of your own."
        )
    labels, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        labels = labels.masked_fill(mask == 0, -100)
    return {**batch, "labels": labels}


def label_count(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Number of labels that the model's own loss is the mean over."""
    labels = batch["labels"]
    if labels.dim() < 2 or labels.is_floating_point():
        return len(labels)
    counted = labels[:, 1:] if predicts_next_token(model) else labels
    return int((counted != -100).sum())


def summed_loss(model: nn.Module, outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """The model's own loss as a sum, so that what an example adds to it does not depend on its batch."""
    loss: torch.Tensor | None = getattr(outputs, "loss", None)
    if loss is None or "labels" not in batch:
        raise ValueError(f"{type(model).__name__} gave no loss for the labels of a batch; give loss=...")
    return loss * label_count(model, batch)
