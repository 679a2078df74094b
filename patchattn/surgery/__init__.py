"""Changes of weights and shapes: of heads, of channels, of projections."""
