"""What looks at the calls of an attention module: no variant, and in no chain's order."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .call import AttentionCall
from .packing import CHILD
from .variant import AttentionOutput

See = Callable[[AttentionCall, torch.Tensor, torch.Tensor | None], torch.Tensor]
Place = Literal["model", "base"]
_PROBES = "_patchattn_probes"  # attribute of an attention module that a probe looks at
_any_placed = False  # ever, in this process: most never ask a module, which takes long where it has none


@dataclass(frozen=True, eq=False)
class Probe:
    """One look at the calls of a chain of variants.

    Attributes:
        see: gets the call, its output `(B, Tq, H, D)` and its weights `(B, H, Tq, Tk)`, or `None`; what it returns goes
            on as the output.
        at: outside of all variants, or inside of them all.
        reaches_base: variants may not compute by an operation of their own in place of the base implementation.
        weights: computes weights from a call. A variant that computes attention weights itself is then looked at in
            place of the base, and given these where the base gives none.
    """

    see: See
    at: Place
    reaches_base: bool = False
    weights: Callable[[AttentionCall], torch.Tensor] | None = None

    def depth(self, innermost: Sequence[bool]) -> int:
        """How many variants it looks behind, of those that say whether they compute weights themselves."""
        if self.at == "model":
            return 0
        own = self.weights is not None and any(innermost)
        return list(innermost).index(True) if own else len(innermost)


@dataclass(frozen=True)
class Looks:
    """What probes do in one call of a chain.

    Attributes:
        probes: on the attention module.
        innermost: of each variant that acts, outermost first, whether it computes attention weights itself.
    """

    probes: tuple[Probe, ...] = ()
    innermost: tuple[bool, ...] = ()

    @property
    def at_base(self) -> bool:
        """Whether the base implementation must be called, so that a probe has something to look at."""
        return any(probe.at == "base" for probe in self.probes)

    @property
    def reaches_base(self) -> bool:
        return any(probe.reaches_base for probe in self.probes)

    def shown(
        self, depth: int, call: AttentionCall, output: torch.Tensor, weights: torch.Tensor | None
    ) -> AttentionOutput:
        """Show a call behind so many variants, and its result, to the probes that look there: what goes on."""
        if weights is None and depth == len(self.innermost) and any(self.innermost):
            fill = next((probe.weights for probe in self.probes if probe.weights is not None), None)
            weights = None if fill is None else fill(call)
        for probe in self.probes:
            if probe.depth(self.innermost) == depth:
                output = probe.see(call, output, weights)
        return output, weights


class Probes:
    """The probes on one attention module, whichever of PEFT's chains runs there. A copy of the module has none.

    Attributes:
        chain: what the module runs while it has no variants: an empty chain, which is not a child of it.
        placed: the probes.
    """

    def __init__(self, chain: nn.Module | None = None) -> None:
        self.chain = chain
        self.placed: tuple[Probe, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Probes":
        return Probes(copy.deepcopy(self.chain, memo))

    def __reduce__(self) -> Any:
        return Probes, (self.chain,)


def chain_on(module: nn.Module) -> nn.Module | None:
    """The chain that an attention module runs, or PEFT's wrapper around several."""
    child = module._modules.get(CHILD)
    if child is not None:
        return child
    probes: Probes | None = getattr(module, _PROBES, None)
    return None if probes is None else probes.chain


def probes_on(module: nn.Module) -> tuple[Probe, ...]:
    """The probes that look at the calls of an attention module."""
    if not _any_placed:
        return ()
    # getattr, since compiled code does not notice it when a key of the module's dictionary comes or goes
    probes: Probes | None = getattr(module, _PROBES, None)
    return () if probes is None else probes.placed


def place(module: nn.Module, probe: Probe, chain: Callable[[], nn.Module]) -> None:
    """Put a probe on an attention module; `chain` makes the empty one that it runs, where it runs none."""
    global _any_placed
    _any_placed = True
    probes: Probes = vars(module).setdefault(_PROBES, Probes())
    probes.placed = (*probes.placed, probe)
    if chain_on(module) is None:
        probes.chain = chain()


def take_off(module: nn.Module, probe: Probe) -> nn.Module | None:
    """Take a probe off an attention module. Returns the empty chain that it ran, if this was the last probe."""
    probes: Probes | None = vars(module).get(_PROBES)
    if probes is None:
        return None
    probes.placed = tuple(other for other in probes.placed if other is not probe)
    return None if probes.placed else forget_probes(module)


def forget_probes(module: nn.Module) -> nn.Module | None:
    """An attention module is as it was before the first probe. Returns the empty chain that it ran."""
    probes: Probes | None = vars(module).pop(_PROBES, None)
    return None if probes is None else probes.chain


def is_probed(model: nn.Module) -> bool:
    """Whether a probe is on any attention module of the model."""
    return any(probes_on(module) for module in model.modules())


def refuse_probed(model: nn.Module) -> None:
    """ValueError while a probe is on the model, which would not see what is exchanged under it."""
    if is_probed(model):
        raise ValueError(f"A probe is on this {type(model).__name__}: close it, then patch or unpatch the model.")
