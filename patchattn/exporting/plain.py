"""The plain model that computes what a patched one computes: its configuration, its shapes, its weights."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from ..core.host import find_sites
from ..core.linear import is_adapted, is_dispatched
from ..core.packing import CHILD
from ..core.patching import active_chains
from ..core.selection import base_model
from ..core.sites import AttentionSite
from ..hosts.transformers.bases import original_config
from ..hosts.transformers.sites import HEAD_DIM
from ..surgery.change import SurgeryVariant
from ..surgery.heads import HeadSurgery, kv_fields, query_fields

_NOWHERE = torch.device("meta")


def plain_model(model: nn.Module) -> Any:
    """An unpatched model of the same class, whose weights and configuration say what a patch does.

    It is there to be saved: the weights are those of the patched model, where nothing had to change, and what a
    checkpoint does not hold, such as tables of rotary embedding, has no values. The patched model stays as it is.

    Args:
        model: a patched model.

    Raises:
        ValueError: it is not patched, carries adapters, or its weights are not all in one place.
        NotImplementedError: it is quantised or sharded, or the patch cannot be said in its configuration; the message
            names the variant, and what can be said instead.
        TypeError: `model` is not a transformers model.
    """
    base: Any = base_model(model)
    chains = active_chains(base)
    if not chains:
        raise ValueError(f"{type(base).__name__} is not patched: its own save_pretrained writes a plain checkpoint.")
    _refuse_elsewhere(base)
    kind, variants = (
        type(base).__name__,
        [
            (f"{variant_name!r} on {name}", variant)
            for name, chain in chains.items()
            for variant_name, variant in chain.variants().items()
            if not variant.is_identity
        ],
    )
    for who, variant in variants:
        if isinstance(variant, SurgeryVariant):
            with _naming(who, kind):
                variant.check_plain()
    weights = {name: tensor for name, tensor in base.state_dict().items() if f".{CHILD}." not in name}
    plain = _shaped_like(base, weights, _even_choice(base))
    missing = {name: tensor for name, tensor in plain.state_dict().items() if name not in weights}
    zeros = {name: torch.zeros(t.shape, dtype=base.dtype, device=base.device) for name, t in missing.items()}
    plain.load_state_dict({**weights, **zeros}, assign=True)
    plain.tie_weights()
    for who, variant in variants:
        with _naming(who, kind):
            variant.fold(plain)
    if getattr(base, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(base.generation_config)
    return plain.eval()


@contextmanager
def _naming(who: str, kind: str) -> Iterator[None]:
    """Say which variant cannot be said, and what is left."""
    try:
        yield
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{who} cannot be exported as a plain {kind}: {str(error).removesuffix('.')}. "
            "patchattn.save_pretrained(model, folder) saves the patched model."
        ) from error


def _refuse_elsewhere(base: Any) -> None:
    """ValueError or NotImplementedError unless all weights are plain tensors of the model, on one device."""
    kind = type(base).__name__
    if hasattr(base, "peft_config") or any(is_adapted(module) for module in base.modules()):
        raise ValueError(f"This {kind} carries a PEFT adapter: export what merge_and_unload() returns.")
    if any(is_dispatched(module) for module in base.modules()):
        raise ValueError(
            f"This {kind} is offloaded or dispatched by accelerate: load it on one device, without device_map."
        )
    tensors = [*base.parameters(), *base.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(f"This {kind} has weights without values (on the meta device): load them before exporting it.")
    if getattr(base, "hf_quantizer", None) is not None or getattr(base.config, "quantization_config", None) is not None:
        raise NotImplementedError(f"This {kind} is quantised: patch and export the model of before, then quantise it.")
    odd = {type(tensor).__name__ for tensor in tensors if type(tensor) not in (nn.Parameter, torch.Tensor)}
    odd -= {"Buffer"}
    if odd:
        raise NotImplementedError(
            f"This {kind} holds weights as {', '.join(sorted(odd))}, which are sharded or quantised: export it from "
            "one process that holds them whole."
        )
    if len({tensor.device for tensor in tensors}) > 1:
        raise ValueError(f"This {kind} lies on several devices: move it to one, as with model.to('cpu').")


def _even_choice(base: nn.Module) -> str:
    """What those who changed shapes say of how to choose alike everywhere."""
    variants = [variant for chain in active_chains(base).values() for variant in chain.variants().values()]
    said = {variant.even_choice for variant in variants if isinstance(variant, HeadSurgery)}
    return " ".join(sorted(said))


def _shaped_like(base: Any, weights: Mapping[str, torch.Tensor], advice: str) -> Any:
    """A model of the same class, without values, in which the weights have a place, and besides them only biases."""
    copies: dict[int, Any] = {}
    config = copy.deepcopy(base.config, copies)
    vars(config).pop("auto_map", None)
    plain = _made(base, config, advice)
    if _say_heads(base, plain, copies, advice):
        plain = _made(base, config, advice)
    for each in [config, *_inner(config)]:
        plain = _with_biases(base, plain, config, each, weights, advice)
        plain = _with_widths(base, plain, config, each, weights, advice)
    if wrong := _unlike(plain, weights):
        shown = "; ".join(f"{name} {mine} where a plain one has {theirs}" for name, mine, theirs in wrong[:3])
        raise NotImplementedError(
            f"No {type(config).__name__} describes a {type(base).__name__} of these shapes: {shown}"
            f"{' and others' if len(wrong) > 3 else ''}. {advice}".rstrip()
        )
    return plain


def _made(base: Any, config: Any, advice: str) -> Any:
    try:
        validate = getattr(config, "validate", None)
        if validate is not None:
            validate()
        with _NOWHERE:
            return type(base)(copy.deepcopy(config))
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise NotImplementedError(
            f"{type(config).__name__} does not allow these sizes ({' '.join(str(error).split())[:300]}). "
            f"{advice}".rstrip()
        ) from error


def _say_heads(base: Any, plain: Any, copies: Mapping[int, Any], advice: str) -> bool:
    """Write numbers of heads to the copies of the configurations of those modules whose numbers have changed."""
    before = {site.name: site for site in find_sites(plain)}
    counts: dict[int, tuple[Any, Any, set[tuple[int | None, ...]]]] = {}
    changed = set()
    for site in find_sites(base):
        module: Any = base.get_submodule(site.name)
        own = original_config(module)
        sizes = (site.query_heads, site.kv_heads, site.head_dim)
        target = copies.get(id(own)) or _alike(base.config, own, copies)
        counts.setdefault(id(target), (module, target, set()))[2].add(sizes)
        if sizes != _sizes(before[site.name]):
            changed.add(id(target))
    for key in changed:
        module, target, found = counts[key]
        if len(found) > 1:
            shown = ", ".join(f"{queries} query heads on {kv}" for queries, kv, _ in sorted(found, key=str))
            raise NotImplementedError(
                f"Attention modules of one {type(target).__name__} have {shown} kv heads, and it can name one number "
                f"of each for all. {advice}".rstrip()
            )
        ((queries, kv, width),) = found
        for names, count in ((query_fields(target), queries), (kv_fields(module), kv)):
            for name in names:
                setattr(target, name, count)
        fields = [name for name in vars(target) if HEAD_DIM.fullmatch(name)]
        for name in fields or ["head_dim"]:
            if not isinstance(getattr(target, name, None), int):
                setattr(target, name, width)
    return bool(changed)


def _sizes(site: AttentionSite) -> tuple[int | None, ...]:
    return site.query_heads, site.kv_heads, site.head_dim


def _alike(config: Any, own: Any, copies: Mapping[int, Any]) -> Any:
    """The copy of the configuration that a tower has made its own one of."""
    found = [each for each in [config, *_inner(config)] if type(each) is type(own)]
    if len(found) != 1:
        raise NotImplementedError(
            f"Which part of {type(config).__name__} a module with a {type(own).__name__} was made of is not known."
        )
    return copies.get(id(found[0]), found[0])


def _inner(config: Any) -> Iterator[Any]:
    """The configurations inside one, at any depth."""
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from _inner(value)


def _unlike(plain: nn.Module, weights: Mapping[str, torch.Tensor]) -> list[tuple[str, Any, Any]]:
    """Names, shapes wanted and shapes there of the tensors that do not fit; further biases may be there."""
    there = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    names = [*weights, *(name for name in there if name not in weights and not name.endswith("bias"))]
    pairs = [(name, tuple(weights[name].shape) if name in weights else None, there.get(name)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _with_biases(
    base: Any, plain: Any, config: Any, each: Any, weights: Mapping[str, torch.Tensor], advice: str
) -> Any:
    """Set what a configuration says of biases where that makes a place for some; zeros go to the others."""
    for name, value in list(vars(each).items()):
        if value is not False or "bias" not in name:
            continue
        wrong = _unlike(plain, weights)
        if not any(there is None and bias.endswith("bias") for bias, _, there in wrong):
            break
        setattr(each, name, True)
        tried = _made(base, config, advice)
        if len(_unlike(tried, weights)) < len(wrong):
            plain = tried
        else:
            setattr(each, name, value)
    return plain


def _with_widths(
    base: Any, plain: Any, config: Any, each: Any, weights: Mapping[str, torch.Tensor], advice: str
) -> Any:
    """Set widths of a configuration where the same one is another in all tensors that do not fit."""
    for name, value in list(vars(each).items()):
        wrong = _unlike(plain, weights)
        sizes = {(old, new) for _, mine, theirs in wrong for old, new in zip(theirs or (), mine or (), strict=False)}
        for old, new in sorted(sizes):
            if isinstance(value, bool) or value != old or old == new:
                continue
            setattr(each, name, new)
            try:
                tried = _made(base, config, advice)
            except NotImplementedError:
                tried = plain
            if len(_unlike(tried, weights)) < len(wrong):
                plain = tried
                break
            setattr(each, name, value)
    return plain
