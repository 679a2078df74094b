"""Which model is meant, and which of its attention modules."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .host import find_sites, host
from .linear import is_dispatched
from .sites import AttentionSite


def expect_model(asker: str, given: Any) -> None:
    """TypeError for what is no module; where one is meant, a pipeline's or that of a name, it says how to have it."""
    if isinstance(given, nn.Module):
        return
    held = next((name for name, value in getattr(given, "__dict__", {}).items() if isinstance(value, nn.Module)), None)
    if held is not None:
        hint = f", whose model is its .{held}: give that."
    elif isinstance(given, str):
        hint = ": load it first, with from_pretrained of a class such as transformers' AutoModelForCausalLM."
    else:
        hint = "."
    raise TypeError(f"{asker} expects a model, got {type(given).__name__}{hint}")


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model itself, out of a PeftModel or a compiled or data-parallel wrapper."""
    if not isinstance(model, PreTrainedModel):
        for attribute in ("_orig_mod", "module"):  # of torch.compile, and of the data-parallel wrappers
            inner = model._modules.get(attribute)
            if inner is not None:
                return base_model(inner)
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        return base_model(model.get_base_model())  # type: ignore[operator]
    if not hasattr(model, "config"):
        raise TypeError(f"Expected a transformers model (one with a config), got {type(model).__name__}.")
    return model


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs; accelerate moves those of a model whose weights it keeps elsewhere."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" and any(map(is_dispatched, model.modules())) else device


def select_sites(
    model: nn.Module, *, layers: int | Iterable[int] | None = None, modules: str | Iterable[str] | None = None
) -> list[AttentionSite]:
    """The attention sites that `layers` and `modules` choose; see `patch_model`."""
    sites = find_sites(model)
    undispatched = host().find_undispatched(model)
    family = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    if undispatched and (not sites or modules is None):
        name, module = undispatched[0]
        hint = " Choose the others with modules=..." if sites else ""
        raise NotImplementedError(
            f"{type(model).__name__} (model type {family!r}) cannot be patched: {type(module).__name__} ({name}) "
            f"computes attention itself and does not call transformers' attention interface.{hint}"
        )
    if not sites:
        raise NotImplementedError(
            f"{type(model).__name__} (model type {family!r}) cannot be patched: no attention module of it calls "
            "transformers' attention interface."
        )
    if modules is not None:
        patterns = _compiled(modules)
        for pattern in patterns:
            if not any(pattern.search(site.name) for site in sites):
                raise ValueError(
                    f"modules={pattern.pattern!r} matches none of the {len(sites)} attention modules, such as "
                    f"{sites[0].name!r}."
                )
        sites = [site for site in sites if any(pattern.search(site.name) for pattern in patterns)]
    if layers is not None:
        given: Any = [layers] if isinstance(layers, Integral) else layers
        if not isinstance(given, Iterable) or isinstance(given, str | bytes):
            raise TypeError(f"layers must be an integer or several, got {layers!r}.")
        wanted = list(given)
        there = {site.layer_index for site in sites}
        for index in wanted:
            if not isinstance(index, Integral) or isinstance(index, bool):
                raise TypeError(f"layers must be integers, got {index!r}.")
            if index not in there:
                raise ValueError(f"There is no layer {index}: layers with attention are {_ranges(sorted(there))}.")
        if not wanted:
            raise ValueError("layers is empty: nothing would be patched.")
        sites = [site for site in sites if site.layer_index in wanted]
    return sites


def _compiled(modules: Any) -> list[re.Pattern[str]]:
    given = [modules] if isinstance(modules, str) else modules
    if not isinstance(given, Iterable) or isinstance(given, bytes | Mapping):
        raise TypeError(f"modules must be a regular expression or several, got {modules!r}.")
    patterns = []
    for each in given:
        if not isinstance(each, str):
            raise TypeError(f"modules must be regular expressions, got {each!r}.")
        try:
            patterns.append(re.compile(each))
        except re.error as error:
            raise ValueError(f"modules={each!r} is not a valid regular expression: {error}.") from error
    if not patterns:
        raise ValueError("modules is empty: nothing would be patched.")
    return patterns


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, every module's own mode restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0 to 2, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)


def causal_sites(model: nn.Module, sites: Iterable[AttentionSite]) -> list[AttentionSite]:
    """Those of some attention modules that are causal self-attention, as transformers asks."""
    return [site for site in sites if not site.is_cross and getattr(model.get_submodule(site.name), "is_causal", True)]


def require_causal(model: nn.Module, sites: Iterable[AttentionSite], *, by: str, because: str) -> list[AttentionSite]:
    """The same; NotImplementedError if there is none, with the name of what acts in them alone, and the reason."""
    causal = causal_sites(model, sites)
    if not causal:
        raise NotImplementedError(
            f"{by} does not support bidirectional or cross: {because}, and none of the chosen attention modules of "
            f"{type(model).__name__} is causal self-attention."
        )
    return causal


def require_self(sites: Iterable[AttentionSite], *, by: str, because: str) -> list[AttentionSite]:
    """Those of some attention modules that are self-attention, causal or not.

    Raises:
        NotImplementedError: there is none; with the name of what acts in them alone, and the reason.
    """
    found = [site for site in sites if not site.is_cross]
    if not found:
        raise NotImplementedError(f"{by} does not support cross: {because}.")
    return found


def require_bidirectional(
    model: nn.Module, sites: Iterable[AttentionSite], *, by: str, because: str
) -> list[AttentionSite]:
    """Those of some attention modules that are bidirectional self-attention.

    Raises:
        NotImplementedError: there is none; with the name of what acts in them alone, and the reason.
    """
    sites = list(sites)
    causal = {site.name for site in causal_sites(model, sites)}
    found = [site for site in sites if not site.is_cross and site.name not in causal]
    if not found:
        raise NotImplementedError(
            f"{by} does not support causal or cross: {because}, and none of the chosen attention modules of "
            f"{type(model).__name__} is bidirectional self-attention."
        )
    return found
