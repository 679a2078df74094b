"""Looking at what every head of a model gives, whatever the family and whatever is patched in already."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import nn

from .call import AttentionCall
from .chain import VariantChain
from .host import host
from .packing import CHILD
from .patching import apply_patches
from .plan import Patch
from .registry import temporarily_registered, variant_info
from .selection import base_model
from .sites import AttentionSite
from .variant import Attend, AttentionOutput, Variant, VariantConfig, VariantInfo

See = Callable[[AttentionCall, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Recorder(Variant):
    """Hands every call, its output and its weights to `see`, and returns what that returns."""

    config_class = VariantConfig
    see: See

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        output, weights = inner(call)
        return self.see(call, output, weights), weights


_INFO = VariantInfo(
    name="head_recorder",
    variant=Recorder,
    title="",
    arxiv_id=None,
    year=0,
    summary="Looks at the output of heads.",
    extra_parameters="none",
    needs_training=False,
)


@contextmanager
def recording(
    model: nn.Module, sites: Sequence[AttentionSite], see: See, *, outermost: bool = True, weights: bool = False
) -> Iterator[None]:
    """Call `see(call, output, weights)` in every attention of these sites, for the length of a `with` block.

    The output `(B, Tq, H, D)` goes on as what `see` returns. The weights `(B, H, Tq, Tk)` are `None` where the base
    implementation gives none. Variants that are patched in stay as they are.

    Args:
        model: a transformers model, patched or not.
        sites: of the model.
        see: gets the call as well.
        outermost: look at what goes to the output projection, after all variants, and at the model's own queries; else
            at what the base implementation gives, and gets.
        weights: look at variants that compute attention weights themselves as well, by the weights that they return;
            such a variant is then called with what the base implementation gets.

    Raises:
        NotImplementedError: the model cannot be patched, or has a variant that computes attention weights itself, and
            `weights` is false or the base implementation gives none.
    """
    base = base_model(model)
    modules = [base.get_submodule(site.name) for site in sites]
    own = {site.name: name for site, module in zip(sites, modules, strict=True) if (name := _innermost(module))}
    for site_name, variant in own.items():
        _refuse_innermost(site_name, variant, _chain(base.get_submodule(site_name)).base, weights)
    sites = [site for site in sites if site.name not in own]
    modules = [base.get_submodule(site.name) for site in sites]
    with ExitStack() as stack, temporarily_registered(_INFO) as name:
        for site_name, variant in own.items():
            stack.enter_context(_seen(_chain(base.get_submodule(site_name)), variant, see))
        apply_patches(base, [Patch(name, VariantConfig(), tuple(site.name for site in sites))])
        try:
            for module in modules:
                _start(module, name, see, outermost)
            yield
        finally:
            for module in modules:
                _take_off(module, name)
            host().release()


def _chain(module: nn.Module) -> VariantChain:
    return cast(VariantChain, module._modules[CHILD])


def _innermost(module: nn.Module) -> str | None:
    """Name of the variant of an attention module that computes attention weights itself."""
    names = _chain(module).names() if CHILD in module._modules else []
    return next((name for name in names if variant_info(name).innermost), None)


def _refuse_innermost(site_name: str, variant: str, base: str, weights: bool) -> None:
    if weights and base == "eager":
        return
    eager = 'load the model with attn_implementation="eager" and patch it again'
    raise NotImplementedError(
        f"{site_name} carries {variant!r}, which computes attention weights itself, so that nothing can look at its "
        f"heads: {eager if weights else 'unpatch_model(model) first'}."
    )


@contextmanager
def _seen(chain: VariantChain, name: str, see: See) -> Iterator[None]:
    """Look at what one variant is called with, and gives; also where its settings let it do nothing."""
    variant = chain.variants()[name]
    attend = variant.attend

    def shown(call: AttentionCall, inner: Attend) -> AttentionOutput:
        output, weights = inner(call) if variant.is_identity else attend(call, inner)
        return see(call, output, weights), weights

    vars(variant)["attend"] = shown
    if name not in chain.active:
        chain.active = (*chain.active, name)
    try:
        yield
    finally:
        del vars(variant)["attend"]
        chain._refresh()


def _start(module: nn.Module, name: str, see: See, outermost: bool) -> None:
    chain = cast(VariantChain, module._modules[CHILD])
    cast(Recorder, chain._modules[name]).see = see
    if outermost:
        for other in chain.names()[:-1]:
            chain._modules[other] = chain._modules.pop(other)
        chain._refresh()


def _take_off(module: nn.Module, name: str) -> None:
    chain = cast(VariantChain, module._modules[CHILD])
    del chain._modules[name]
    chain._refresh()
    if not chain.names():
        del module._modules[CHILD]
        host().disconnect(module)
