"""NSA, native sparse attention: chosen blocks, compressed keys and a window, each with a gate. arXiv 2502.11089."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from patchattn_kernels import AttentionRule, sink_and_recent
from patchattn_kernels.rows import full_precision, row_logits

from ...core import ranks
from ...core.call import AttentionCall
from ...core.mask import Mask
from ...core.places import Places
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import Attend, AttentionOutput, VariantConfig, VariantInfo
from ...reading.pages import PagedSelection, any_of_group, ends_of_text, top_pages, visible_pages
from ...reading.selection import CAPABILITIES, attend_to, is_zero, plain_own


@dataclass(frozen=True, kw_only=True)
class NSAConfig(VariantConfig):
    """Settings of NSA."""

    block: int = option(64, help="Keys of a block that is chosen.", source="paper", unit="keys", minimum=1)
    top_k: int | None = option(
        16,
        help="Blocks that a token reads, the first ones and the last ones among them. None: all.",
        source="paper",
        unit="blocks",
        minimum=1,
    )
    first: int = option(
        1, help="First blocks of a text that are always read.", source="paper", unit="blocks", minimum=0
    )
    local: int = option(
        2,
        help="Last blocks that are always read, the token's own among them.",
        source="paper",
        unit="blocks",
        minimum=1,
    )
    length: int = option(32, help="Keys that are compressed into one.", source="paper", unit="keys", minimum=1)
    stride: int = option(
        16,
        help="Keys from the start of one compressed key to that of the next.",
        source="paper",
        unit="keys",
        minimum=1,
    )
    window: int = option(512, help="Last keys of the third branch.", source="paper", unit="keys", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length % self.stride or self.block % self.stride:
            raise ValueError(
                f"length and block must be multiples of stride, got length={self.length}, block={self.block} and "
                f"stride={self.stride}."
            )
        if self.top_k is not None and self.top_k < self.first + self.local:
            raise ValueError(
                f"top_k={self.top_k} blocks are fewer than those that are always read, first={self.first} and "
                f"local={self.local}."
            )


class NSA(PagedSelection):
    """The sum of attention to chosen blocks, to means of keys and values, and to a window, each times a learned gate.

    Gates of a head are `2 s(w x)` for the blocks, and `2 s(w x) - 1` for the others, s the logistic function and x the
    layer's input: with the weights of 0 that they start from exactly 1, 0 and 0.
    """

    config_class = NSAConfig
    config: NSAConfig

    def __init__(self, config: NSAConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads, width = (site.require(fact, by="NSA") for fact in ("query_heads", "input_size"))
        self.chosen_gate = nn.Parameter(torch.zeros(heads, width))
        self.compressed_gate = nn.Parameter(torch.zeros(heads, width))
        self.window_gate = nn.Parameter(torch.zeros(heads, width))

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"top_k": None}

    @property
    def needs_context(self) -> bool:
        return True

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def select(self, call: AttentionCall) -> torch.Tensor | Places | None:
        self.check(call)
        config, groups = self.config, call.key.shape[1]
        if config.top_k is None or call.mask.columns <= config.top_k * config.block:
            return None
        visible, own = visible_pages(call.mask, config.block)
        forced = ends_of_text(visible, own, config.first, config.local)
        visible, forced = (any_of_group(pages, groups) for pages in (visible, forced))
        with torch.no_grad():
            weights = self.compressed_weights(call).unflatten(1, (groups, -1)).sum(dim=2)
            scores = block_scores(weights, visible.shape[-1], config.length, config.stride, config.block)
        pages = top_pages(scores, visible, forced, config.top_k)
        return self.of_pages(call, pages, config.block, "kv", most=config.top_k)

    def finish(self, call: AttentionCall, attended: AttentionOutput, inner: Attend) -> AttentionOutput:
        output, weights = attended
        gates = {
            gate: 2.0 * torch.sigmoid(self._opening(call, weight)) - shift
            for gate, weight, shift in (
                ("chosen", self.chosen_gate, 0.0),
                ("compressed", self.compressed_gate, 1.0),
                ("window", self.window_gate, 1.0),
            )
            if not is_zero(weight)
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

    def _opening(self, call: AttentionCall, weight: torch.Tensor) -> torch.Tensor:
        """`(B, Tq, H)`"""
        return F.linear(call.context.layer_input().to(weight.dtype), weight)

    def compressed_weights(self, call: AttentionCall) -> torch.Tensor:
        """`(B, H, Tq, W)` attention to the means of keys, 0 to those that are not wholly seen."""
        means = self._means(call, "keys", call.key)
        seen = seen_windows(call.mask, means.shape[2], self.config.length, self.config.stride)
        rule = AttentionRule(call.scaling, softcap=call.kwargs.get("softcap"), mask=seen)
        logits = row_logits(full_precision(call.query), means, rule, slice(None))
        return logits.softmax(dim=-1).masked_fill(~seen, 0.0)

    def _compressed(self, call: AttentionCall, *, with_weights: bool) -> AttentionOutput:
        """Attention to means, and as weights of the keys that they are means of."""
        shares, groups, config = self.compressed_weights(call), call.value.shape[1], self.config
        rate = call.kwargs.get("dropout") or 0.0
        dropped = F.dropout(shares, rate, call.module.training) if rate else shares
        means = self._means(call, "values", call.value)
        output = (dropped.unflatten(1, (groups, -1)) @ means[:, :, None]).flatten(1, 2).transpose(1, 2)
        if not with_weights:
            return output.to(call.value.dtype), None
        start = torch.arange(shares.shape[-1], device=shares.device)[:, None] * config.stride
        key = torch.arange(call.key.shape[2], device=shares.device)
        of_keys = ((key >= start) & (key < start + config.length)).to(shares.dtype) / config.length
        return output.to(call.value.dtype), (dropped @ of_keys).to(call.value.dtype)

    def _means(self, call: AttentionCall, name: str, states: torch.Tensor) -> torch.Tensor:
        """`(B, Hkv, W, D)` of the keys or values in the W = (Tk - length) // stride + 1 complete windows."""
        length, stride = self.config.length, self.config.stride
        make: Callable[[torch.Tensor], torch.Tensor] = partial(sums, size=stride)
        if states.requires_grad and torch.is_grad_enabled():  # what a kv cache remembers has no gradient
            parts = make(states[:, :, : states.shape[2] // stride * stride])
        else:
            parts = self.facts(call.replace(key=states), name, stride, make)
        ratio = length // stride
        count = max(0, parts.shape[2] - ratio + 1)
        return torch.stack([parts[:, :, n : n + count] for n in range(ratio)]).sum(dim=0) / length


def sums(states: torch.Tensor, size: int) -> torch.Tensor:
    """`(B, Hkv, P, D)` of every `size` keys of `(B, Hkv, P * size, D)`."""
    return full_precision(states).unflatten(2, (-1, size)).sum(dim=3)


def seen_windows(mask: Mask, count: int, length: int, stride: int) -> torch.Tensor:
    """`(B or 1, 1 or H, Tq, W)` bool: of which of the first W windows of keys a query sees every key.

    Args:
        mask: of the call.
        count: W.
        length: keys of a window.
        stride: keys from the start of one to that of the next.
    """
    start = torch.arange(count, device=mask.device) * stride
    if plain_own(mask) is not None:
        return (start + length - 1 <= ranks.own(mask)[:, :, None])[:, None]
    upto = F.pad(mask.seen().cumsum(dim=-1, dtype=torch.int32), (1, 0))
    return upto[..., start + length] - upto[..., start] == length


def block_scores(weights: torch.Tensor, blocks: int, length: int, stride: int, block: int) -> torch.Tensor:
    """`(B, h, Tq, P)` what windows give to blocks: the weights of each window, once for every `stride` keys that it
    shares with a block. Equation 9.

    Args:
        weights: `(B, h, Tq, W)` of windows.
        blocks: P.
        length: keys of a window.
        stride: keys from the start of one to that of the next.
        block: keys of a block.
    """
    ratio, per_block = length // stride, block // stride
    total = blocks * per_block
    padded = F.pad(weights, (ratio - 1, total - weights.shape[-1]))
    spread = torch.stack([padded[..., n : n + total] for n in range(ratio)]).sum(dim=0)
    return spread.unflatten(-1, (blocks, per_block)).sum(dim=-1)


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
        extra_parameters="three times the layer's width per query head and layer",
        needs_training=True,
        innermost=True,
        capabilities=CAPABILITIES - {"position_bias", "sinks"},
        presets={"fla": {"length": 64, "stride": 64, "first": 0, "local": 1}},
        examples=({"block": 1, "top_k": 3, "local": 1, "length": 1, "stride": 1, "window": 2},),
    )
)
