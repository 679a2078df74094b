"""Losses on the routers of variants, for any training loop: balance their load, or let them specialise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import nn

from ..core.observation import observed
from ..core.report import Observation
from ..core.variant import Variant

Definition = Literal["paper", "released"]


class RouterLoss:
    """What the routers of a model did in the forwards of one block; called, it gives their loss."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._has_grad = torch.is_grad_enabled()
        self._routing: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._without_grad: set[str] = set()  # attention modules that ran without gradients in a block that has them

    def note(self, seen: Observation) -> None:
        """Keep what one layer reports. Nothing is computed here: under activation checkpointing this runs inside the
        part that is run again without it, and both must do the same."""
        if "router_probability" not in seen.values:
            return
        name, values = seen.site.name, seen.values
        if self._has_grad and not torch.is_grad_enabled():
            self._without_grad.add(name)
            return
        self._routing.append((name, values["router_probability"], values["router_choice"], seen.real_tokens()))

    def __call__(self) -> torch.Tensor:
        """The weighted loss, a scalar with gradients: mean over layers, and over forwards if the block held several.

        Forwards under `torch.no_grad`, such as those that a trainer runs for its metrics, do not count in a block that
        began with gradients.

        Raises:
            ValueError: no forward ran in the block.
            NotImplementedError: a router ran without gradients alone, as under re-entrant activation checkpointing.
        """
        if never := self._without_grad - {name for name, *_ in self._routing}:
            raise NotImplementedError(
                f"The router of {min(never)} ran, but not with gradients, so that no loss on it can train anything. "
                "Re-entrant activation checkpointing does that: pass gradient_checkpointing_kwargs="
                '{"use_reentrant": False}. So does a forward under torch.no_grad(): leave frozen towers out of the '
                "patch with modules=..."
            )
        if not self._routing:
            raise ValueError("No router ran: call the model inside the `with` block of this loss.")
        losses = [self._of_layer(*routing) for _, *routing in self._routing]
        return self.weight * torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    def _of_layer(self, probability: torch.Tensor, choice: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        tokens = real.expand(probability.shape[:2]).sum().clamp(min=1)
        real = real.unsqueeze(-1)
        mean_probability = probability.where(real, 0.0).sum(dim=(0, 1)) / tokens
        load = choice.where(real, 0.0).sum(dim=(0, 1)) / tokens
        return self.of_shares(mean_probability, load)

    def of_shares(self, probability: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
        """One layer's loss, from the mean probability of its heads and the share of tokens that choose them, `(R,)`."""
        raise NotImplementedError


class BalanceLoss(RouterLoss):
    """The load-balance loss of one `balance_loss` block."""

    def __init__(self, weight: float, definition: Definition) -> None:
        super().__init__(weight)
        self.definition = definition

    def of_shares(self, probability: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
        loss = (probability * load).sum()
        return loss * len(load) if self.definition == "released" else loss


class SpecialiseLoss(RouterLoss):
    """The specialisation loss of one `specialise_loss` block."""

    def of_shares(self, probability: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
        return torch.special.entr(probability).sum()


@contextmanager
def balance_loss(model: nn.Module, weight: float = 0.01, definition: Definition = "paper") -> Iterator[BalanceLoss]:
    """Collect the load-balance loss of a model whose variants route, such as MoH, while the block runs.

    With P_i the mean probability of head i over the tokens and f_i the share of tokens that choose it, padding
    excluded, a layer's loss is `sum_i P_i f_i` over the heads that are not shared (MoH); the model's is the
    mean over its layers. Nothing is kept on the model, and what activation checkpointing runs again in the backward
    pass is outside the block and does not count.

    Args:
        model: a patched model, in whatever wrapper (PeftModel, DistributedDataParallel, ...). In a process group every
            process has the loss of its own tokens, and averaging gradients averages them.
        weight: the paper's beta.
        definition: `paper` as above, or `released`: times the number of heads that are not shared, as in the released
            code.

    Yields:
        A `BalanceLoss`; call it after the forward. Scale its value as you scale your loss, for example by the number
        of accumulation steps.

    Raises:
        ValueError: no variant of the model routes, or an argument is out of range.
        NotImplementedError: when called, under re-entrant activation checkpointing.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import patchattn, torch
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=4, vocab_size=64))
        >>> model = patchattn.patch_model(model, "moh").train()
        >>> tokens = torch.randint(64, (2, 8))
        >>> with balance_loss(model) as balance:
        ...     loss = model(tokens, labels=tokens).loss
        >>> (loss + balance()).backward()
    """
    check_routing(model, weight, definition)
    loss = BalanceLoss(weight, definition)
    with observed(model, loss.note):
        yield loss


@contextmanager
def specialise_loss(model: nn.Module, weight: float = 0.01) -> Iterator[SpecialiseLoss]:
    """Collect a loss that lets routers settle on few heads, SHRP's second stage, while the block runs.

    With P_i the mean probability of head i over the tokens, padding excluded, a layer's loss is the entropy
    `-sum_i P_i log P_i` in nats; the model's is the mean over its layers. It falls as all tokens come to prefer the
    same head, the one that is then kept.

    Args:
        model: a model whose variants route, in whatever wrapper, as for `balance_loss`.
        weight: of the loss.

    Yields:
        A `SpecialiseLoss`; call it after the forward.

    Raises:
        ValueError, NotImplementedError: as `balance_loss`.
    """
    check_routing(model, weight)
    loss = SpecialiseLoss(weight)
    with observed(model, loss.note):
        yield loss


def check_routing(model: nn.Module, weight: float, definition: str = "paper") -> None:
    """Refuse arguments of losses on routers that make no sense."""
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not weight >= 0:
        raise ValueError(f"The weight of a loss on routers must be a number of at least 0, got {weight!r}.")
    if definition not in get_args(Definition):
        raise ValueError(f"definition must be one of {', '.join(map(repr, get_args(Definition)))}, got {definition!r}.")
    if not any(isinstance(module, Variant) and module.routes for module in model.modules()):
        raise ValueError(
            f"No variant of this {type(model).__name__} chooses heads per token, so that there is nothing to balance. "
            'Patch it first, for example with patch_model(model, "moh").'
        )
