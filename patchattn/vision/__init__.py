"""Image tokens: where they are, and which of them are outliers."""
