"""What is found on data before a model is patched: lists of heads."""
