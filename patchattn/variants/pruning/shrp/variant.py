"""SHRP: heads as experts with a shared expander, pruned to the most used one. A reconstruction of arXiv 2512.20635."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers.activations import ACT2FN

from patchattn_kernels import apply_head_gate, select_top_k

from ....core.call import AttentionCall
from ....core.registry import register_variant
from ....core.settings import option
from ....core.sites import AttentionSite
from ....core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantConfig, VariantInfo
from ....surgery.change import Change, SurgeryVariant
from ....surgery.heads import KeptHeads, cut_heads
from .expander import (
    check_kept,
    check_weights,
    dropped_layers,
    head_weights,
    heads_by_module,
    initial_expander,
    parse_kept,
)
from .expert_layer import drop_layers, host_layer

_UNIT = 2**20  # of sums of gates, kept as integers: casting a model to half precision leaves those alone


@dataclass(frozen=True, kw_only=True)
class SHRPConfig(VariantConfig):
    """Settings of SHRP, a reconstruction; every field is described by `patchattn info shrp`."""

    by_module = ("importance", "layers_dropped", "kept")

    heads: int = option(
        1,
        help="Heads per converted layer: chosen per token in the training form, left in the static form. 0 leaves "
        "layers as they are.",
        source="abstract: Top-1",
        minimum=0,
    )
    router: Literal["token", "first", "mean"] = option(
        "token", help="What heads are chosen by: each token, or for a whole sequence its first token or its mean."
    )
    router_std: float = option(
        0.02, help="Standard deviation of the router's initial weights.", minimum=0.0, maximum=10.0
    )
    expander_size: int | None = option(
        None,
        help="Channels of the expander. None: those of the layer's feed-forward part; fewer start from its strongest.",
        source="ours; it gives the published parameter count",
        minimum=1,
    )
    activation: str | None = option(
        None, help="Activation of the expander, as transformers names it. None: the layer's own."
    )
    importance: str | Path | dict[str, list[float]] | None = option(
        None,
        help="Weights of the heads where the expander starts from the mean of their output projections: a file that "
        "`patchattn calibrate heads` wrote, or a mapping from attention modules to a number per head. None: equal.",
    )
    layers_dropped: tuple[int, ...] | dict[str, list[str]] = option(
        (), help="Indices of layers to take out of the stack, in every tower with a converted layer."
    )
    kept: tuple[int, ...] | dict[str, list[int]] | None = option(
        None,
        parse=parse_kept,
        help="The heads of the static form: a list, or a mapping from layers or attention modules to lists; "
        "compress fills it in. None: the training form.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept is not None:
            check_kept(self.kept, self.heads)
        if self.activation is not None and self.activation not in ACT2FN:
            raise ValueError(f"activation must be one of transformers' names, such as 'gelu', got {self.activation!r}.")
        if not self.heads and self.layers_dropped:
            raise ValueError("heads=0 leaves every layer as it is: leave out layers_dropped.")


class SHRP(SurgeryVariant):
    """Attention whose heads share one expander in place of output projection and feed-forward part.

    Training form: `out = W_2 act(W_1 y + b_1) + b_2`, `y = sum_h g_h o_h` over the top heads of a router,
    `g = softmax(W_r x)`. Static form: the same with the heads kept and no router; `y = sum_h o_h`.

    While training it counts, over real tokens, how often every head is chosen (`usage`, `(H,)` integers) and sums the
    gates it had then. Reports `gate`, `router_probability` and `router_choice` `(B, T, H)` in the training form.
    """

    config_class = SHRPConfig
    config: SHRPConfig
    usage: torch.Tensor
    gate_sum: torch.Tensor

    def __init__(self, config: SHRPConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        self.kept: tuple[int, ...] | None = None
        if not config.heads:
            return
        heads, width, dim = (site.require(fact, by="SHRP") for fact in ("query_heads", "input_size", "head_dim"))
        size, activation = config.expander_size, config.activation
        if size is None or activation is None:
            raise ValueError("SHRP's expander_size and activation are known once the settings are fitted to a model.")
        if config.importance is not None:
            check_weights(config.importance, site)
        if config.kept is not None:
            self._keep(config)
        if max(config.heads, 1 + max(self.kept or (0,))) > heads:
            got = f"heads={config.heads}" if self.kept is None else f"kept={list(self.kept)}"
            raise ValueError(f"{site.name} has {heads} heads, counted from 0; got {got}.")
        self.expander_in_weight = nn.Parameter(torch.empty(size, dim))
        self.expander_in_bias = nn.Parameter(torch.empty(size))
        self.expander_out_weight = nn.Parameter(torch.empty(width, size))
        self.expander_out_bias = nn.Parameter(torch.empty(width))
        self.activation = ACT2FN[activation]
        if self.kept is None:
            self.router_weight = nn.Parameter(torch.empty(heads, width).normal_(std=config.router_std))
            for name in ("usage", "gate_sum"):
                self.register_buffer(name, torch.zeros(heads, dtype=torch.long))

    @classmethod
    def fit(
        cls, config: SHRPConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[SHRPConfig, Sequence[AttentionSite]]:
        if not config.heads:
            return config, sites
        hosts = [host_layer(model, site) for site in sites]
        kinds = {(host.size, host.activation) for host in hosts}
        if len(kinds) > 1:
            raise ValueError(f"The layers differ in feed-forward part ({sorted(kinds)}): convert one tower at a time.")
        size, activation = kinds.pop()
        if (config.expander_size or size) > size:
            raise ValueError(f"expander_size must be at most {size}, that of the layers, got {config.expander_size}.")
        kept = None if config.kept is None else heads_by_module(config.kept, sites)
        fitted = replace(
            config,
            expander_size=config.expander_size or size,
            activation=config.activation or activation,
            importance=head_weights(config.importance, model, sites),
            layers_dropped=dropped_layers(config.layers_dropped, model, sites),
            kept=kept,
        )
        return fitted, sites

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"heads": 0, "kept": None, "layers_dropped": ()}

    @property
    def is_identity(self) -> bool:
        return not self.config.heads

    @property
    def routes(self) -> bool:
        return self.kept is None and not self.is_identity

    @property
    def needs_context(self) -> bool:
        return self.routes

    def plan(self, model: nn.Module) -> list[Change]:
        if self.is_identity:
            return []
        host = host_layer(model, self.site)
        given, dropped = self.config.importance, self.config.layers_dropped
        weights = given[self.site.name] if isinstance(given, dict) else None
        with torch.no_grad():
            for name, value in initial_expander(model, host, self.site, self.expander_in_bias.numel(), weights).items():
                getattr(self, name).copy_(value)
        paths = dropped.get(self.site.name, ()) if isinstance(dropped, dict) else ()
        return [*host.changes, *drop_layers(model, paths), *(self.cuts(model, self.kept) if self.kept else ())]

    def cuts(self, model: nn.Module, kept: Sequence[int]) -> list[Change]:
        """The changes that leave queries, keys and values of these heads alone."""
        roles = [f"{self.site.name}.{self.site.projections[role]}" for role in ("query", "key", "value")]
        changes = cut_heads(model, self.site, kept)
        return [change for change in changes if change.module in (*roles, self.site.name)]

    def check_plain(self) -> None:
        raise NotImplementedError("its expander is no part of a plain model")

    def carried(self) -> list[str]:
        own = [change for change in self.changes if isinstance(change.value, nn.Parameter)]
        return [f"{change.module}.{change.name}" for change in own]

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if self.kept is None:
            output, weights = inner(call)
            output = apply_head_gate(output, self.gate(call))
        else:
            output, weights = inner(self.left.renumbered(call))
        hidden = nn.functional.linear(output.sum(2), self.expander_in_weight, self.expander_in_bias)
        expanded = nn.functional.linear(self.activation(hidden), self.expander_out_weight, self.expander_out_bias)
        return expanded.unsqueeze(2), weights

    def gate(self, call: AttentionCall) -> torch.Tensor:
        """`(B, Tq, H)`: the router's probability where a head is chosen, else 0."""
        tokens, real = call.context.layer_input(), call.mask.real()
        shape = tokens.shape[:2]
        if self.config.router == "first":
            first = real.expand(shape).long().argmax(1)
            tokens = tokens[torch.arange(shape[0], device=first.device), first].unsqueeze(1)
        elif self.config.router == "mean":
            row = real.expand(shape).unsqueeze(-1)
            tokens = tokens.where(row, 0.0).sum(1, keepdim=True) / row.sum(1, keepdim=True).clamp(min=1)
        logits = nn.functional.linear(tokens.to(self.router_weight.dtype), self.router_weight)
        probability = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        probability = probability.expand(*shape, -1)
        choice = select_top_k(probability.detach(), self.config.heads)
        gate = probability * choice
        self.report(call, gate=gate, router_probability=probability, router_choice=choice)
        if self.training and not _is_run_again():
            self._count(choice, gate, real)
        return gate

    @torch.no_grad()
    def _count(self, choice: torch.Tensor, gate: torch.Tensor, real: torch.Tensor) -> None:
        row = real.unsqueeze(-1)
        self.usage += (choice.bool() & row).sum((0, 1))
        self.gate_sum += (gate * row * _UNIT).round().long().sum((0, 1))

    def most_used(self) -> list[int]:
        """The heads chosen most often while training, sorted; of equally used ones the first."""
        return sorted(self.usage.argsort(descending=True, stable=True)[: self.config.heads].tolist())

    def mean_gates(self, heads: Sequence[int]) -> torch.Tensor:
        """`(n,)` mean gate of each of these heads over the tokens that chose it; 1 where none did."""
        usage, total = (counts[list(heads)].cpu().double() for counts in (self.usage, self.gate_sum))
        return torch.where(usage > 0, total / _UNIT / usage.clamp(min=1), 1.0)

    def _keep(self, config: SHRPConfig) -> None:
        if not isinstance(config.kept, dict) or self.site.name not in config.kept:
            raise ValueError(f"'shrp' is on {self.site.name}, but kept names no heads of {self.site.name}.")
        self.left = KeptHeads.of(self.site, config.kept[self.site.name])
        self.kept = self.left.kept

    def make_static(self, config: SHRPConfig, cuts: Sequence[Change]) -> None:
        """Turn the training form into the static form, whose cuts are made; the gates go into the values."""
        self.config = config
        self._keep(config)
        gates = self.mean_gates(self.left.kept).repeat_interleave(self.site.head_dim or 0)
        value = f"{self.site.name}.{self.site.projections['value']}"
        with torch.no_grad():
            for change in cuts:
                if change.module == value and isinstance(change.value, nn.Parameter):
                    change.value.mul_(gates.to(change.value).view(-1, *[1] * (change.value.dim() - 1)))
        self.changes += cuts
        for name in ("router_weight", "usage", "gate_sum"):
            delattr(self, name)


def _is_run_again() -> bool:
    """Whether this forward is activation checkpointing's second one, inside the backward pass.

    torch has no public name for it; `torch.utils.checkpoint` itself asks this one. Compiled code cannot ask.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


register_variant(
    VariantInfo(
        name="shrp",
        variant=SHRP,
        title="SHRP: Specialized Head Routing and Pruning for Efficient Encoder Compression",
        arxiv_id="2512.20635",
        year=2025,
        summary="Heads become experts with a shared expander; the most used one is kept (a reconstruction).",
        extra_parameters="fewer in all; one expander per layer, in training also heads times the layer's width",
        needs_training=True,
        capabilities=ALL_CAPABILITIES
        - {"causal", "cross", "gqa", "kv_cache", "static_cache", "softcap", "sinks", "position_bias"},
        examples=({"heads": 2, "router": "mean"}, {"kept": [2]}),
    )
)
