"""Where tokens stand, and what their queries and keys are rotated by."""
