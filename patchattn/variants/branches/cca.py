"""Core Context Aware attention: what lies before a window is read as one key per group of tokens. arXiv 2412.12465."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from patchattn_kernels.rows import full_precision

from ...core.call import AttentionCall
from ...core.mask import Mask
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantInfo
from ...positions.rotary import ROTATED_BY, Rotary
from ...positions.variant import RotaryConfig, RotaryVariant
from ...reading.selection import plain_own
from ...reading.whole import refuse_some_keys, whole_sites

_SHARES = "shares"


@dataclass(frozen=True, kw_only=True)
class CCAConfig(RotaryConfig):
    """Settings of Core Context Aware attention; every field is described by `patchattn info cca`."""

    window: int | None = option(
        1024,
        help="Last keys that a token reads as they are, and the whole group that the first of them is in. None: all.",
        source="ours; the paper's is not known to us",
        unit="keys",
        minimum=1,
    )
    group: int = option(
        16, help="Tokens that are read as one.", source="ours; the paper's is not known to us", unit="keys", minimum=1
    )


class CCA(RotaryVariant):
    """Attention, in one softmax, to a window and to a core for each group of tokens that lies wholly before it.

    A core is the sum of its group's keys, and of its values, weighted by what the group's last token attends to of the
    group, its query heads' mean; keys are turned to the position of that last token first.
    """

    config_class = CCAConfig
    config: CCAConfig
    needs_groups = True
    name = "cca"
    splits_by_head = True
    needs_rotation = True

    @classmethod
    def fit(
        cls, config: CCAConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[CCAConfig, Sequence[AttentionSite]]:
        """Leave out what is not causal self-attention, layers with a sliding window, and those that rotate nothing."""
        whole = whole_sites(model, sites, by=f"'{cls.name}'")
        if config.window is None:
            return replace(config, rotary=None), whole
        return super().fit(config, model, whole)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"window": None}

    @property
    def is_identity(self) -> bool:
        return self.config.window is None

    @property
    def keeps_state(self) -> bool:
        return True

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        return self.rotated_by(call)

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        window, group = self.config.window, self.config.group
        if self.rotary is None or window is None:
            return inner(call)
        refuse_some_keys(call, by=self.name)
        state = call.context.sequence_state(type(self).__name__)
        if state is None and call.mask.columns < window + group:
            return inner(call)
        parts = _Groups.of(call.mask, group)
        shares = _shares(call, None if state is None else state.per_key.get(_SHARES), parts)
        if state is not None:
            state.write(_SHARES, shares, per_key=True)
        if call.mask.columns < window + group:
            return inner(call)
        places, count = parts.places.flatten(1), parts.last.shape[1]
        is_read = _read(call.mask, parts, window)
        of_key = parts.of_key[:, None]
        is_near = ~(_of_groups(F.pad(is_read, (0, 1)), of_key) & parts.is_member[:, None, None])
        weighted = _at(shares[..., None], places).unflatten(2, (count, group))
        key, value = _turned(call, self.rotary, places, group), _at(call.value, places)
        cores = [(weighted * full_precision(each).unflatten(2, (count, group))).sum(3) for each in (key, value)]
        heads = max(is_read.shape[1], is_near.shape[1])
        keep = torch.cat([each.expand(-1, heads, -1, -1) for each in (is_read, is_near)], dim=-1)
        output, weights = inner(
            call.replace(
                key=torch.cat([cores[0].to(call.key.dtype), call.key], dim=2),
                value=torch.cat([cores[1].to(call.value.dtype), call.value], dim=2),
                mask=call.mask.prepended(count).narrowed(keep),
            )
        )
        if weights is None:
            return output, None
        per_head = shares.repeat_interleave(weights.shape[1] // shares.shape[1], dim=1)[:, :, None].to(weights.dtype)
        of_cores = _of_groups(F.pad(weights[..., :count], (0, 1)), of_key)
        return output, weights[..., count:] + of_cores * per_head


class _Groups(NamedTuple):
    """The groups of a call that may be complete, by their number n: so many as its keys could be.

    Attributes:
        last: `(B or 1, P)` rank of each one's last key in the row, the first at 0; where there is none, beyond all.
        places: `(B or 1, P, group)` where its keys stand; anywhere, if there is none.
        of_key: `(B or 1, Tk)` the group that ends next, at each key or behind it.
        is_member: `(B or 1, Tk)` bool: whether the key is in it.
    """

    last: torch.Tensor
    places: torch.Tensor
    of_key: torch.Tensor
    is_member: torch.Tensor

    @classmethod
    def of(cls, mask: Mask, group: int) -> "_Groups":
        """Texts that share a row are counted off each by itself."""
        order, keys = mask.key_order()[:, 0] - 1, mask.keys
        ends = mask.real_keys()[:, 0] & (mask.key_places()[:, 0] % group == 0)
        order, ends = torch.broadcast_tensors(order, ends)
        number = ends.cumsum(-1)
        wanted = torch.arange(1, keys // group + 1, device=order.device).expand(len(order), -1).contiguous()
        end = torch.searchsorted(number.contiguous(), wanted)
        last = order.gather(1, end.clamp(max=keys - 1)).masked_fill(end == keys, keys + group)
        ranks = last[..., None] - torch.arange(group - 1, -1, -1, device=order.device)
        places = torch.searchsorted(order.contiguous(), ranks.flatten(1)).clamp(max=keys - 1)
        of_key = number - ends.to(number.dtype)
        following = F.pad(last, (0, 1), value=keys + group).gather(1, of_key)
        return cls(last, places.unflatten(1, (-1, group)), of_key, order > following - group)


def _at(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`(B, h, n, D)` of `(B, h, T, D)` those at places `(B or 1, n)`."""
    return torch.take_along_dim(states, places[:, None, :, None], dim=2)


