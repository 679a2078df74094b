"""What a vision tower's patch embedding and rotary embedding do, seen by hooks, for variants that ask for grids."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .grid import unknown_grid
from .hooks import enclosing_layer, register_last
from .linear import LinearView
from .patches import Patches
from .run import RUN, current_run, run_of
from .sites import AttentionSite


@dataclass(frozen=True)
class PatchEmbedding:
    """The parts of a vision tower that know of patches.

    Attributes:
        tower: the module that holds them and the layers.
        embedding: its child that makes tokens of images.
        projection: what makes patches in it: a convolution without overlap, or a linear layer of patches cut before.
        others: children of the tower without attention, such as a rotary embedding.
    """

    tower: nn.Module
    embedding: nn.Module
    projection: nn.Module
    others: tuple[nn.Module, ...]


def patch_embedding(model: nn.Module, site: AttentionSite, sites: Iterable[str]) -> PatchEmbedding:
    """The patch embedding of the tower that an attention module is in.

    Args:
        model: it is in.
        site: the attention module.
        sites: names of all attention modules of the model.

    Raises:
        NotImplementedError: there is none, or it is not known which of several.
    """
    known, path = list(sites), site.tower
    while True:
        tower, prefix = model.get_submodule(path), f"{path}." if path else ""
        own = site.name.removeprefix(prefix).partition(".")[0]
        children = list(tower.named_children())
        free = [name for name, _ in children if not _holds(f"{prefix}{name}", known)]
        names = [name for name, _ in children]
        before = [tower.get_submodule(name) for name in names[: names.index(own)] if name in free]
        for is_projection in (_cuts_patches, _is_linear):
            found = [(child, part) for child in before for part in child.modules() if is_projection(part)]
            if len(found) == 1:
                (embedding, projection), others = found[0], [tower.get_submodule(name) for name in free]
                return PatchEmbedding(tower, embedding, projection, tuple(o for o in others if o is not embedding))
            if found:
                raise unknown_grid(
                    site,
                    f"which of {len(found)} layers before it in {path or type(tower).__name__} cuts images into "
                    "patches cannot be told",
                )
        if not path:
            raise unknown_grid(site, "before its layers nothing cuts images into patches")
        path = path.rpartition(".")[0]


def install_grid(model: nn.Module, site: AttentionSite, sites: Sequence[str]) -> None:
    """Have an attention module know the grid of its calls."""
    parts = patch_embedding(model, site, sites)
    try:
        layer: nn.Module | None = model.get_submodule(enclosing_layer(site.name))
    except NotImplementedError:  # it asks who runs it
        layer = None
    reader = _reader_on(parts.tower)
    if reader is None:
        # where checkpointing runs a layer with its hooks again, what they add to its call is not there a second time
        hands_down = layer is not None and type(layer).__call__ is not nn.Module.__call__
        reader = GridReader(hands_down and _takes_keywords(parts.tower))
        register_last(parts.tower, reader.begin)
        parts.tower.register_forward_hook(reader.end, always_call=True)
        parts.projection.register_forward_hook(reader.see_patches)
        if parts.embedding is not parts.projection:
            parts.embedding.register_forward_hook(reader.see_tokens, with_kwargs=True)
        for other in parts.others:
            other.register_forward_hook(reader.see_places, with_kwargs=True)
    if layer is not None and _reader_on(layer) is None and all(map(_takes_keywords, _way_to(model, layer, site))):
        register_last(layer, reader.hand_on)


class GridReader:
    """The hooks of one tower, and which places the patches take among the tokens that its patch embedding makes.

    Those are found by making some patches NaN and looking which tokens become so, once for each number of patches.
    """

    def __init__(self, hands_down: bool) -> None:
        self.hands_down = hands_down  # whether the tower is to hand on to its layers what will be known
        self.prefixes: dict[tuple[int, int], int] = {}  # by the numbers of patches and tokens

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the tower."""
        run = current_run()
        run.patches = Patches()
        return (args, {**kwargs, RUN: run.handed_down({})}) if self.hands_down else None

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the tower, also where it failed."""
        current_run().patches = None

    def hand_on(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before a layer."""
        run = run_of(kwargs)
        patches = current_run().patches or run.patches
        return None if patches is None else (args, {**kwargs, RUN: replace(run.handed_down({}), patches=patches)})

    def see_patches(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """After the projection of patches."""
        patches = current_run().patches
        if patches is None:
            return None
        if (marks := patches.marks) is not None:
            marked = marks.view(output.shape[2:]) if _cuts_patches(module) else marks[: output.shape[1], None]
            return output.masked_fill(marked, torch.nan)
        if _cuts_patches(module):
            images, frames, (rows, columns) = output.shape[0], output.shape[2:-2].numel(), output.shape[-2:]
            patches.sizes = None if frames > 1 else (images, rows, columns)
            patches.fault = "its tokens lie along time, too" if frames > 1 else "its tower itself makes its tokens"
        return None

    def see_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After the patch embedding."""
        patches, tokens = current_run().patches, _first(output)
        if patches is None or tokens is None or tokens.dim() != 3:
            return
        if patches.fault is not None and patches.sizes is None:
            return
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        patches.shapes = next(
            (value for value in given if not value.is_floating_point() and value.shape == (len(tokens), 2)), None
        )
        patches.tokens = tokens.shape[0], tokens.shape[1]
        count = tokens.shape[1] if patches.sizes is None else patches.sizes[1] * patches.sizes[2]
        patches.prefix, patches.fault = None, self._fault(module, output, count, tokens)
        if patches.fault is None:
            patches.prefix = self.prefixes.get((count, tokens.shape[1]))
            if patches.prefix is None:
                patches.prefix, patches.fault = self._find_prefix(patches, module, args, kwargs, count, tokens)

    def see_places(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After a part of the tower beside the patch embedding, which may be a rotary embedding."""
        patches, values = current_run().patches, output if isinstance(output, tuple) else (output,)
        turned = tuple(value for value in values if isinstance(value, torch.Tensor))
        if patches is None or not turned:
            return
        for value in (*args, *kwargs.values()):
            if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.dim() != 2:
                continue
            places = value.mT if value.shape[0] == 2 else value
            if places.shape[1] == 2 and all(len(rows) == len(places) for rows in turned):
                patches.places, patches.turned = places, turned

    def _fault(self, module: nn.Module, output: Any, count: int, tokens: torch.Tensor) -> str | None:
        """Why the order of tokens cannot be found."""
        others = output if isinstance(output, tuple) else ()
        if any(isinstance(o, torch.Tensor) and not o.is_floating_point() and count in o.shape for o in others):
            return "its patch embedding says an order of its own for its patches, as one that drops some of them does"
        if count > tokens.shape[1]:
            return f"its patch embedding made {tokens.shape[1]} tokens of {count} patches"
        return None

    def _find_prefix(
        self,
        patches: Patches,
        module: nn.Module,
        args: Any,
        kwargs: dict[str, Any],
        count: int,
        tokens: torch.Tensor,
    ) -> tuple[int | None, str | None]:
        """How many tokens are before the patches, which are in order; or why not."""
        if torch.compiler.is_compiling():
            return None, f"call the model once with images of {count} patches before it is compiled or exported"
        if module.training and any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
            return None, "its patch embedding has batch norms: call the model once in evaluation mode"
        device, prefix = tokens.device, tokens.shape[1] - count
        number = torch.arange(count, device=device)
        marked = [torch.ones_like(number, dtype=torch.bool)]
        marked += [(number >> bit) % 2 == 1 for bit in range(max(count - 1, 1).bit_length())]
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            for marks in marked:
                patches.marks = marks
                try:
                    again = _first(module.forward(*args, **kwargs))
                finally:
                    patches.marks = None
                expected = torch.cat([marks.new_zeros(prefix), marks])
                if again is None or again.shape != tokens.shape or not bool((again.isnan().any(-1) == expected).all()):
                    return None, "its patches are not its last tokens, row by row"
        self.prefixes[count, tokens.shape[1]] = prefix
        return prefix, None


def _reader_on(module: nn.Module) -> GridReader | None:
    """The reader that looks at a tower or a layer before its forward."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, GridReader)), None)


def _way_to(model: nn.Module, layer: nn.Module, site: AttentionSite) -> Iterator[nn.Module]:
    """A layer, the attention module in it, and what is between them."""
    path, module = site.name, model.get_submodule(site.name)
    while module is not layer:
        yield module
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
    yield layer


def _takes_keywords(module: nn.Module) -> bool:
    """Whether its forward takes keyword arguments of any name, as what hands them on does."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())


def _holds(path: str, sites: Iterable[str]) -> bool:
    return any(site == path or site.startswith(f"{path}.") for site in sites)


def _cuts_patches(module: nn.Module) -> bool:
    """Whether it is a convolution over rows and columns without overlap."""
    return (
        isinstance(module, nn.Conv2d | nn.Conv3d)
        and module.kernel_size == module.stride
        and min(module.kernel_size[-2:]) > 1
        and not any(size for size in module.padding if isinstance(size, int))
    )


def _is_linear(module: nn.Module) -> bool:
    return LinearView.of(module) is not None


def _first(output: Any) -> torch.Tensor | None:
    values = list(output.values()) if isinstance(output, Mapping) else output
    value = values[0] if isinstance(values, tuple | list) and values else values
    return value if isinstance(value, torch.Tensor) else None
