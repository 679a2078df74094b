"""Kernels of patchattn: one file per operation, each with its plain torch reference."""

from .column_mass import KeyCounts, column_mass, key_counts
from .routed_attention import routed_attention, routed_attention_if_faster
from .routing import apply_head_gate, head_norms, normalized_scores, select_top_k, straight_through
from .rows import AttentionRule
from .split_attention import SplitAttention, attention_with_lse, split_attention
from .temperature import scale_tokens

__all__ = [
    "AttentionRule",
    "KeyCounts",
    "SplitAttention",
    "apply_head_gate",
    "attention_with_lse",
    "column_mass",
    "head_norms",
    "key_counts",
    "normalized_scores",
    "routed_attention",
    "routed_attention_if_faster",
    "scale_tokens",
    "select_top_k",
    "split_attention",
    "straight_through",
]
