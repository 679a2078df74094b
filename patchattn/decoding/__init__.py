"""Variants that act on the logits tokens are chosen by."""
