"""The feed-forward part of a layer: which projections make and read its channels, and leaving some of them out."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.host import find_sites
from ..core.linear import LinearView
from ..core.settings import nearest
from ..core.sites import AttentionSite
from ..files.documents import quoted
from ..hosts.transformers.sites import attention_forward
from .change import Change
from .projections import head_projections_paths, layer_path

# Which of them reads the channels, where widths do not tell: as many channels as the layer is wide.
_READER = re.compile(r"(?:.*\.)?(?:down_proj|fc2|lin2|c_proj|wo|w2|dense_4h_to_h|output\.dense|linear_?2)", re.I)


def mlp_projections(model: nn.Module, site: AttentionSite) -> tuple[list[str], str]:
    """The projections of the feed-forward part of the layer that an attention module is in.

    Returns:
        Paths of those that make its channels, and of the one that reads them. One makes them, or a gate and what it
        gates; twice the same where one projection makes both, the gate's or the other's channels first.

    Raises:
        NotImplementedError: there is no such part, several, as in a mixture of experts, or more in it that has a place
            per channel.
    """
    if site.input_size is None:
        raise _unknown(site.name, "the width of the layer is not known")
    for layer in _layers(site):
        inner = model.get_submodule(layer)
        attention = set[str]().union(*({s.name} | head_projections_paths(inner, s) for s in find_sites(inner)))
        linears = _linears(inner, attention)
        if linears:
            break
    else:
        raise _unknown(layer, "it has no linear projections of its own, as in a mixture of experts")
    makers, reader = _roles(layer, linears, site.input_size)
    channels = linears[reader][0]
    if len(makers) == 1 and linears[makers[0]][1] == 2 * channels:
        holder = type(inner.get_submodule(makers[0].rpartition(".")[0]))
        if "chunk" not in attention_forward(holder).__code__.co_names:
            raise _unknown(layer, f"how {makers[0]} lays out two times {channels} channels is not known")
        makers *= 2
    for name, parameter in inner.named_parameters():
        if any(name.startswith(f"{path}.") for path in (*attention, *makers, reader)):
            continue
        if parameter.dim() > 1 or (channels in parameter.shape and channels != site.input_size):
            raise _unknown(layer, f"nothing is known of {name} {tuple(parameter.shape)}, which may belong to channels")
    return [f"{layer}.{maker}" for maker in makers], f"{layer}.{reader}"


def cut_channels(model: nn.Module, site: AttentionSite, kept: Sequence[int]) -> list[Change]:
    """The changes that leave the feed-forward part of a layer with some of its channels.

    Args:
        model: a transformers model.
        site: an attention module of the layer.
        kept: channels to keep, sorted, counted as the projection that reads them does.

    Raises:
        NotImplementedError: its projections are not recognised, are quantised or offloaded.
        ValueError: they carry adapters.
    """
    makers, reader = mlp_projections(model, site)
    channels = channel_count(model, reader)
    index = torch.tensor(kept, device="cpu")  # with values even while a model is built without memory
    changes = []
    for path in dict.fromkeys(makers):
        rows = torch.cat([index + block * channels for block in range(makers.count(path))])
        values = LinearView.at(model, path).cut("rows", rows)
        changes += [Change(path, name, value) for name, value in values.items()]
    return changes + [Change(reader, n, v) for n, v in LinearView.at(model, reader).cut("columns", index).items()]


def channel_mask(kept: Sequence[int], count: int) -> str:
    """Channels as hexadecimal digits of four channels each; the first channel is the highest bit of the first digit."""
    chosen = set(kept)
    bits = "".join("1" if channel in chosen else "0" for channel in range(count))
    digits = -(-count // 4)
    return f"{int(bits.ljust(4 * digits, '0'), 2):0{digits}x}"


def masked_channels(mask: str, count: int) -> list[int]:
    """The inverse of `channel_mask`; ValueError if it is not one of that many channels, or keeps none."""
    bits = f"{int(mask, 16):0{4 * len(mask)}b}" if re.fullmatch("[0-9a-f]+", mask) else ""
    if len(mask) != -(-count // 4) or "1" not in bits[:count] or "1" in bits[count:]:
        raise ValueError(
            f"The channels kept of {count} are given by {-(-count // 4)} hexadecimal digits, lower case, the first "
            f"channel as the highest bit of the first, bits beyond the last channel 0, at least one set; got {mask!r}."
        )
    return [channel for channel, bit in enumerate(bits) if bit == "1"]


def parse_masks(masks: Any) -> dict[str, str]:
    """Masks of channels by the names of attention modules; TypeError or ValueError if these are none."""
    if not isinstance(masks, Mapping) or not all(isinstance(text, str) for pair in masks.items() for text in pair):
        raise TypeError(
            f"kept_channels is a mapping from names of attention modules to hexadecimal text, got {quoted(masks)}."
        )
    if not masks:
        raise ValueError("kept_channels is empty: name at least one attention module, or leave it out.")
    return dict(masks)


def masks_by_module(masks: Mapping[str, str], model: nn.Module, sites: Sequence[AttentionSite]) -> dict[str, str]:
    """Masks of channels by the name of the attention module, checked against the model."""
    known = {site.name: site for site in sites if not site.is_cross}
    found = {}
    for name, mask in masks.items():
        if name not in known:
            raise ValueError(f"There is no self-attention {name!r} beside an MLP to prune{nearest(name, list(known))}")
        count = channel_count(model, mlp_projections(model, known[name])[1])
        if len(masked_channels(mask, count)) < count:
            found[name] = mask
    return found


def channel_count(model: nn.Module, reader: str) -> int:
    """How many channels a projection reads."""
    return LinearView.at(model, reader).in_features


def _layers(site: AttentionSite) -> list[str]:
    """The layer that an attention module is in, and, where that is one of several parts of a layer (T5), the whole."""
    part = layer_path(site)
    parent = re.match(r"(.*\.\d+)\.\D+\.\d+$", part)
    return [part, parent[1]] if parent else [part]


def _linears(layer: nn.Module, attention: set[str]) -> dict[str, tuple[int, int]]:
    """Path to input and output width of all linear projections outside attention."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in layer.named_modules():
        view = LinearView.of(module)
        inside = any(name == path or name.startswith(f"{path}.") for path in (*attention, *found))  # adapters, too
        if view is not None and not inside:
            found[name] = view.in_features, view.out_features
    return found


def _roles(layer: str, linears: dict[str, tuple[int, int]], width: int) -> tuple[list[str], str]:
    """Which of two or three projections make channels, and which one reads them."""
    found = []
    for reader, (channels, outputs) in linears.items():
        makers = [path for path in linears if path != reader]
        makes = [channels, 2 * channels] if len(makers) == 1 else [channels]
        if outputs == width and all(linears[m][0] == width and linears[m][1] in makes for m in makers):
            found.append((makers, reader))
    if len(found) > 1:
        found = [(makers, reader) for makers, reader in found if _READER.fullmatch(reader)]
    if len(found) != 1 or len(found[0][0]) not in (1, 2):
        raise _unknown(layer, f"it is not two or three projections, as {', '.join(linears)} are not")
    return found[0]


def _unknown(layer: str, reason: str) -> NotImplementedError:
    return NotImplementedError(f"The feed-forward part of {layer} is not recognised: {reason}.")
