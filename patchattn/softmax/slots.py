"""Slots: keys of no token that take a part of every row's attention, such as attention sinks, which give nothing."""

from dataclasses import replace
from typing import final

import torch
import torch.nn.functional as F

from ..core.call import AttentionCall
from ..core.mask import Mask
from ..core.variant import Attend, AttentionOutput, Variant
from .channels import attend_wider, parts
from .rows import attend_half_row, attend_rows, reads_keys_once


class SlotVariant(Variant):
    """A variant with one more logit per head in the softmax, which no token belongs to.

    The slot is one more key in front, whose logit is made by extra channels and which every query sees: so every base
    implementation computes it, and a sink that the model has itself (`s_aux`) stands beside it in the same softmax.
    Decoding in float32, or in half precision on a CPU, puts it beside the logits of its one row, so that keys are not
    copied.
    Rows that see no key give the slot's value. Register it as `innermost`: what came after would take the slot for a
    token.
    """

    def slots(self, call: AttentionCall) -> torch.Tensor:
        """The slot's logit, beside what its key gives: `(H,)`, or by row `(B, H, Tq)`; not scaled any more."""
        raise NotImplementedError(f"{type(self).__name__} must define slots(call).")

    def slot_key(self) -> torch.Tensor | None:
        """`(Hkv, D)` the slot's key, whose scaled product with a query is added to the logit; `None`: zeros."""
        return None

    def slot_value(self) -> torch.Tensor | None:
        """`(Hkv, Dv)` what the slot gives; `None`: zeros."""
        return None

    @final
    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if call.mask.form == "tokens":
            raise NotImplementedError(
                f"Flash attention has no place for the slot of {type(self).__name__}, which each row of "
                f"{self.site.name} is to see. Load the model with attn_implementation='sdpa' or 'eager'."
            )
        logit = self.slots(call)
        dtype = torch.promote_types(logit.dtype, torch.float32)
        logit = logit.to(dtype).reshape(1, -1, 1) if logit.dim() == 1 else logit.to(dtype)
        if reads_keys_once(call):
            return _in_rows(call, logit, self.slot_key(), self.slot_value()), None
        row = attend_half_row(call)
        if row is not None:
            return _beside_row(call, *row, logit, self.slot_key(), self.slot_value()), None
        # A product, both in as many parts as the dtype needs: large logits do not overflow, small ones are kept.
        inverse = torch.full((), 1 / call.scaling, dtype=dtype, device=logit.device)
        pairs = [(b, s) for b in parts(logit, call.query.dtype) for s in parts(inverse, call.key.dtype)]
        of_query = torch.stack([b for b, _ in pairs], dim=-1)
        of_slot = torch.stack([s for _, s in pairs]).expand(1, 1, 1, -1)
        rows = 1 if _is_plain(call) else 0
        of_query = F.pad(of_query, (0, 0, rows, 0)) if of_query.shape[2] > 1 else of_query
        output, weights = attend_wider(
            _with_slot(call, rows, self.slot_key(), self.slot_value()),
            of_query,
            F.pad(of_slot, (0, 0, 0, call.key.shape[2])),
            inner,
        )
        return output[:, rows:], None if weights is None else weights[:, :, rows:, 1:]


def _in_rows(
    call: AttentionCall, logit: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
) -> torch.Tensor:
    """Output `(B, R, H, Dv)` of a call whose rows see a slot with a logit `(B or 1, H, R or 1)` beside the keys."""
    logit = _with_product(call, logit, key)
    of_slot = []

    def weigh(logits: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        slot = logit.to(logits.dtype).expand(logits.shape[:3])[..., None]
        weights = torch.cat([slot, logits], dim=-1).softmax(-1)
        of_slot.append(weights[..., :1])
        return weights[..., 1:]

    output, _ = attend_rows(call, weigh)
    return _and_slot(call, output, of_slot[0], value)


def _beside_row(
    call: AttentionCall,
    output: torch.Tensor,
    lse: torch.Tensor,
    logit: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
) -> torch.Tensor:
    """The same, of what the keys give `(B, R, H, Dv)` without the slot and the log-sum-exp `(B, H, R)` of the rows."""
    share = (_with_product(call, logit, key) - lse).sigmoid()[..., None]
    output = output.to(share.dtype) * (1 - share).transpose(1, 2)
    return _and_slot(call, output, share, value).to(call.value.dtype)


def _with_product(call: AttentionCall, logit: torch.Tensor, key: torch.Tensor | None) -> torch.Tensor:
    """The logit `(B, H, R)` of a slot with a key `(Hkv, D)`, which is multiplied as far as the logit is exact."""
    if key is None:
        return logit
    own = key.to(logit).repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=0)
    return logit + (call.query.to(logit.dtype) * own[:, None]).sum(-1) * call.scaling


def _and_slot(
    call: AttentionCall, output: torch.Tensor, share: torch.Tensor, value: torch.Tensor | None
) -> torch.Tensor:
    """Output `(B, R, H, Dv)` and a share `(B, H, R, 1)` of a slot's value `(Hkv, Dv)`."""
    if value is None:
        return output
    group = call.query.shape[1] // call.key.shape[1]
    return output + share.transpose(1, 2).to(output.dtype) * value.to(output).repeat_interleave(group, dim=0)


def _is_plain(call: AttentionCall) -> bool:
    """Whether sdpa is to see all earlier keys, told by no mask: one more row in front then keeps it so."""
    mask = call.mask
    plain = not mask.changed and mask.given is None and mask.form == "bool" and mask.causal and mask.window is None
    return plain and mask.fault is None and mask.queries == mask.keys > 1 and call.kwargs.get("position_bias") is None


def _with_slot(call: AttentionCall, rows: int, key: torch.Tensor | None, value: torch.Tensor | None) -> AttentionCall:
    """The call with one more key in front, and so many rows of zeros."""
    mask: Mask = call.mask
    if rows:
        more = {"queries": mask.queries + rows, "keys": mask.keys + 1, "columns": mask.columns + 1}
        mask = replace(mask, **more)  # type: ignore[arg-type]
    else:
        mask = mask.prepended(1)
    kwargs, bias = call.kwargs, call.kwargs.get("position_bias")
    if bias is not None:
        kwargs = {**kwargs, "position_bias": F.pad(bias, (1, 0))}
    return call.replace(
        query=F.pad(call.query, (0, 0, rows, 0)),
        key=_in_front(call.key, key),
        value=_in_front(call.value, value),
        mask=mask,
        kwargs=kwargs,
    )


def _in_front(states: torch.Tensor, one: torch.Tensor | None) -> torch.Tensor:
    """`(B, Hkv, Tk + 1, D)`, the first of them `(Hkv, D)` or zeros."""
    if one is None:
        return F.pad(states, (0, 0, 1, 0))
    return torch.cat([one.to(states)[None, :, None].expand(len(states), -1, -1, -1), states], dim=2)
