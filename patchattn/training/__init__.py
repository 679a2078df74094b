"""Training a patched model: the load-balance loss, optimizer groups, what to log, and a schedule of active heads."""

from .balance import BalanceLoss, balance_loss
from .callbacks import ActiveRatioCallback, RoutingCallback, anneal_active_heads
from .groups import optimizer_groups
from .trainer import PatchedTrainerMixin

__all__ = [
    "ActiveRatioCallback",
    "BalanceLoss",
    "PatchedTrainerMixin",
    "RoutingCallback",
    "anneal_active_heads",
    "balance_loss",
    "optimizer_groups",
]
