"""Kernels of patchattn: one file per operation, each with its plain torch reference."""

from .block_lists import (
    BlockLists,
    SinkAndRecent,
    block_means,
    lists_from_mask,
    seen_blocks,
    select_blocks,
    sink_and_recent,
)
from .block_sparse_attention import block_sparse_attention
from .column_mass import KeyCounts, column_mass, key_counts
from .merging import merge_attention
from .routed_attention import may_be_routed, routed_attention, routed_attention_if_faster
from .routing import apply_head_gate, head_norms, normalized_scores, select_top_k, straight_through
from .rows import AttentionRule
from .selected_attention import selected_attention
from .split_attention import SplitAttention, attention_with_lse, split_attention
from .temperature import scale_tokens

__all__ = [
    "AttentionRule",
    "BlockLists",
    "KeyCounts",
    "SinkAndRecent",
    "SplitAttention",
    "apply_head_gate",
    "attention_with_lse",
    "block_means",
    "block_sparse_attention",
    "column_mass",
    "head_norms",
    "key_counts",
    "lists_from_mask",
    "may_be_routed",
    "merge_attention",
    "normalized_scores",
    "routed_attention",
    "routed_attention_if_faster",
    "scale_tokens",
    "seen_blocks",
    "select_blocks",
    "select_top_k",
    "selected_attention",
    "sink_and_recent",
    "split_attention",
    "straight_through",
]
