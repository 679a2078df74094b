"""Gates on what heads give."""
