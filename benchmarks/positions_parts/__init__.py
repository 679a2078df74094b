"""Parts of `benchmarks/positions.py`."""
