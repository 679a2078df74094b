"""Tokens choose among heads."""
