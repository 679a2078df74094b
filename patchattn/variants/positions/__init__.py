"""Variants that change where tokens stand."""
