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
    by_head = factor.unsqueeze(1) if factor.dim() == 2 else factor.transpose(1, 2)
    return states * by_head.unsqueeze(-1).to(states.dtype)
