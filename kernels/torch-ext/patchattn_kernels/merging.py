"""Attention of the same queries to several sets of keys, put together to attention to all of them.

A set gives output `O_s = sum_j exp(z_j - L_s) v_j` and log-sum-exp `L_s` of a row's logits `z_j`. With all keys that is
`O = sum_s exp(L_s - L) O_s`, where `L = log sum_s exp(L_s)`: exact, in any order, and without the logits. So keys may
be read in blocks (online softmax, arXiv 1805.02867) or from other devices in turn (Ring Attention, arXiv 2310.01889).
"""

from collections.abc import Sequence

import torch


def merge_attention(*parts: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the keys of all parts, from what attention to each of them alone gives.

    Args:
        parts: of disjoint keys and the same queries: output `(B, H, Tq, Dv)`, and natural log-sum-exp `(B, H, Tq)` of
            the logits, -inf where a row sees none of the keys; as `attention_with_lse` gives them.

    Returns:
        The same of all keys: output, zeros where a row sees nothing, and log-sum-exp. Differentiable in both.

    Raises:
        ValueError: there is no part, or their shapes differ.
    """
    if not parts:
        raise ValueError("merge_attention expects at least one (output, log-sum-exp), got none.")
    shape, rows = parts[0][0].shape, parts[0][1].shape
    for output, lse in parts:
        if output.shape != shape or lse.shape != rows or shape[:-1] != rows:
            raise ValueError(
                "Parts are outputs (B, H, Tq, Dv) and log-sum-exps (B, H, Tq) of the same queries, got "
                f"{[(tuple(output.shape), tuple(lse.shape)) for output, lse in parts]}."
            )
    shares, total = shares_of([lse for _, lse in parts])
    # What an implementation leaves in a row that sees nothing may be no number.
    outputs = [output.masked_fill((lse == -torch.inf)[..., None], 0.0) for output, lse in parts]
    found = sum(share[..., None] * output for share, output in zip(shares, outputs, strict=True))
    return torch.as_tensor(found), total


def shares_of(sums: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of each row, the share of each part in the softmax over all, 0 where it sees nothing; and the log-sum-exp of all.

    Args:
        sums: log-sum-exps of parts, of one shape, -inf of rows that see nothing.
    """
    stacked = torch.stack(list(sums))
    empty = (stacked == -torch.inf).all(0)
    total = stacked.masked_fill(empty, 0.0).logsumexp(0)
    return [(lse - total).exp() for lse in sums], total.masked_fill(empty, -torch.inf)
