"""What lives with a kv cache."""
