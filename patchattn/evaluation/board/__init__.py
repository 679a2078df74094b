"""The board: one model under every variant and setting, on the same work."""
