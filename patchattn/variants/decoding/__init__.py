"""Logits are contrasted with those of a second branch."""
