"""Libraries whose models can be patched."""
