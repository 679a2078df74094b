"""Metrics as modules of the `evaluate` library: classes to be used directly, files that `evaluate.load` takes."""
