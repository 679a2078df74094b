"""Patched models as plain ones: weights and a configuration that transformers loads without us."""
