"""Bases of variants that choose which keys are read or kept, and the parts that they are made of."""
