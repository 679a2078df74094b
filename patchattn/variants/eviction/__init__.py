"""Keys are dropped from the kv cache."""
