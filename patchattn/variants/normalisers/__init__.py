"""Weights of attention by other maps than softmax."""
