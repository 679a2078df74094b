"""Variants that read some keys only, while the kv cache keeps all."""
