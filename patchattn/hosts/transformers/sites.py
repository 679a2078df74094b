"""Finding attention sites.

A site is a module that makes queries of its input and whose `forward` looks its attention function up in transformers'
registry. That is read off tensors and the compiled code of `forward`, and geometry off tensors and configuration, so no
model family is named here.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from ...core.linear import LinearView
from ...core.sites import AttentionSite
from .sharding import find_shards

# The name of the registry that a dispatching `forward` refers to; unchanged since transformers 4.48.
REGISTRY_NAME = "ALL_ATTENTION_FUNCTIONS"

INLINE = "inline"  # the base of a module that computes attention in its own code; no configuration names it
_SOFTMAX = ("softmax", "Softmax", "scaled_dot_product_attention")  # of torch

_PREFIX, _SUFFIX = r"(?:to_|lin_|linear_|w_?)?", r"(?:_?(?:proj|projection|lin|linear|layer|states?|b_proj))?"
PROJECTION_ROLES = {
    "query": re.compile(rf"{_PREFIX}q(?:uery)?{_SUFFIX}", re.I),
    "key": re.compile(rf"{_PREFIX}k(?:ey)?{_SUFFIX}", re.I),
    "value": re.compile(rf"{_PREFIX}v(?:al(?:ue)?)?{_SUFFIX}", re.I),
    "fused": re.compile(r".*(?:qkv|query_?key_?value|c_attn|in_proj).*", re.I),
    "output": re.compile(
        r"(?:o|wo|out|c_proj|dense|proj|projection|out_?(?:proj|lin|layer)|o_proj|to_out|output)", re.I
    ),
}
# The first half of a low-rank query projection (multi-head latent attention), which reads the layer's input.
_QUERY_DOWN = re.compile(rf"{_PREFIX}q(?:uery)?_?a(?:_?(?:proj|projection|layer))?", re.I)
# One of several projections that a query is put together from: no single one tells the width of a head.
_QUERY_PART = re.compile(rf"{_PREFIX}q(?:uery)?_\w+_(?:proj|projection|layer)", re.I)
_QUERY_NORM = re.compile(r"(?:q|query)_?(?:layer_?)?(?:norm|ln)|(?:norm|ln|layer_?norm)_?(?:q|query)", re.I)
_ATTENTION = re.compile(r"attention|attn", re.I)
_NUMBERED = re.compile(r"(?:^|\.)\d+(?:\.|$)")
_IN_LAYERS = re.compile(r"(?:^|\.)\d+\.")
_CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.I)
HEAD_DIM = re.compile(r"(?:attention_)?head_(?:dim|size)|d_head|dim_per_head|d_kv|key_value_proj_dim|qk_head_dim")
_HEADS = re.compile(r"(?:num|n)_(?:attention_|attn_|query_|q_)?heads?")
_KV_HEADS = re.compile(r"(?:num|n)_(?:key_value|kv)_heads?")
MASK_ARGUMENTS = ("attention_mask", "mask")
_MEMORY_ARGUMENTS = ("key_value_states", "encoder_hidden_states", "cross_attention_states", "encoder_states")


def attention_forward(module_class: type[nn.Module]) -> Callable[..., Any]:
    """The undecorated `forward` of a module class."""
    return inspect.unwrap(module_class.forward)


def dispatches(module: nn.Module) -> bool:
    """Whether this module calls the attention function that transformers' registry names."""
    code = getattr(attention_forward(type(module)), "__code__", None)
    if code is None or REGISTRY_NAME not in code.co_names:
        return False
    # `getattr(registry, name, eager)` finds nothing there and always computes eagerly; a slip that transformers has.
    return "get_interface" in code.co_names or "getattr" not in code.co_names


def is_inline(module: nn.Module) -> bool:
    """Whether an attention module asks torch itself for a softmax, in its `forward` or in what that calls by name."""
    named = _ATTENTION.search(type(module).__name__) is not None
    kind: Any = type(module)
    return named and not dispatches(module) and _computes_softmax(kind)


@functools.cache
def _computes_softmax(module_class: Any) -> bool:
    return _names_softmax(attention_forward(module_class), module_class, set())


def _names_softmax(function: Any, module_class: type[nn.Module], asked: set[Any]) -> bool:
    """As `is_inline`, of a function of a module's class or of its file."""
    function = inspect.unwrap(getattr(function, "__func__", function)) if callable(function) else None
    if not isinstance(function, FunctionType) or function in asked or function.__module__.startswith("torch."):
        return False
    asked.add(function)
    names = list(names_in(function.__code__))
    if any(name in _SOFTMAX for name in names):
        return True
    return any(
        _names_softmax(called, module_class, asked)
        for name in names
        for called in (getattr(module_class, name, None), function.__globals__.get(name))
        if getattr(called, "__module__", None) == function.__module__
    )


