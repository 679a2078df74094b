"""Heads and channels are taken out."""
