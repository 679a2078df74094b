"""MoH: Multi-Head Attention as Mixture-of-Head Attention. The Trainer's callback is in `callback`."""

from .variant import MoH, MoHConfig, anneal_active_heads

__all__ = ["MoH", "MoHConfig", "anneal_active_heads"]