def names_in(code: CodeType) -> Iterator[str]:
    """Names that a function refers to, those in functions within it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def projects(module: nn.Module) -> bool:
    """Whether queries can be made of the module's input: it has a matrix for that, or gets them ready-made.

    A module that has parameters but no projection attends with learned queries, such as one that mixes the outputs of
    earlier layers: its axes are not those of tokens and heads.
    """
    own = list(module.parameters())
    head_dim = next(_integers(module, HEAD_DIM), 1)
    return (
        not own
        or any(LinearView.of(child) is not None for child in module.modules() if child is not module)
        or any(p.dim() > 1 and sorted(p.shape)[-2] >= max(head_dim, 2) for p in own)
    )


def find_sites(model: nn.Module) -> list[AttentionSite]:
    """All attention sites of a model, in the order of its modules."""
    found = _attending(model)
    layers = _layers([name for name, _ in found])
    sites = [_describe(name, module, *layers[name]) for name, module in found]
    kinds: dict[tuple[str, str], set[bool]] = {}
    for site in sites:
        kinds.setdefault((site.tower, site.module_class), set()).add(_makes_keys(site))
    shards = find_shards(model, sites)
    return [
        replace(site, shares_keys=len(kinds[site.tower, site.module_class]) > 1, shard=shards.get(site.name))
        for site in sites
    ]


def _attending(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of attention sites, with their names: those that dispatch, and in towers where none does those that
    compute attention inline."""
    found = {name: module for name, module in model.named_modules() if dispatches(module) and projects(module)}
    left = [name for name, _ in _undispatched(model)]
    inline = {
        name: module
        for name, module in model.named_modules()
        if (name in left or not found) and is_inline(module) and _NUMBERED.search(name) and projects(module)
    }
    outer = {name for name in inline for other in inline if other.startswith(f"{name}.")}
    names = {name for name in inline if name not in outer} | set(found)
    return [(name, module) for name, module in model.named_modules() if name in names]


def _makes_keys(site: AttentionSite) -> bool:
    return not {"key", "fused"}.isdisjoint(site.projections)


