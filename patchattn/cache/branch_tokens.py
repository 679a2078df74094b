"""Where, in a kv cache, what it holds of a branch of a decoding variant begins."""

from transformers.cache_utils import DynamicLayer


class BranchTokens(DynamicLayer):
    """Which tokens of a branch are real, as keys `(B, 1, T, 1)` bool; the branch's own layers come behind it."""
