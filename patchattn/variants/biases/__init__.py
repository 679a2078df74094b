"""Terms added to logits."""
