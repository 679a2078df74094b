"""Looking at what every head of a model gives, whatever the family and whatever is patched in already."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from ..bases import original_config, release_bases
from ..call import AttentionCall
from ..packing import CHILD
from ..patching import apply_patches
from ..plan import Patch
from ..seam import VariantChain
from ..selection import base_model
from ..sites import AttentionSite
from ..variant import (
    Attend,
    AttentionOutput,
    Variant,
    VariantConfig,
    VariantInfo,
    temporarily_registered,
    variant_info,
)

See = Callable[[AttentionCall, torch.Tensor], torch.Tensor]


class Recorder(Variant):
    """Hands every call and its output to `see`, and returns what that returns."""

    config_class = VariantConfig
    see: See

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        output, weights = inner(call)
        return self.see(call, output), weights


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
def recording(model: nn.Module, sites: Sequence[AttentionSite], see: See, *, outermost: bool = True) -> Iterator[None]:
    """Call `see(call, output)` in every attention of these sites, for the length of a `with` block.

    The output `(B, Tq, H, D)` goes on as what `see` returns. Variants that are patched in stay as they are.

    Args:
        model: a transformers model, patched or not.
        sites: of the model.
        see: gets the call as well.
        outermost: look at what goes to the output projection, after all variants, and at the model's own queries; else
            at what the base implementation gives, and gets.

    Raises:
        NotImplementedError: the model cannot be patched, or has a variant that nothing can come after.
    """
    base = base_model(model)
    modules = [base.get_submodule(site.name) for site in sites]
    for site, module in zip(sites, modules, strict=True):
        _refuse_innermost(site, module)
    with temporarily_registered(_INFO) as name:
        apply_patches(base, [Patch(name, VariantConfig(), tuple(site.name for site in sites))])
        try:
            for module in modules:
                _start(module, name, see, outermost)
            yield
        finally:
            for module in modules:
                _take_off(module, name)
            release_bases()


def _refuse_innermost(site: AttentionSite, module: nn.Module) -> None:
    chain = module._modules.get(CHILD)
    for name in chain._modules if chain is not None else ():
        if variant_info(name).innermost:
            raise NotImplementedError(
                f"{site.name} carries {name!r}, which computes attention weights itself, so that nothing can look at "
                "its heads: unpatch_model(model) first."
            )


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
        vars(module)["config"] = original_config(module)
