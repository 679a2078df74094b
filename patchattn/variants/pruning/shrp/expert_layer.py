"""An encoder layer as SHRP finds it: what the expander starts from, and what turns the layer into x + attention(x)."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ....core.linear import LinearView
from ....core.packing import CHILD
from ....core.sites import AttentionSite
from ....surgery.change import Change
from ....surgery.channels import mlp_projections
from ....surgery.projections import layer_path, output_projection


@dataclass(frozen=True)
class HostLayer:
    """An encoder layer whose attention output projection and feed-forward part one expander can stand for.

    Attributes:
        output, maker, reader: paths of the output projection of attention, and of the two projections of the
            feed-forward part.
        activation: name of the function between those two.
        size: channels between those two.
        changes: what leaves `norm(x + attention(x))` of a post-norm layer (BERT), with the layer's last norm, and
            `x + attention(norm(x))` of a pre-norm one (ViT), with its first.
    """

    output: str
    maker: str
    reader: str
    activation: str
    size: int
    changes: tuple[Change, ...]


class Nothing(nn.Module):
    """Stands for a sub-layer in `x + sublayer(...)` and leaves x."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(())


class PassThrough(nn.Module):
    """Stands for a layer that was taken out of the stack."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def host_layer(model: nn.Module, site: AttentionSite) -> HostLayer:
    """Recognise the layer that an attention module is in, by its structure.

    Raises:
        NotImplementedError: it is not an encoder layer with plain self-attention and one feed-forward part, or its
            projections are not plain linear layers.
    """
    module: Any = model.get_submodule(site.name)
    if getattr(module, "is_causal", False) or getattr(module, "is_decoder", False):
        raise NotImplementedError(
            f"The variant 'shrp' does not support causal, which {site.module_class} ({site.name}) needs: its static "
            "form is for encoders."
        )
    if not {"query", "key", "value"} <= set(site.projections) or site.is_cross:
        raise refusal(site, "it is not self-attention with separate projections of queries, keys and values")
    try:
        layer, output = layer_path(site), output_projection(model, site)
        makers, reader = mlp_projections(model, site)
    except NotImplementedError as error:
        raise refusal(site, "the projections after its attention are not those of BERT or of ViT") from error
    maker, last = (LinearView.at(model, path) for path in (makers[0], reader))
    if len(makers) != 1 or (maker.in_features, maker.out_features) != (last.out_features, last.in_features):
        raise refusal(site, "its feed-forward part is gated")
    own = [f"{site.name}.{site.projections[role]}" for role in ("query", "key", "value")]
    for path in (*own, output, makers[0], reader):
        _check_plain(LinearView.at(model, path), site)
    found = _post_norm(model, site, output, makers[0], reader) or _pre_norm(model, site, output, makers[0], reader)
    if found is None:
        raise refusal(site, "norms, attention and feed-forward part are not arranged as in BERT or as in ViT")
    norms, changes = found
    known = (*own, output, makers[0], reader, *norms, f"{site.name}.{CHILD}")
    for name, _ in model.get_submodule(layer).named_parameters():
        if not _is_inside(f"{layer}.{name}", known):
            raise refusal(site, f"nothing is known of {layer}.{name}")
    activation = _activation(model.get_submodule(_parent(makers[0])), module.config, site)
    return HostLayer(output, makers[0], reader, activation, maker.out_features, changes)


def drop_layers(model: nn.Module, layers: Iterable[str]) -> list[Change]:
    """The changes that take layers out of the stack.

    Raises:
        ValueError: a layer carries variants.
    """
    changes = []
    for layer in layers:
        if any(CHILD in module._modules for module in model.get_submodule(layer).modules()):
            raise ValueError(f"{layer} is to be dropped but carries variants: unpatch it first, or keep it.")
        parent, _, name = layer.rpartition(".")
        changes.append(Change(parent, name, PassThrough()))
    return changes


def refusal(site: AttentionSite, reason: str) -> NotImplementedError:
    """SHRP's refusal to convert a layer."""
    return NotImplementedError(
        f"The variant 'shrp' does not know the layer of {site.module_class} ({site.name}): {reason}. Leave it out with "
        "modules=... or layers=..."
    )


