"""Bases of variants that choose which keys are read or kept."""
