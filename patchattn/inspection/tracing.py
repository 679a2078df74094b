"""Which modules of a model made what: norms in front of attention, found by what tensors go from one to the next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.probing import probed
from ..core.sites import AttentionSite


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm `gain * x / size(x) + bias`, of x without its mean where `centred`."""

    gain: torch.Tensor
    bias: torch.Tensor
    centred: bool

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., E)` without the division by the size and without the bias."""
        return self.gain * (x - x.mean(-1, keepdim=True) if self.centred else x)


@dataclass(eq=False)
class Run:
    """A call of a module.

    Attributes:
        given, gave: its first input and output with a number for each channel of the residual stream.
    """

    module: nn.Module
    given: torch.Tensor | None
    gave: torch.Tensor | None


class Traced:
    """One forward of a model, with what each module got and gave.

    Args:
        base: a causal language model in evaluation mode.
        ids: `(B, T)`.
        sites: attention modules that are looked at.
        see: gets their calls and outputs, as of `probed`.
        refused: makes the error for what is not recognised, out of a reason.
    """

    def __init__(
        self,
        base: Any,
        ids: torch.Tensor,
        sites: Sequence[AttentionSite],
        see: Callable[[AttentionCall, torch.Tensor], None],
        refused: Callable[[str], Exception],
    ) -> None:
        self.refused = refused
        self.embedding = wide(base.get_input_embeddings().weight)
        self.width = self.embedding.shape[1]
        self.runs: dict[str, Run] = {}  # by name, in the order in which they ended

        def after(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                given = self._first([*args, *kwargs.values()])
                self.runs.setdefault(name, Run(module, given, self._first(output)))

            return hook

        named = [(name, module) for name, module in base.named_modules() if name]
        handles = [module.register_forward_hook(after(name), with_kwargs=True) for name, module in named]
        try:
            with probed(base, see, modules=[f"^{site.name}$" for site in sites]):
                base(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _first(self, given: Any) -> torch.Tensor | None:
        """The first tensor of the residual stream's width among what a module got or gave."""
        if isinstance(given, torch.Tensor):
            is_stream = given.is_floating_point() and given.dim() == 3 and given.shape[-1] == self.width
            return given if is_stream else None
        values = given if isinstance(given, list | tuple) else list(given.values()) if hasattr(given, "values") else []
        found = (self._first(value) for value in values)
        return next((one for one in found if one is not None), None)

    def maker(self, module: nn.Module, name: str | None = None) -> str | None:
        """Name of the module that made what another one got, which is known by itself or by its name."""
        run = next((run for each, run in self.runs.items() if each == name or (name is None and run.module is module)))
        if run.given is None:
            return None
        place = run.given.untyped_storage().data_ptr()
        for each, other in self.runs.items():
            same = other.gave is not None and other.gave.untyped_storage().data_ptr() == place
            if same and any(True for _ in other.module.parameters()):
                return each
        return None

    def norm(self, name: str) -> Norm:
        """Read a norm off what it makes of vectors; refuse what is none."""
        module = self.runs[name].module
        like = next(module.parameters(), self.embedding)
        ones = torch.full((1, 1, self.width), 1e3, device=like.device, dtype=like.dtype)  # far above any epsilon
        signs = ones * torch.tensor([1.0, -1.0], device=like.device).repeat(self.width // 2 + 1)[: self.width]
        plus, minus = wide(module(ones))[0, 0], wide(module(-ones))[0, 0]
        centred = torch.allclose(plus, minus, rtol=1e-3, atol=1e-4)
        bias = (plus + minus) / 2
        gain = (wide(module(signs.to(like.dtype)))[0, 0] - bias) / signs[0, 0].sign() if centred else plus - bias
        drawn = torch.randn(1, 1, self.width, generator=torch.Generator().manual_seed(0)) * 1e3
        drawn = drawn.to(like)
        x = wide(drawn)[0, 0]
        x = x - x.mean() if centred else x
        want = gain * x / x.square().mean().sqrt() + bias
        if self.width % 2 or not torch.allclose(
            wide(module(drawn))[0, 0], want, rtol=2e-2, atol=2e-2 * float(want.abs().max())
        ):
            raise self.refused(f"{name} ({type(module).__name__}) is no norm that is known")
        return Norm(gain, bias, centred)

    def check_added(self, site: AttentionSite) -> None:
        """Refuse a module whose output is changed before it is added to the residual stream."""
        run = self.runs[site.name]
        if run.gave is None:
            raise self.refused(f"{site.name} is not run on a text")
        place = run.gave.untyped_storage().data_ptr()
        for name, other in self.runs.items():
            outside = not name.startswith(site.name) and not site.name.startswith(f"{name}.")
            reads = other.given is not None and other.given.untyped_storage().data_ptr() == place
            if outside and reads and any(True for _ in other.module.parameters()):
                raise self.refused(f"{name} changes what {site.name} writes before it is added")


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Without gradients, in float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
