"""A benchmark of the operations: what is not verified against float64 is not timed.

On the command line `patchattn bench`, or `python -m patchattn bench`, which needs nothing installed but torch, triton,
transformers, typer, rich and matplotlib.
"""
