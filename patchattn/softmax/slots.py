"""Slots: keys of no token that take a part of every row's attention, such as attention sinks, which give nothing."""

from dataclasses import replace
from typing import final

import torch
import torch.nn.functional as F

from patchattn_kernels.rows import full_precision

from ..core.call import AttentionCall
from ..core.mask import Mask
from ..core.variant import Attend, AttentionOutput, Variant
from .channels import attend_wider, parts
from .rows import attend_half_row, attend_rows, attend_with_lse, of_groups, reads_keys_once


class SlotVariant(Variant):
    """A variant with one more logit per head in the softmax, or some, which no token belongs to.

    A slot is one more key in front, whose logit is made by extra channels and which every query sees: so every base
    implementation computes it, and a sink that the model has itself (`s_aux`) stands beside it in the same softmax.
    Without gradients a CPU puts it beside what the keys give and their log-sum-exp instead, and decoding in float32
    beside the logits of its one row, so that keys are not copied.
    Rows that see no key give what the slots give. Register it as `innermost`: what came after would take them for
    tokens.
    """

    def slots(self, call: AttentionCall) -> torch.Tensor:
        """Each slot's logit, beside what its key gives: `(H,)`, or by row `(B, H, Tq)`; not scaled any more."""
        raise NotImplementedError(f"{type(self).__name__} must define slots(call).")

    def slot_key(self) -> torch.Tensor | None:
        """`(Hkv, m, D)` keys of m slots, whose scaled products with queries are added to the logit.

        `None`: of one slot, and zeros.
        """
        return None

    def slot_value(self) -> torch.Tensor | None:
        """`(Hkv, m, Dv)` what the slots give; `None`: zeros."""
        return None

    @final
    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if call.mask.form == "tokens":
            raise NotImplementedError(
                f"Flash attention has no place for the slot of {type(self).__name__}, which each row of "
                f"{self.site.name} is to see. Load the model with attn_implementation='sdpa' or 'eager'."
            )
        logit, key, value = self.slots(call), self.slot_key(), self.slot_value()
        if value is not None and value.shape[-1] != call.value.shape[-1]:
            raise NotImplementedError(
                f"{type(self).__name__} was made for values of {value.shape[-1]} channels, and those of "
                f"{self.site.name} have {call.value.shape[-1]}: leave it out with modules=... or layers=..."
            )
        logit = full_precision(logit).reshape(1, -1, 1) if logit.dim() == 1 else full_precision(logit)
        logit = logit.double() if call.query.dtype == torch.float64 else logit
        known = attend_with_lse(call) or attend_half_row(call)
        if known is not None:
            return _beside_keys(call, *known, logit, key, value), None
        if reads_keys_once(call):
            return _in_rows(call, logit, key, value), None
        # A product, both in as many parts as the dtype needs: large logits do not overflow, small ones are kept.
        inverse = torch.full((), 1 / call.scaling, dtype=logit.dtype, device=logit.device)
        pairs = [(b, s) for b in parts(logit, call.query.dtype) for s in parts(inverse, call.key.dtype)]
        of_query = torch.stack([b for b, _ in pairs], dim=-1)
        count = 1 if key is None else key.shape[1]
        of_slot = torch.stack([s for _, s in pairs]).expand(1, 1, count, -1)
        rows = count if _is_plain(call) else 0
        of_query = F.pad(of_query, (0, 0, rows, 0)) if of_query.shape[2] > 1 else of_query
        output, weights = attend_wider(
            _with_slots(call, count, rows, key, value),
            of_query,
            F.pad(of_slot, (0, 0, 0, call.key.shape[2])),
            inner,
        )
        return output[:, rows:], None if weights is None else weights[:, :, rows:, count:]


def _in_rows(
    call: AttentionCall, logit: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
) -> torch.Tensor:
    """Output `(B, R, H, Dv)` of a call whose rows see slots with a logit `(B or 1, H, R or 1)` beside the keys."""
    own = _with_products(call, logit, key)
    of_slots = []

    def weigh(logits: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        slots = own.to(logits.dtype).expand(*logits.shape[:3], -1)
        weights = torch.cat([slots, logits], dim=-1).softmax(-1)
        of_slots.append(weights[..., : slots.shape[-1]])
        return weights[..., slots.shape[-1] :]

    output, _ = attend_rows(call, weigh)
    return _and_slots(output, of_slots[0], value)


def _beside_keys(
    call: AttentionCall,
    output: torch.Tensor,
    lse: torch.Tensor,
    logit: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
) -> torch.Tensor:
    """The same, of what the keys give `(B, R, H, Dv)` without slots and the log-sum-exp `(B, H, R)` of the rows."""
    if key is None and value is None:
        of_keys = (lse - logit).sigmoid()
        return (output.to(of_keys.dtype) * of_keys.transpose(1, 2)[..., None]).to(call.value.dtype)
    own = _with_products(call, logit, key)
    of_slots = own.logsumexp(-1)
    output = output.to(own.dtype) * (lse - of_slots).sigmoid().transpose(1, 2)[..., None]
    output = _and_slots(output, (of_slots - lse).sigmoid()[..., None] * own.softmax(-1), value)
    return output.to(call.value.dtype)


def _with_products(call: AttentionCall, logit: torch.Tensor, key: torch.Tensor | None) -> torch.Tensor:
    """Logits `(B or 1, H, R or 1, m)` of slots with keys `(Hkv, m, D)`, multiplied in the dtype of `logit`."""
    if key is None:
        return logit[..., None]
    return logit[..., None] + of_groups(call.query.to(logit.dtype), key.to(logit)[None].mT) * call.scaling


def _and_slots(output: torch.Tensor, shares: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
    """Output `(B, R, H, Dv)`, and shares `(B, H, R, m)` of what slots give `(Hkv, m, Dv)`."""
    if value is None:
        return output
    return output + of_groups(shares.to(output.dtype), value.to(output)[None]).transpose(1, 2)


def _is_plain(call: AttentionCall) -> bool:
    """Whether sdpa is to see all earlier keys, told by no mask: one more row in front then keeps it so."""
    mask = call.mask
    plain = not mask.changed and mask.given is None and mask.form == "bool" and mask.causal and mask.window is None
    return plain and mask.fault is None and mask.queries == mask.keys > 1 and call.kwargs.get("position_bias") is None


def _with_slots(
    call: AttentionCall, count: int, rows: int, key: torch.Tensor | None, value: torch.Tensor | None
) -> AttentionCall:
    """The call with so many more keys in front, and so many rows of zeros."""
    mask: Mask = call.mask
    if rows:
        more = {"queries": mask.queries + rows, "keys": mask.keys + count, "columns": mask.columns + count}
        mask = replace(mask, **more)  # type: ignore[arg-type]
    else:
        mask = mask.prepended(count)
    kwargs, bias = call.kwargs, call.kwargs.get("position_bias")
    if bias is not None:
        kwargs = {**kwargs, "position_bias": F.pad(bias, (count, 0))}
    return call.replace(
        query=F.pad(call.query, (0, 0, rows, 0)),
        key=_in_front(call.key, key, count),
        value=_in_front(call.value, value, count),
        mask=mask,
        kwargs=kwargs,
    )


def _in_front(states: torch.Tensor, some: torch.Tensor | None, count: int) -> torch.Tensor:
    """`(B, Hkv, m + Tk, D)`, the first m of them `(Hkv, m, D)` or zeros."""
    if some is None:
        return F.pad(states, (0, 0, count, 0))
    return torch.cat([some.to(states).expand(len(states), -1, -1, -1), states], dim=2)
