"""Attention Transition: from layer to layer, rows give what they spread thinly to a band of keys. arXiv 2307.13365."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core import ranks
from ...core.call import AttentionCall
from ...core.mask import Mask
from ...core.registry import register_variant
from ...core.selection import base_model, require_causal
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.token_numbers import key_numbers, row_numbers
from ...core.variant import ALL_CAPABILITIES, VariantConfig, VariantInfo
from ...softmax.rows import RowVariant

_FIRST = 3  # tokens that are in no band
_AHEAD = 3  # bands that rows are ahead of the keys they strengthen
_ABOVE, _BELOW = 100.0, 5.0  # shares of what is given, of keys that have at least the threshold and of the others


@dataclass(frozen=True, kw_only=True)
class AttentionTransitionConfig(VariantConfig):
    """Settings of Attention Transition; every field is described by `patchattn info attention_transition`."""

    inter: bool = option(True, help="Rows of the band that is three ahead strengthen a layer's band of keys.")
    outer: bool = option(True, help="The prompt's last rows strengthen the band before the one that rows are in.")
    begin: int = option(
        100, help="With inter: first tokens that are in no band, 3 more aside.", source="released code", minimum=0
    )
    last: int = option(
        200, help="Last tokens, which are in no band and which outer edits.", source="released code", minimum=0
    )
    inter_threshold: float = option(
        0.5,
        help="With inter: weights below this, over the number of tokens between begin and the band, are taken away.",
        source="released code",
        minimum=0.0,
        maximum=1000.0,
    )
    outer_threshold: float = option(
        0.3,
        help="With outer: weights below this, over the number of tokens before the last ones, are taken away.",
        source="released code",
        minimum=0.0,
        maximum=1000.0,
    )


class AttentionTransition(RowVariant):
    """Attention in which rows of a prompt give the weights below a threshold to a band of keys, which moves by layers.

    Bands are shares of the prompt, in tokens that are no padding; what comes after the prompt attends as before.
    """

    config_class = AttentionTransitionConfig
    config: AttentionTransitionConfig

    @classmethod
    def fit(
        cls, config: AttentionTransitionConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[AttentionTransitionConfig, Sequence[AttentionSite]]:
        base: Any = base_model(model)
        if base.config.is_encoder_decoder:
            raise NotImplementedError(
                f"attention_transition edits rows of a prompt, which {type(base).__name__} reads with its encoder."
            )
        reason = "rows give attention to earlier tokens"
        return config, require_causal(model, sites, by="attention_transition", because=reason)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"inter": False, "outer": False}

    @property
    def is_identity(self) -> bool:
        return not (self.config.inter or self.config.outer) or self.site.layer_index >= self.site.layer_count - 1

    @property
    def keeps_state(self) -> bool:
        """The kv cache tells which token is which, also where the mask does not."""
        return not self.is_identity

    def weights(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        config, layer, count = self.config, self.site.layer_index, self.site.layer_count + _AHEAD
        found = logits.softmax(-1) * visible
        own, prompt = call.context.own_key(), call.context.query.shape[2]
        begins = prompt == call.mask.columns if own is None else own == 0
        if isinstance(begins, bool) and not begins:
            return found
        if call.mask.index is not None:
            raise NotImplementedError(
                f"attention_transition cuts a prompt into bands, and {self.site.name} is given only some of its keys."
            )
        rows, keys = row_numbers(call.mask)[..., None], key_numbers(call.mask)[:, None]
        edge = _text_lengths(call.mask, prompt)[..., None] - config.last  # (B or 1, R, 1)
        edge = torch.where(torch.as_tensor(begins, device=edge.device), edge, 0)  # no row is in a band then
        if config.inter:
            width = _width(edge - config.begin - _FIRST, count)
            start = config.begin + _FIRST + layer * width
            ahead = start + _AHEAD * width
            here = (rows >= ahead) & (rows < (ahead + width).minimum(edge))
            band = here & (keys >= start) & (keys < start + width)
            found = _transferred(found, visible, band, config.inter_threshold / (ahead - config.begin))
        if config.outer and layer >= 1:
            width = _width(edge - _FIRST, count)
            start = _FIRST + (layer + _AHEAD - 1) * width
            band = (rows >= edge) & (keys >= start) & (keys < (start + width).minimum(edge))
            found = _transferred(found, visible, band, config.outer_threshold / edge.clamp(min=1))
        return found


def _text_lengths(mask: Mask, prompt: int) -> torch.Tensor:
    """`(B or 1, R)` number of real tokens of each row's text, among the first ones, which are the prompt."""
    real, starts = mask.real_keys()[:, 0, :prompt].long(), ranks.starts(mask)  # behind them a static cache is empty
    if starts is None:
        return real.sum(-1, keepdim=True).expand(-1, mask.real().shape[1])
    text = starts[:, :prompt].long().cumsum(-1).expand(len(real), -1)
    lengths = torch.zeros_like(text).scatter_add(1, text, real.expand(len(text), -1))
    return ranks.taken(lengths.gather(1, text), ranks.own(mask))


def _width(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Of so many bands of some tokens; no key is in a band of width 0."""
    return (-(-tokens // count)).clamp(min=0)


def _transferred(
    weights: torch.Tensor, visible: torch.Tensor, band: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    """Weights `(B, H, R, T)` where rows give what is below a threshold to a band of keys; their sums stay.

    Args:
        weights: of all keys.
        visible: `(B or 1, H or 1, R, T)` bool.
        band: `(B or 1, R, T)` bool: the keys that are given it. Rows give it of which one has more than the threshold.
        threshold: `(B or 1, R, 1)`.
    """
    limit, band = threshold.to(weights.dtype)[:, None], band[:, None] & visible
    gives = ((weights > limit) & band).any(-1, keepdim=True)
    kept = weights.where(weights >= limit, 0.0)
    removed = (weights - kept).sum(-1, keepdim=True)
    share = torch.where(kept > 0, _ABOVE, _BELOW) * band
    given = kept + removed * share / share.sum(-1, keepdim=True).clamp(min=_BELOW)
    return torch.where(gives, given, weights)


register_variant(
    VariantInfo(
        name="attention_transition",
        variant=AttentionTransition,
        title="Empower Your Model with Longer and Better Context Comprehension",
        arxiv_id="2307.13365",
        year=2023,
        code="https://github.com/yileijin/Attention-Transition",
        summary="Rows of a prompt give what they spread thinly to a band of keys that moves on from layer to layer.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "sinks"},
        presets={"notebook": {"begin": 5, "last": 50, "outer_threshold": 0.5}},
        examples=({"begin": 0, "last": 1, "inter_threshold": 0.85},),
    )
)
