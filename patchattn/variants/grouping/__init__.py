"""Variants that let more query heads share a kv head."""
