"""Looking at calls of attention, whatever the family and whatever is patched in already."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from .call import AttentionCall
from .chain import VariantChain, active_chain, retire
from .context import leave
from .hooks import remove_hooks
from .host import host
from .packing import CHILD
from .patching import active_chains, is_patched
from .probe import Place, Probe, See, chain_on, is_probed, place, probes_on, take_off
from .registry import variant_info
from .selection import base_model, select_sites
from .sites import AttentionSite
from .unfitting import refuse_parts


class PlacedProbe:
    """A probe on a model; `close`, or the end of a `with` block, takes it off."""

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite], probe: Probe) -> None:
        self._model, self._probe = model, probe
        self._modules: list[nn.Module] = []
        refuse_parts(sites, "calls of attention")
        active_chains(model)  # go by their names in this model
        modules = {site.name: model.get_submodule(site.name) for site in sites}
        host().refuse_bases(model, list(modules))
        try:
            for site in sites:
                self._modules.append(modules[site.name])
                _place(model, modules[site.name], site, probe)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take it off; the model is then as it was. A second time it does nothing."""
        for module in self._modules:
            _take_off(module, self._probe)
        if self._modules and not is_patched(self._model) and not is_probed(self._model):
            host().forget(self._model)
        self._modules = []
        self._model = nn.Module()
        host().release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def probed(
    model: nn.Module,
    see: Callable[[AttentionCall, torch.Tensor], None],
    *,
    layers: int | Iterable[int] | None = None,
    modules: str | Iterable[str] | None = None,
    at: Place = "model",
) -> PlacedProbe:
    """Call `see(call, output)` in every call of attention, from now until `close()` or the end of a `with` block.

    The model, patched or not, computes the same to the last bit. Nothing is detached: gradients reach what `see` keeps,
    and what it gets must not be changed in place. It is called as often as attention is: again where checkpointing runs
    a forward again, in `backward`; for each chunk, where a module attends in chunks; for each part, where a kv cache
    keeps some heads' keys apart. A model that is copied meanwhile is not looked at; an adapter that is added is. Where
    the model is compiled, so is `see`. What `see` raises ends the forward.

    Args:
        model: a transformers model, in whatever wrapper.
        see: gets an `AttentionCall`, whose `site` tells the layer, and the output `(B, Tq, H, D)` of all heads.
        layers: which layers, as in `patch_model`.
        modules: which attention modules, as in `patch_model`.
        at: `"model"` is outside of all variants: the queries that the model made, its keys and values as they are
            stored, and what goes to the output projection. `"base"` is inside of them all: what the base implementation
            is called with, and gives; as often as a variant calls it. Without variants both are the same.

    Returns:
        What takes the probe off.

    Raises:
        ValueError: no such layer, module or `at`.
        TypeError: `see` cannot be called, or an argument of the wrong type.
        NotImplementedError: the model's attention does not go through transformers' registry; several processes share
            its heads; or, in a call, `"base"`
            where a variant computed without the base implementation.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=4, vocab_size=64))
        >>> with probed(model, lambda call, output: print(call.site.name, tuple(output.shape)), layers=1):
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        model.layers.1.self_attn (1, 3, 4, 8)
    """
    if not callable(see):
        raise TypeError(f"see must be a function of a call and its output, got {type(see).__name__}.")
    if at not in ("model", "base"):
        raise ValueError(f'at must be "model" or "base", got {at!r}.')
    base = base_model(model)

    def look(call: AttentionCall, output: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        see(call, output)
        return output

    return PlacedProbe(base, select_sites(base, layers=layers, modules=modules), Probe(look, at))


@contextmanager
def recording(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    see: See,
    *,
    at: Place = "model",
    weights: Callable[[AttentionCall], torch.Tensor] | None = None,
) -> Iterator[None]:
    """`probed` for statistics: `see(call, output, weights)` gets weights too, and what it returns is the output.

    The weights `(B, H, Tq, Tk)` are `None` where the base implementation gives none. With `"base"`, variants compute
    through the base implementation, whatever faster they have.

    Args:
        model: a transformers model, patched or not.
        sites: of the model.
        see: gets the call as well.
        at: as in `probed`.
        weights: see `Probe`; for `"base"`.

    Raises:
        NotImplementedError: the model cannot be patched; or has a variant that computes attention weights itself, and
            `at` is `"base"` without `weights`.
    """
    base = base_model(model)
    if at == "base" and weights is None:
        for site in sites:
            _refuse_own_weights(site.name, base.get_submodule(site.name))
    with PlacedProbe(base, sites, Probe(see, at, reaches_base=at == "base", weights=weights)):
        yield


def _place(model: nn.Module, module: nn.Module, site: AttentionSite, probe: Probe) -> None:
    place(module, probe, lambda: VariantChain(site, host().base_of(module)))
    host().connect(model, module)


def _take_off(module: nn.Module, probe: Probe) -> None:
    own = take_off(module, probe)
    running: Any = own if chain_on(module) is None else chain_on(module)
    if not probes_on(module) and running is not None and not running.needs_context:
        norm = running.site.query_norm
        for hooked in [module] if norm is None else [module, module.get_submodule(norm)]:
            remove_hooks(hooked, host().owns)
        leave(module)
    if own is not None:
        retire(own)
        if CHILD not in module._modules:
            host().disconnect(module)


def _refuse_own_weights(site_name: str, module: nn.Module) -> None:
    child = module._modules.get(CHILD)
    names = [] if child is None else active_chain(child).names()
    if own := next((name for name in names if variant_info(name).innermost), None):
        raise NotImplementedError(
            f"{site_name} carries {own!r}, which computes attention weights itself, so that the base implementation "
            "does not tell what its heads attend to: unpatch_model(model) first."
        )