def _of_groups(per_group: torch.Tensor, of_key: torch.Tensor) -> torch.Tensor:
    """`(B, h, Tq, Tk)` of `(B, h, Tq, P)` that of the group `(B or 1, 1, Tk)` of each key."""
    return torch.take_along_dim(per_group, of_key[:, :, None], dim=3)


def _shares(call: AttentionCall, known: torch.Tensor | None, parts: _Groups) -> torch.Tensor:
    """`(B, Hkv, Tk)` share of each key in its group's core, 0 until the group's last token has come.

    Args:
        call: the call.
        known: those of earlier calls, if there were any.
        parts: its groups.
    """
    (batch, heads, count, _), (kv_heads, keys) = call.query.shape, call.key.shape[1:3]
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    known = call.key.new_zeros(batch, kv_heads, keys, dtype=dtype) if known is None else known.to(dtype)
    group = parts.places.shape[2]
    if not parts.last.shape[1]:
        return known
    rows, ends = call.mask.row_order() - 1, parts.last
    size, most = max(len(rows), len(ends)), ends.shape[1]
    rows, ends = (each.expand(size, -1).contiguous() for each in (rows, ends))
    # Of all groups those that may end in this call: as many as its rows could close.
    first = torch.searchsorted(ends, rows[:, :1].contiguous())
    number = first + torch.arange(min(count // group + 1, most), device=rows.device)
    is_one, number = number < most, number.clamp(max=most - 1)
    last, places = ends.gather(1, number), torch.take_along_dim(parts.places, number[..., None], dim=1)
    row = torch.searchsorted(rows, last).clamp(max=count - 1)
    closes = is_one & (rows.gather(1, row) == last)
    key = _at(call.key, places.flatten(1)).to(dtype).unflatten(2, (-1, group))[:, :, None]
    query = _at(call.query, row).to(dtype).unflatten(1, (kv_heads, heads // kv_heads))
    logits = (key @ query[..., None]).squeeze(-1) * call.scaling
    cap = call.kwargs.get("softcap")
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    found = logits.softmax(-1).mean(2).flatten(2).to(dtype)
    aside = torch.where(closes[..., None], places, keys).flatten(1)
    return F.pad(known, (0, 1)).scatter(2, aside[:, None].expand(batch, kv_heads, -1), found)[..., :-1]


def _read(mask: Mask, parts: _Groups, window: int) -> torch.Tensor:
    """`(B or 1, 1 or H, Tq, P)` bool: which of P groups a row reads as a core: seen wholly, and before its window."""
    rows = mask.row_order() - 1
    is_read = (rows[..., None] - parts.last[:, None] >= window)[:, None]
    if plain_own(mask) is None:
        seen = torch.take_along_dim(mask.seen(), parts.places.flatten(1)[:, None, None], dim=3)
        is_read = is_read & seen.unflatten(3, parts.places.shape[1:]).all(-1)
    return is_read


def _turned(call: AttentionCall, rotary: Rotary, places: torch.Tensor, group: int) -> torch.Tensor:
    """`(B, Hkv, n, D)` the keys at places `(B or 1, n)`, each as if it stood where the last one of its group does."""
    old = call.key_fact(ROTATED_BY)
    old = torch.take_along_dim(old, places[:, None], dim=2)
    new = old.unflatten(2, (-1, group))[..., -1:].expand(-1, -1, -1, group).flatten(2)
    return rotary.turned(_at(call.key, places), old, new)


register_variant(
    VariantInfo(
        name="cca",
        variant=CCA,
        title="Core Context Aware Transformers for Long Context Language Modeling",
        arxiv_id="2412.12465",
        year=2024,
        summary="Tokens read a window as it is, and before it a weighted mean of each group of tokens.",
        extra_parameters="none",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "position_bias"},
        examples=({"window": 2, "group": 2},),
    )
)
