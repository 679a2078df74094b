"""What FLAP and AMP know of a model: statistics of what its output and down projections read, in a file."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ....core.heads import BaseFacts, parse_facts
from ....core.host import find_sites
from ....core.linear import LinearView
from ....core.selection import base_model
from ....core.settings import nearest
from ....core.sites import AttentionSite
from ....files.documents import parse_json, quoted
from ....files.tensors import write_tensors
from ....inspection.channels import ChannelStatistics, channel_statistics
from ....inspection.head_importance import head_importance
from ....surgery.channels import mlp_projections
from ....surgery.projections import output_projection

_FORMAT = "patchattn channel statistics 2"
_FIELDS = [item.name for item in fields(ChannelStatistics)]
_HEADS = "head_norms"


@dataclass(frozen=True, eq=False)
class FlapStatistics:
    """Statistics of the channels that projections read, of one model on some data.

    Attributes:
        base: the model; its layers and heads are those of its first attention module.
        channels: path of the projection to the statistics of what it reads.
        head_norms: name of the attention module to the score `(H,)` of each query head under AMP; may be empty.
    """

    base: BaseFacts
    channels: dict[str, ChannelStatistics] = field(repr=False)
    head_norms: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def of(self, model: nn.Module, path: str) -> ChannelStatistics:
        """Those of one projection; ValueError if there are none, or for another number of channels."""
        if path not in self.channels:
            raise ValueError(
                f"These statistics are of {self.base} and know nothing of {path}{nearest(path, list(self.channels))} "
                "Make them for all that is to be pruned, feed-forward parts included, or set mlp=False."
            )
        known, width = self.channels[path], LinearView.at(model, path).in_features
        if len(known.mean) != width:
            raise ValueError(
                f"These statistics are of {self.base}, where {path} reads {len(known.mean)} channels; in the model "
                f"given it reads {width}."
            )
        return known

    def check(self, model: nn.Module) -> None:
        """ValueError if they are of another model."""
        found = BaseFacts.of(model, find_sites(model)[0])
        same_name = None in (self.base.name, found.name) or self.base.name == found.name
        facts = [(f.model_type, f.layers, f.heads) for f in (self.base, found)]
        if not same_name or facts[0] != facts[1]:
            raise ValueError(f"These statistics are of {self.base}, the model is {found}. Make them on this model.")

    def save(self, path: str | Path) -> None:
        """Write it as safetensors, whole or not at all."""
        tensors = {f"{name}.{_HEADS}": scores.clone() for name, scores in self.head_norms.items()}
        for name, known in self.channels.items():
            tensors |= {f"{name}.{key}": torch.as_tensor(value).clone() for key, value in vars(known).items()}
        write_tensors(path, tensors, {"format": _FORMAT, "base": json.dumps(vars(self.base))})

    @classmethod
    def load(cls, path: str | Path) -> "FlapStatistics":
        """Read what `save` wrote; ValueError if there is no such file, it is damaged or holds something else."""
        if not os.path.isfile(path):
            raise ValueError(
                f"There is no file {quoted(str(path))} with statistics; `patchattn calibrate flap` writes one."
            )
        try:
            with safe_open(path, framework="pt") as file:
                about, names = file.metadata() or {}, list(file.keys())
                if about.get("format") != _FORMAT:
                    raise ValueError("it holds no statistics of channels")
                base = parse_facts(parse_json(about.get("base", "null"), "base"))
                tensors = {name: file.get_tensor(name) for name in names}
            return cls(base, *_parse(tensors))
        except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged or not a file that `patchattn calibrate flap` wrote: {error}."
            ) from error


def flap_statistics(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    sites: Sequence[AttentionSite] | None = None,
    mlp: bool = True,
    amp: bool = False,
    progress: Callable[[int], None] | None = None,
) -> FlapStatistics:
    """Statistics of what every output projection of attention and every projection back from an MLP reads.

    One pass over the data, with memory for a few numbers per channel; padding is left out.

    Args:
        model: a transformers model in evaluation mode.
        batches: keyword arguments of its forward.
        sites: those of `find_sites(model)`; all by default.
        mlp: also those of the feed-forward parts; needed unless heads alone are to be pruned.
        amp: also AMP's score of heads, in a second pass (arXiv 2504.21174).
        progress: called with the number of batches done, both passes together.

    Raises:
        ValueError: no data, or a model in training mode.
        NotImplementedError: the model's attention does not go through transformers' registry, or a projection or
            feed-forward part is not recognised: leave it out with sites=... or mlp=False.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        ...     num_attention_heads=4, vocab_size=64)).eval()
        >>> statistics = flap_statistics(model, [{"input_ids": torch.arange(12).view(2, 6)}])
        >>> statistics.channels["model.layers.0.mlp.down_proj"].mean.shape
        torch.Size([48])
    """
    base = base_model(model)
    chosen = find_sites(base) if sites is None else list(sites)
    if not chosen or not len(batches):
        raise ValueError(
            f"There is nothing to look at: got {len(chosen)} attention modules and {len(batches)} batches."
        )
    paths = [output_projection(base, site) for site in chosen]
    if mlp:
        paths += [mlp_projections(base, site)[1] for site in chosen if not site.is_cross]
    tell = progress or (lambda done: None)
    channels = channel_statistics(model, _counted(batches, tell), list(dict.fromkeys(paths)))
    norms: dict[str, torch.Tensor] = {}
    if amp:
        found = head_importance(
            model, batches, "amp", normalise=False, sites=chosen, progress=lambda done: tell(len(batches) + done)
        )
        norms = {name: torch.tensor(scores, dtype=torch.float64) for name, scores in found.scores.items()}
    return FlapStatistics(BaseFacts.of(base, find_sites(base)[0]), channels, norms)


def _counted(batches: Iterable[Mapping[str, Any]], tell: Callable[[int], None]) -> Iterator[Mapping[str, Any]]:
    for done, batch in enumerate(batches, start=1):
        yield batch
        tell(done)


def _parse(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, ChannelStatistics], dict[str, torch.Tensor]]:
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    norms: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{key} is not finite")
        if kind != "tokens" and not (tensor.is_floating_point() and tensor.dim() == 1):
            raise ValueError(f"{key} is of {tensor.dtype} and {tensor.dim()} dimensions, expected a list of floats")
        if kind == _HEADS:
            norms[name] = tensor
        else:
            grouped.setdefault(name, {})[kind] = tensor
    channels = {}
    for name, values in grouped.items():
        if set(values) != set(_FIELDS):
            raise ValueError(f"{name} has {', '.join(sorted(values))}, expected {', '.join(_FIELDS)}")
        tokens = int(values.pop("tokens"))
        if tokens < 2 or len({tuple(value.shape) for value in values.values()}) > 1:
            raise ValueError(f"the statistics of {name} do not fit together")
        channels[name] = ChannelStatistics(tokens, **values)
    return channels, norms