def _post_norm(
    model: nn.Module, site: AttentionSite, output: str, maker: str, reader: str
) -> tuple[list[str], tuple[Change, ...]] | None:
    """BERT: `a = norm(x + dense(attention(x)))`, then `norm(a + dense(act(dense(a))))`."""
    layer = layer_path(site)
    first, between, last = _parent(output), _parent(maker), _parent(reader)
    if len({layer, site.name, first, between, last}) < 5 or _is_inside(output, [site.name]):
        return None
    norms = [_norm_after(model, path, site.input_size) for path in (output, reader)]
    if None in norms or any(not _is_inside(name, [maker]) for name in _parameters(model, between)):
        return None
    changes = (
        Change(first, output.rpartition(".")[2], nn.Identity()),
        Change(first, str(norms[0]).rpartition(".")[2], nn.Identity()),
        Change(_parent(between), between.rpartition(".")[2], nn.Identity()),
        Change(last, reader.rpartition(".")[2], Nothing()),
    )
    return [str(norm) for norm in norms], changes


def _norm_after(model: nn.Module, path: str, width: int | None) -> str | None:
    """Path of the norm in a module that does `norm(x + dense(h))` with this projection, given h and x, if it does."""
    parent, _, dense = path.rpartition(".")
    module = model.get_submodule(parent)
    others = [name for name, child in module.named_children() if name != dense and [*child.parameters()]]
    if len(others) != 1 or len(inspect.signature(_forward(module)).parameters) != 3:  # self, h and x
        return None
    is_norm = all(parameter.shape == (width,) for parameter in module.get_submodule(others[0]).parameters())
    return f"{parent}.{others[0]}" if is_norm and _in_order(module, dense, others[0]) else None


def _pre_norm(
    model: nn.Module, site: AttentionSite, output: str, maker: str, reader: str
) -> tuple[list[str], tuple[Change, ...]] | None:
    """ViT: `a = x + attention(norm(x))`, then `a + mlp(norm(a))`."""
    path, mlp = layer_path(site), _parent(maker)
    layer = model.get_submodule(path)
    attention = site.name.removeprefix(f"{path}.").partition(".")[0]
    if mlp != _parent(reader) or _parent(mlp) != path or not _is_inside(output, [site.name]):
        return None
    if any(not _is_inside(name, [maker, reader]) for name in _parameters(model, mlp)):
        return None
    part = mlp.rpartition(".")[2]
    norms = [
        name
        for name, child in layer.named_children()
        if name not in (attention, part) and {p.shape for p in child.parameters()} == {(site.input_size,)}
    ]
    names = _forward(layer).__code__.co_names
    if len(norms) != 2 or not set(norms) <= set(names):
        return None
    before, after = sorted(norms, key=names.index)
    if not _in_order(layer, before, attention, after, part):
        return None
    changes = (
        Change(_parent(output), output.rpartition(".")[2], nn.Identity()),
        Change(path, after, nn.Identity()),
        Change(path, part, Nothing()),
    )
    return [f"{path}.{before}", f"{path}.{after}"], changes


def _activation(holder: nn.Module, config: Any, site: AttentionSite) -> str:
    """Name, in the configuration and among transformers' activations, of the function after a projection."""
    found = [child for child in holder.children() if not [*child.parameters()] and not isinstance(child, nn.Dropout)]
    if len(found) == 1:
        for name, value in vars(config).items():
            if "act" in name and isinstance(value, str) and value in ACT2FN and type(ACT2FN[value]) is type(found[0]):
                return value
    raise refusal(site, "the activation of its feed-forward part is not one that its configuration names")


def _check_plain(view: LinearView, site: AttentionSite) -> None:
    if view.storage != "plain" or view.stores_inputs_first:
        raise refusal(
            site,
            f"{view.path} ({type(view.module).__name__}) is not a plain linear layer; adapters, quantisation and "
            "offloading come after conversion",
        )


def _forward(module: nn.Module) -> Callable[..., Any]:
    return inspect.unwrap(type(module).forward)


def _in_order(module: nn.Module, *children: str) -> bool:
    """Whether a module's forward first refers to these children in this order."""
    names = _forward(module).__code__.co_names
    places = [names.index(name) for name in children if name in names]
    return len(places) == len(children) and places == sorted(places)


def _parameters(model: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters()]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _is_inside(path: str, modules: Iterable[str]) -> bool:
    return any(path.startswith(f"{module}.") for module in modules)
