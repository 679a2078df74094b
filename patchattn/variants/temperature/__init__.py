"""Queries, keys or values are scaled."""
