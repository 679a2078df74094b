"""Which rows and columns of which projections belong to which head; read off shapes and names of children."""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from ..core.hooks import enclosing_layer
from ..core.linear import LinearView, Side
from ..core.sites import AttentionSite
from ..hosts.transformers.sites import attention_forward

# How a projection that makes queries, keys and values at once lays them out, by the name that transformers gives it.
_IN_BLOCKS = re.compile(r"c_attn|qkv_proj|w?qkv|in_proj", re.I)  # all queries, then all keys, then all values
_SPLITS = ("torch.split", "torch.chunk", "torch.unbind")
_BY_HEAD = re.compile(r"query_key_value", re.I)  # query, key and value of the first head, then of the second, ...


@dataclass(frozen=True)
class Heads:
    """What of one projection belongs to the heads of an attention module.

    Attributes:
        projection: path of the projection in the model.
        side: `rows`: it makes the heads, `columns`: it reads them.
        of: whose heads.
        index: `(heads, D)` which outputs, or inputs, belong to each.
    """

    projection: str
    side: Side
    of: Literal["query", "kv"]
    index: torch.Tensor


def head_projections(model: nn.Module, site: AttentionSite) -> list[Heads]:
    """Every projection that makes or reads the heads of an attention module.

    Raises:
        NotImplementedError: they are not recognised, or something else of the module has a place per head.
    """
    if site.inline:
        raise unrecognised(site, "it computes attention in its own code, which may rely on its shapes")
    heads, kv_heads, dim = site.query_heads, site.kv_heads, site.head_dim
    if heads is None or kv_heads is None or dim is None:
        raise unrecognised(site, "its numbers of heads are not known")
    roles = site.projections
    module: Any = model.get_submodule(site.name)
    kind: Any = type(module)
    if (width := input_width(kind)) is not None:
        raise unrecognised(site, f"its code takes {width}, the width of its input, for that of its heads")
    found: list[Heads] = []
    if {"query", "key", "value"} <= set(roles):
        for role, of, count in (("query", "query", heads), ("key", "kv", kv_heads), ("value", "kv", kv_heads)):
            index = _numbers(count * dim).view(count, dim)
            found.append(Heads(f"{site.name}.{roles[role]}", "rows", of, index))  # type: ignore[arg-type]
    elif "fused" in roles:
        found += _fused(module, roles["fused"], site, heads, kv_heads, dim)
    else:
        raise unrecognised(site, "it has no projections of queries, keys and values that patchattn knows")
    output = output_projection(model, site)
    found.append(Heads(output, "columns", "query", _numbers(heads * dim).view(heads, dim)))
    for path in dict.fromkeys(part.projection for part in found):
        parts = [part for part in found if part.projection == path]
        _check_whole(model, site, path, parts)
    known = {path.removeprefix(f"{site.name}.") for path in (part.projection for part in found)}
    for name, parameter in module.named_parameters():
        is_known = name.rpartition(".")[0] in known or name.startswith("patchattn.")  # of another variant
        if not is_known and not _is_shared_by_heads(name, parameter, site):
            raise unrecognised(site, f"nothing is known of {name} {tuple(parameter.shape)}, which may belong to heads")
    return found


def output_projection(model: nn.Module, site: AttentionSite) -> str:
    """Path of the projection that reads the heads: in the attention module, or the next one after it (BERT)."""
    if "output" in site.projections:
        return f"{site.name}.{site.projections['output']}"
    width = (site.query_heads or 0) * (site.head_dim or 0)
    parent = site.name.rpartition(".")[0]
    after = False
    for name, module in model.get_submodule(parent).named_modules():
        path = f"{parent}.{name}" if parent else name
        after = after or path == site.name
        if after and not path.startswith(f"{site.name}."):
            view = LinearView.of(module)
            if view is not None and view.in_features == width:
                return path
    raise unrecognised(site, "the projection after it was not found")


def head_projections_paths(model: nn.Module, site: AttentionSite) -> set[str]:
    """Paths of the projections of an attention module, recognised or not, and of the one after it."""
    inside = {
        f"{site.name}.{name}"
        for name, module in model.get_submodule(site.name).named_modules()
        if LinearView.of(module) is not None
    }
    return inside | {output_projection(model, site)}


def layer_path(site: AttentionSite) -> str:
    """Path of the layer that an attention module is in."""
    try:
        return enclosing_layer(site.name)
    except NotImplementedError as error:
        raise unrecognised(site, "it is in no numbered layer") from error


def unrecognised(site: AttentionSite, reason: str) -> NotImplementedError:
    """The refusal to cut an attention module up."""
    return NotImplementedError(
        f"{site.module_class} ({site.name}) cannot be cut into heads: {reason}. Leave it out with modules=... or "
        "layers=..."
    )


