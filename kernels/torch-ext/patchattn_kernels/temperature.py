"""Per-token inverse temperatures of queries, keys and values (SSA, arXiv 2411.12892). Plain torch."""

import torch


def scale_tokens(states: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply every token's vectors by its inverse temperature.

    Args:
        states: `(B, H, T, D)` queries, keys or values.
        factor: `(B or 1, T)` or `(B or 1, T, H)` inverse temperatures.

    Returns:
        `(B, H, T, D)` in the dtype of `states`; the product is taken in that dtype.
    """
    if factor.dtype != states.dtype:  # for a token that is decoded, even a conversion to what it is already takes long
        factor = factor.to(states.dtype)
    if factor.dim() == 3:
        return states * factor.transpose(1, 2).unsqueeze(-1)
    batch, tokens = factor.shape
    return states * factor.reshape(batch, 1, tokens, 1)
