"""One call of attention in which some keys meet the queries as they are, and others meet other ones."""

import torch

from ..core.call import AttentionCall


def with_two_queries(call: AttentionCall, other: torch.Tensor, meets_other: torch.Tensor, *, by: str) -> AttentionCall:
    """The call whose logits are `other . key` where `meets_other`, and `query . key` elsewhere.

    Exact for whatever comes after: queries are both, side by side, and of each key one half is zeros.

    Args:
        call: the call.
        other: `(B, H, Tq, D)` the other queries.
        meets_other: `(B or 1, 1 or Hkv, Tk)` bool: the keys that they meet.
        by: who asks, for the message.

    Raises:
        NotImplementedError: another variant comes after that one.
    """
    if not call.is_last:
        raise NotImplementedError(
            f"{by} hands on queries and keys of twice the width, of whose norms and channels a variant after it in "
            f"{call.site.name} would know nothing: name it last."
        )
    chosen = meets_other[..., None]
    key = torch.cat([call.key.masked_fill(chosen, 0), call.key.masked_fill(~chosen, 0)], dim=-1)
    return call.replace(query=torch.cat([call.query, other], dim=-1), key=key, scaling=call.scaling)