def find_undispatched(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers of towers that attend without the registry and without a softmax of their own, so that nothing can be
    patched there.

    A tower is reported only if none of its layers dispatches: a hybrid model's linear attention is not a defect,
    and neither is a single pooling head. What lies inside of a site is followed with it; what a site lies in leaves
    attention to it, but for a softmax of its own.
    """
    sites = [name for name, _ in _attending(model)]
    return [
        (name, module)
        for name, module in _undispatched(model)
        if not any(f"{name}.".startswith(f"{site}.") for site in sites)
        and not (any(site.startswith(f"{name}.") for site in sites) and not is_inline(module))
    ]


def _undispatched(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found: dict[str, bool] = {}
    candidates: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if dispatches(module):
            found[_tower(name)] = True
        elif (
            _ATTENTION.search(type(module).__name__)
            and _IN_LAYERS.search(name)
            and sum(hasattr(child, "weight") for child in module.children()) >= 2
            and not _only_puts_out(module)
        ):
            candidates.append((name, module))
    return [(name, module) for name, module in candidates if not found.get(_tower(name))]


def _only_puts_out(module: nn.Module) -> bool:
    """Whether a module has norms and one square matrix, of which queries, keys and values are not made."""
    weights: list[Any] = [child.weight for child in module.children() if hasattr(child, "weight")]
    shapes = [weight.shape for weight in weights if weight is not None and weight.dim() > 1]
    return (
        len(shapes) == 1
        and len(shapes[0]) == 2
        and shapes[0][0] == shapes[0][1]
        and not list(module.parameters(recurse=False))
    )


def _describe(name: str, module: nn.Module, layer_index: int, layer_count: int) -> AttentionSite:
    arguments = tuple(
        parameter.name
        for parameter in list(inspect.signature(attention_forward(type(module))).parameters.values())[1:]
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    )
    memory = next((argument for argument in arguments[1:] if argument in _MEMORY_ARGUMENTS), None)
    is_cross = bool(getattr(module, "is_cross_attention", False)) or any(
        _CROSS.search(part) for part in (*name.split(".")[-2:], type(module).__name__)
    )
    projections = _projections(module)
    query_heads, kv_heads, head_dim = _geometry(module, projections)
    widths = {role: LinearView.at(module, child).in_features for role, child in projections.items()}
    down = next((LinearView.of(child) for key, child in module.named_children() if _QUERY_DOWN.fullmatch(key)), None)
    input_size = down.in_features if down else widths.get("query", widths.get("fused"))
    return AttentionSite(
        name=name,
        tower=_tower(name),
        layer_index=layer_index,
        layer_count=layer_count,
        module_class=type(module).__name__,
        is_cross=is_cross,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        input_size=input_size,
        memory_size=widths.get("key", input_size),
        projections=projections,
        projection_sizes=_projection_sizes(module, projections, down is not None),
        query_norm=next((child for child, _ in module.named_children() if _QUERY_NORM.fullmatch(child)), None),
        input_argument=arguments[0],
        memory_argument=memory,
        mask_argument=next((argument for argument in arguments if argument in MASK_ARGUMENTS), None),
        arguments=arguments,
        max_positions=_max_positions(getattr(module, "config", None)),
        inline=is_inline(module),
    )


def _projections(module: nn.Module) -> dict[str, str]:
    roles: dict[str, str] = {}
    for child, child_module in module.named_children():
        if LinearView.of(child_module) is None:
            continue
        for role, pattern in PROJECTION_ROLES.items():
            if role not in roles and pattern.fullmatch(child):
                roles[role] = child
                break
    return roles


def _projection_sizes(module: nn.Module, projections: dict[str, str], is_low_rank: bool) -> dict[str, int]:
    """Output widths of the projections that read the module's input, or the other sequence, without a detour."""
    return {
        role: LinearView.at(module, child).out_features
        for role, child in projections.items()
        if role != "output" and not (role == "query" and is_low_rank)
    }


def _max_positions(config: Any) -> int | None:
    """The trained length in tokens; rotary parameters, of which layers may have several sets, state it first."""
    rotary = getattr(config, "rope_parameters", None) or {}
    stated = [
        part.get("original_max_position_embeddings") for part in (rotary, *rotary.values()) if isinstance(part, dict)
    ]
    stated.append(getattr(config, "max_position_embeddings", None))
    return next((length for length in stated if isinstance(length, int) and length > 0), None)


def _geometry(module: nn.Module, projections: dict[str, str]) -> tuple[int | None, int | None, int | None]:
    """Query heads, kv heads and head dim: stated by module or configuration, and corrected by the tensors' shapes."""
    stated_heads = next(_integers(module, _HEADS), None)
    stated_dim = next(_integers(module, HEAD_DIM), None)
    outputs = {role: LinearView.at(module, child).out_features for role, child in projections.items()}
    width = outputs.get("query")
    if width is None and "fused" in outputs and stated_heads:
        dim = stated_dim or _fused_head_dim(outputs["fused"], stated_heads, next(_integers(module, _KV_HEADS), None))
        if dim is None:
            return stated_heads, None, None
        kv_twice = outputs["fused"] // dim - stated_heads
        return stated_heads, kv_twice // 2 if kv_twice > 0 else stated_heads, dim
    if width is None:
        in_parts = any(_QUERY_PART.fullmatch(child) for child, _ in module.named_children())
        return stated_heads, _stated_kv_heads(module, stated_heads), None if in_parts else stated_dim
    dim = stated_dim if stated_dim and width % stated_dim == 0 else None
    if dim is None and stated_heads and width % stated_heads == 0:
        dim = width // stated_heads
    if dim is None:
        return stated_heads, _stated_kv_heads(module, stated_heads), None
    # A projection may be wider than its heads (an output gate beside the query) but never narrower, unless pruned.
    heads = min(stated_heads, width // dim) if stated_heads else width // dim
    return heads, outputs["key"] // dim if "key" in outputs else _stated_kv_heads(module, heads), dim


def _stated_kv_heads(module: nn.Module, heads: int | None) -> int | None:
    groups = getattr(module, "num_key_value_groups", None)  # how often attention repeats each kv head
    if heads is not None and isinstance(groups, int) and groups > 0:
        return heads // groups
    return next(_integers(module, _KV_HEADS), heads)


def _fused_head_dim(width: int, heads: int, kv_heads: int | None) -> int | None:
    groups = heads + 2 * (kv_heads or heads)
    return width // groups if width % groups == 0 else None


def _integers(module: nn.Module, pattern: re.Pattern[str]) -> Iterator[int]:
    """Positive integers whose attribute name matches, of the module first and of its configuration second."""
    config = getattr(module, "config", None)
    for name, value in vars(module).items():
        if pattern.fullmatch(name) and isinstance(value, int) and value > 0:
            yield value
    for name in sorted({*getattr(config, "attribute_map", {}), *vars(config)} if config is not None else ()):
        if not pattern.fullmatch(name):
            continue
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers refuses to name one value where it differs between layers
            continue
        if isinstance(value, int) and value > 0:
            yield value


def _tower(name: str) -> str:
    """Path up to the container of layers, without the container's own name: `model.layers.3.attn` gives `model`."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: max(first - 1, 0)])


def _layers(names: list[str]) -> dict[str, tuple[int, int]]:
    """Layer index of every site, and the number of layers that it is one of.

    With one number in the path it is that number. Where layers are nested in stages, sites of the same shape of path
    are numbered through, so that a hierarchical encoder counts its blocks from first to last.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    layers: dict[str, tuple[int, int]] = {}
    for members in groups.values():
        firsts = [next((int(part) for part in name.split(".") if part.isdigit()), 0) for name in members]
        numbered = firsts if len(set(firsts)) == len(members) else range(len(members))
        layers.update({name: (index, max(numbered) + 1) for name, index in zip(members, numbered, strict=True)})
    return layers
