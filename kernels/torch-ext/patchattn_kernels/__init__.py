"""Kernels of patchattn: one file per operation, each with its plain torch reference."""

from .routing import apply_head_gate, head_norms, normalized_scores, select_top_k, straight_through
from .temperature import scale_tokens

__all__ = [
    "apply_head_gate",
    "head_norms",
    "normalized_scores",
    "scale_tokens",
    "select_top_k",
    "straight_through",
]
