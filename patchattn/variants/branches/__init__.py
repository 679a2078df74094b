"""Attention beside attention: a second output, made of other features, is added."""
