"""Masks over the grid of patches in vision towers."""
