"""NSA, native sparse attention: chosen blocks, compressed keys and a window, each with a gate. arXiv 2502.11089."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from patchattn_kernels import sink_and_recent
from patchattn_kernels.rows import full_precision

from ...core.call import AttentionCall
from ...core.places import Places
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import Attend, AttentionOutput, VariantInfo
from ...reading.choose import highest
from ...reading.compressed import CompressedConfig, CompressedSelection
from ...reading.selection import CAPABILITIES, attend_to


@dataclass(frozen=True, kw_only=True)
class NSAConfig(CompressedConfig):
    """Settings of NSA."""

    top_k: int | None = option(
        16,
        help="Blocks that a token reads, the first ones and the last ones among them. None: all.",
        source="paper",
        unit="blocks",
        minimum=1,
    )
    window: int = option(512, help="Last keys of the third branch.", source="paper", unit="keys", minimum=1)
    compression: Literal["mean", "mlp"] = option(
        "mean",
        help="What keys and values of a window are compressed into: their mean, or their mean and what a learned MLP "
        "adds to it, which starts at nothing.",
        source="released code of a port; the paper learns it (preset=paper)",
        choices=("mean", "mlp"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and self.top_k < self.first + self.local:
            raise ValueError(
                f"top_k={self.top_k} blocks are fewer than those that are always read, first={self.first} and "
                f"local={self.local}."
            )


class NSA(CompressedSelection):
    """The sum of attention to chosen blocks, to means of keys and values, and to a window, each times a learned gate.

    Gates of a head are `2 s(w x)` for the blocks, and `2 s(w x) - 1` for the others, s the logistic function and x the
    layer's input: with the weights of 0 that they start from exactly 1, 0 and 0.
    """

    config_class = NSAConfig
    config: NSAConfig
    splits_by_head = True

    def __init__(self, config: NSAConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads, width = (site.require(fact, by="NSA") for fact in ("query_heads", "input_size"))
        self.chosen_gate = nn.Parameter(torch.zeros(heads, width))
        self.compressed_gate = nn.Parameter(torch.zeros(heads, width))
        self.window_gate = nn.Parameter(torch.zeros(heads, width))
        if config.compression == "mlp":
            dim, length = site.require("head_dim", by="NSA"), config.length
            for stream in ("keys", "values"):
                self.register_parameter(f"{stream}_place", nn.Parameter(torch.zeros(length, dim)))
                self.register_parameter(f"{stream}_in", nn.Parameter(torch.empty(length, dim, dim).normal_(std=0.02)))
                self.register_parameter(f"{stream}_out", nn.Parameter(torch.zeros(dim, dim)))

    @property
    def needs_context(self) -> bool:
        return True

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.chosen_gate, self.compressed_gate, self.window_gate]

    def select(self, call: AttentionCall) -> torch.Tensor | Places | None:
        block, top_k = self.config.block, self.config.top_k
        blocks = self.blocks(call, top_k)
        if top_k is None or blocks is None:
            return None
        visible, forced = blocks
        with torch.no_grad():
            scores = self.by_stride(self.group_weights(call), visible.shape[-1], 0.0).sum(dim=(-1, -2))  # Equation 9
        return self.of_pages(call, highest(scores, visible, forced, top_k), block, most=top_k)

    def finish(self, call: AttentionCall, attended: AttentionOutput, inner: Attend) -> AttentionOutput:
        output, weights = attended
        gates = {
            gate: 2.0 * torch.sigmoid(self._opening(call, weight)) - shift
            for gate, weight, shift in (
                ("chosen", self.chosen_gate, 0.0),
                ("compressed", self.compressed_gate, 1.0),
                ("window", self.window_gate, 1.0),
            )
            if not self.is_zero(weight)
        }
        if gates:
            self.report(call, **{f"{name}_gate": gate for name, gate in gates.items()})
        parts: list[AttentionOutput] = [attended]
        if "chosen" in gates:
            parts = [_gated(gates["chosen"], output, weights)]
        if "window" in gates:
            recent = attend_to(call, sink_and_recent(0, self.config.window, 1, call.query.device), inner)
            parts.append(_gated(gates["window"], *recent))
        if "compressed" in gates:
            parts.append(_gated(gates["compressed"], *self._compressed(call, with_weights=weights is not None)))
        found = [part for _, part in parts if part is not None]
        total = torch.stack([part for part, _ in parts]).sum(dim=0) if len(parts) > 1 else parts[0][0]
        return total, torch.stack(found).sum(dim=0) if len(found) == len(parts) else None

    def means(self, call: AttentionCall, name: str, states: torch.Tensor) -> torch.Tensor:
        """As `CompressedSelection.means`; with an MLP, `mean + out gelu(sum_m in_m (x_m + place_m))`, m in a window."""
        means = super().means(call, name, states)
        if self.config.compression == "mean" or self.is_zero(getattr(self, f"{name}_out")):
            return means
        place, weight, out = (getattr(self, f"{name}_{part}").to(means.dtype) for part in ("place", "in", "out"))
        if states.shape[-1] != place.shape[-1]:
            raise NotImplementedError(
                f"NSA compresses {name} of {place.shape[-1]} numbers, and those of {self.site.name} have "
                f'{states.shape[-1]}: use compression="mean".'
            )
        stride, ratio = self.config.stride, self.config.length // self.config.stride

        def hidden(some: torch.Tensor) -> torch.Tensor:
            """`(B, Hkv, p, ratio * D)` what p strides of keys give to each of the windows that they are in."""
            strides = full_precision(some).unflatten(2, (-1, 1, stride))
            placed = strides + place.unflatten(0, (ratio, stride))
            return torch.einsum("bgpnsd,nsdh->bgpnh", placed, weight.unflatten(0, (ratio, stride))).flatten(-2)

        if torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad):
            parts = hidden(states[:, :, : states.shape[2] // stride * stride])  # a kv cache remembers no gradient
        else:
            parts = self.facts(call.replace(key=states), f"{name} compressed", stride, lambda some, _: hidden(some))
        parts = parts.unflatten(-1, (ratio, -1))
        windows = torch.stack([parts[:, :, n : n + means.shape[2], n] for n in range(ratio)]).sum(dim=0)
        return means + F.gelu(windows) @ out.mT

    def _opening(self, call: AttentionCall, weight: torch.Tensor) -> torch.Tensor:
        """`(B, Tq, H)`"""
        return F.linear(call.context.layer_input().to(weight.dtype), weight)

    def _compressed(self, call: AttentionCall, *, with_weights: bool) -> AttentionOutput:
        """Attention to means, and as weights of the keys that they are means of."""
        shares, groups, config = self.compressed_weights(call), call.value.shape[1], self.config
        rate = call.kwargs.get("dropout") or 0.0
        dropped = F.dropout(shares, rate, call.module.training) if rate else shares
        means = self.means(call, "values", call.value)
        output = (dropped.unflatten(1, (groups, -1)) @ means[:, :, None]).flatten(1, 2).transpose(1, 2)
        if not with_weights:
            return output.to(call.value.dtype), None
        start = torch.arange(shares.shape[-1], device=shares.device)[:, None] * config.stride
        key = torch.arange(call.key.shape[2], device=shares.device)
        of_keys = ((key >= start) & (key < start + config.length)).to(shares.dtype) / config.length
        return output.to(call.value.dtype), (dropped @ of_keys).to(call.value.dtype)


def _gated(gate: torch.Tensor, output: torch.Tensor, weights: torch.Tensor | None) -> AttentionOutput:
    """Output `(B, Tq, H, D)` and weights `(B, H, Tq, Tk)` times a gate `(B, Tq, H)`."""
    gated = None if weights is None else weights * gate.transpose(1, 2)[..., None].to(weights.dtype)
    return output * gate[..., None].to(output.dtype), gated


register_variant(
    VariantInfo(
        name="nsa",
        variant=NSA,
        title="Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
        arxiv_id="2502.11089",
        year=2025,
        summary="Every token reads chosen blocks of keys, means of keys and a window, each with a learned gate.",
        extra_parameters="three times the layer's width per query head and layer; with an MLP, two of these per layer",
        needs_training=True,
        innermost=True,
        capabilities=CAPABILITIES - {"position_bias", "sinks"},
        presets={"paper": {"compression": "mlp"}, "fla": {"length": 64, "stride": 64, "first": 0, "local": 1}},
        examples=(
            {"block": 1, "top_k": 3, "local": 1, "length": 1, "stride": 1, "window": 2},
            {"block": 1, "top_k": 3, "local": 1, "length": 1, "stride": 1, "window": 2, "compression": "mlp"},
        ),
    )
)