def _numbers(count: int) -> torch.Tensor:
    """Indices with values even while a model is built without memory."""
    return torch.arange(count, device="cpu")


def _fused(module: nn.Module, child: str, site: AttentionSite, heads: int, kv_heads: int, dim: int) -> list[Heads]:
    path = f"{site.name}.{child}"
    if _BY_HEAD.fullmatch(child) and heads == kv_heads:
        index = _numbers(3 * heads * dim).view(heads, 3, dim)
        return [Heads(path, "rows", "query" if part == 0 else "kv", index[:, part]) for part in range(3)]
    # With fewer kv heads than query heads no other layout has room for both.
    alike, kind = heads == kv_heads, cast(Any, type(module))
    if not _IN_BLOCKS.fullmatch(child) or (alike and not splits_in_three(kind, child)):
        raise unrecognised(site, f"how {child} lays out queries, keys and values is not known")
    index = _numbers((heads + 2 * kv_heads) * dim).view(-1, dim)
    query, key, value = index.split([heads, kv_heads, kv_heads])
    return [Heads(path, "rows", "query", query), Heads(path, "rows", "kv", key), Heads(path, "rows", "kv", value)]


def _check_whole(model: nn.Module, site: AttentionSite, path: str, parts: Sequence[Heads]) -> None:
    view = LinearView.at(model, path)
    view.check_cut()
    size = view.out_features if parts[0].side == "rows" else view.in_features
    if sorted(number for part in parts for number in part.index.flatten().tolist()) != list(range(size)):
        raise unrecognised(site, f"{path} has {size} {parts[0].side}, its heads {sum(p.index.numel() for p in parts)}")


def _is_shared_by_heads(name: str, parameter: nn.Parameter, site: AttentionSite) -> bool:
    """A norm within heads or after the projection (ALBERT); or an argument of attention: sinks, a position bias."""
    is_norm = (re.search("norm|ln", name) and parameter.shape == (site.head_dim,)) or name.startswith("LayerNorm.")
    return bool(is_norm) or name == "sinks" or ("position_bias" in site.arguments and "relative_attention_bias" in name)


@functools.cache
def input_width(kind: Any) -> str | None:
    """The variable in which the `forward` of an attention module keeps the width of its input and goes on to use it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(attention_forward(kind))))
    except OSError:  # defined in a console: there is no file to read
        return None
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            last, source = node.targets[0].elts[-1], ast.unparse(node.value)
            if isinstance(last, ast.Name) and last.id in names and source.endswith((".shape", ".size()")):
                return last.id
    return None


@functools.cache
def splits_in_three(kind: Any, child: str) -> bool:
    """Whether the code of an attention module takes all queries, all keys and all values out of a projection's output.

    It then splits the output as it is, or along an axis of 3 that it views before heads; CodeGen, which has its heads
    in four groups, and GPTBigCode without multi-query attention view it otherwise.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(attention_forward(kind))))
    except OSError:  # defined in a console
        return False
    parents = {inner: outer for outer in ast.walk(tree) for inner in ast.iter_child_nodes(outer)}
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{child}"
    ]
    return bool(calls) and all(_is_split_in_three(call, tree, parents) for call in calls)


def _is_split_in_three(value: ast.AST, tree: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Of an expression that stands for the output of a projection, or for a tensor that was viewed out of it."""
    outer = parents[value]
    if isinstance(outer, ast.Subscript) or (isinstance(outer, ast.Call) and ast.unparse(outer.func) in _SPLITS):
        return True
    if isinstance(outer, ast.Attribute):
        call: Any = parents[outer]
        if outer.attr in ("view", "reshape"):
            return any(isinstance(size, ast.Constant) and size.value == 3 for size in call.args)
        return outer.attr in ("split", "chunk", "unbind") or _is_split_in_three(call, tree, parents)
    if isinstance(outer, ast.Assign) and isinstance(name := outer.targets[0], ast.Name):
        later = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and node.id == name.id and isinstance(node.ctx, ast.Load)
            if node.lineno > outer.lineno
        ]
        return bool(later) and _is_split_in_three(min(later, key=lambda node: node.lineno), tree, parents)
    return False


def kept_index(parts: Iterable[Heads], query_heads: Sequence[int], kv_heads: Sequence[int]) -> torch.Tensor:
    """Outputs or inputs of one projection that belong to the heads kept, in their order."""
    chosen = [part.index[list(query_heads if part.of == "query" else kv_heads)].flatten() for part in parts]
    return torch.cat(chosen).sort().values
