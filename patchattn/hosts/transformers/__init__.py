"""The seam in transformers: its attention functions, its masks, its attention modules."""
