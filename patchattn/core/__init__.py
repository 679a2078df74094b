"""What every variant stands on: the call, its mask, and the chain."""
