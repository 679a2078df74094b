"""Attention is moved away from sinks."""
