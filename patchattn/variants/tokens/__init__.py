"""Variants that drop tokens between layers."""
