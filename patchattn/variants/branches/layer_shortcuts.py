"""Layer shortcuts: a late layer attends to what earlier layers were given, too. arXiv 2409.10870."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from patchattn_kernels import attention_with_lse, merge_attention
from patchattn_kernels.rows import full_precision

from ...core.call import AttentionCall
from ...core.hooks import Hook
from ...core.layer_outputs import enclosing_block
from ...core.registry import register_variant
from ...core.run import RUN, run_of
from ...core.selection import require_causal
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, Variant, VariantConfig, VariantInfo

_SEEN = "layer_shortcuts"  # shared by the layers of a forward, and the fact that the last of them is told


@dataclass(frozen=True, kw_only=True)
class LayerShortcutsConfig(VariantConfig):
    """Settings of layer shortcuts; every field is described by `patchattn info layer_shortcuts`."""

    depths: tuple[int, ...] | None = option(
        None,
        help="Layers, counted from 0, whose input is read; all lie before the one that reads. None: four of them, "
        "evenly spaced.",
        source="ours; the paper does not publish its choice",
        minimum=0,
    )
    width: int = option(
        64,
        help="Features of a token at each depth: its key and its value at once.",
        source="ours",
        unit="channels",
        minimum=1,
    )


class LayerShortcuts(Variant):
    """Attention to which `V_h sum_dj softmax_dj(Q_h x_i . f_dj / sqrt(width)) f_dj` is added in the last chosen layer.

    j goes over the tokens that i sees, and d over depths; `f_dj = gelu(W_d norm(z_dj))`, z what layer d was given of
    token j. V is zero at the start. Earlier layers get no gradient through f.
    """

    config_class = LayerShortcutsConfig
    config: LayerShortcutsConfig
    splits_by_head = True

    def __init__(self, config: LayerShortcutsConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads, dim, inputs = (
            site.require(fact, by="layer_shortcuts") for fact in ("query_heads", "head_dim", "input_size")
        )
        self.count = len(_depths(config, site))
        self.features = nn.Parameter(torch.randn(self.count, config.width, inputs) * inputs**-0.5)
        self.query = nn.Parameter(torch.randn(heads * config.width, inputs) * inputs**-0.5)
        self.value = nn.Parameter(torch.zeros(heads, dim, config.width))

    @classmethod
    def fit(
        cls, config: LayerShortcutsConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[LayerShortcutsConfig, Sequence[AttentionSite]]:
        """Leave all attention modules out but the last one; ValueError where that is not one."""
        because = "a token is given features of those before it"
        causal = require_causal(model, sites, by="layer_shortcuts", because=because)
        towers = sorted({site.tower for site in causal})
        if len(towers) > 1:
            raise ValueError(
                f"layer_shortcuts acts in the last layer of one stack of layers, and the chosen attention modules are "
                f"of {', '.join(map(repr, towers))}: choose one with modules=..."
            )
        last = max(causal, key=lambda site: site.layer_index)
        return replace(config, depths=_depths(config, last)), [last]

    @property
    def needs_context(self) -> bool:
        return True

    @property
    def keeps_state(self) -> bool:
        return True

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def prepare(self, model: nn.Module) -> None:
        layers, _ = _stack(model, self.site)
        parameters = inspect.signature(layers.forward).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            raise NotImplementedError(
                f"layer_shortcuts tells {self.site.name} what earlier layers were given by a keyword argument, and "
                f"{type(layers).__name__}, which runs them, hands none on."
            )

    def hooks(self, model: nn.Module) -> list[Hook]:
        layers, stack = _stack(model, self.site)
        return [
            Hook(layers, "before", self.before_layers),
            *(Hook(stack[depth], "before", self.before_depth) for depth in _depths(self.config, self.site)),
            Hook(stack[self.site.layer_index], "before", self.before_layer),
        ]

    def before_layers(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A place that all layers of this forward share, also where activation checkpointing runs one again."""
        run = run_of(kwargs)
        return args, {**kwargs, RUN: replace(run.handed_down({}), shared={**run.shared, _SEEN: []})}

    def before_depth(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        run_of(kwargs).shared.get(_SEEN, []).append(hidden.detach())

    def before_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run, hidden = run_of(kwargs), args[0] if args else kwargs["hidden_states"]
        seen = run.shared.get(_SEEN, [])[: self.count]
        if hidden.dim() != 3 or len(seen) < self.count or any(each.shape != hidden.shape for each in seen):
            return None  # attention then finds nothing, and says so
        stacked = torch.stack([each.to(hidden.device) for each in seen], dim=2)
        return args, {**kwargs, RUN: run.handed_down({_SEEN: stacked})}

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        output, weights = inner(call)
        given = call.context.handed_down(_SEEN, "what earlier layers were given")  # (B, Tq, n, E)
        heads, dim = output.shape[2:]
        if (given.shape[-1], dim) != (self.features.shape[-1], self.value.shape[1]):
            raise NotImplementedError(
                f"layer_shortcuts reads {self.features.shape[-1]} channels of earlier layers and gives every head of "
                f"{self.site.name} {self.value.shape[1]}; there are {given.shape[-1]} and {dim}."
            )
        normed = F.rms_norm(full_precision(given), given.shape[-1:])
        features = F.gelu(torch.einsum("btne,nfe->bnft", normed.to(self.features.dtype), self.features))
        known = call.context.remembered(_SEEN, {"features": features.flatten(1, 2)})["features"]
        keys = known.unflatten(1, (self.count, 1, -1)).mT  # (B, n, 1, Tk, F)
        asked = F.linear(call.context.layer_input().to(self.query.dtype), self.query)
        query = asked.unflatten(-1, (heads, -1)).transpose(1, 2)
        rule = call.mask.rule(self.config.width**-0.5)
        found, _ = merge_attention(*(attention_with_lse(query, key, key, rule) for key in keys.unbind(1)))
        added = torch.einsum("bhtf,hdf->bthd", found, self.value.to(found.dtype))
        return output + added.to(output.dtype), weights


def _depths(config: LayerShortcutsConfig, site: AttentionSite) -> tuple[int, ...]:
    """The layers whose input is read, ascending."""
    last = site.layer_index
    if config.depths is None:
        count = min(4, last)
        found = {(number + 1) * last // (count + 1) for number in range(count)}
    else:
        found = set(config.depths)
        if len(found) < len(config.depths):
            raise ValueError(f"layer_shortcuts reads each layer once, got depths={config.depths}.")
    if not found or max(found) >= last:
        raise ValueError(
            f"layer_shortcuts reads what layers before {last} ({site.name}), which attends, were given; got "
            f"depths={config.depths}."
        )
    return tuple(sorted(found))


def _stack(model: nn.Module, site: AttentionSite) -> tuple[nn.Module, Any]:
    """The module that runs the layers of an attention module's stack, and the list of these."""
    path = enclosing_block(model, site.name).rpartition(".")[0]
    return model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)


register_variant(
    VariantInfo(
        name="layer_shortcuts",
        variant=LayerShortcuts,
        title="Adaptive Large Language Models By Layerwise Attention Shortcuts",
        arxiv_id="2409.10870",
        year=2024,
        summary="The last layer attends to features of what earlier layers were given, too.",
        extra_parameters="some features of the layer's width per depth and query head, in one layer",
        needs_training=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross"},
        examples=({"depths": (0,), "width": 8},),
    )
)
