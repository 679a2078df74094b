"""Training a patched model: losses on routers, distillation, optimizer groups, logs, a schedule of active heads."""

from .balance import BalanceLoss, SpecialiseLoss, balance_loss, specialise_loss
from .callbacks import ActiveRatioCallback, RoutingCallback, anneal_active_heads
from .distillation import distillation_loss
from .groups import optimizer_groups
from .trainer import PatchedTrainerMixin

__all__ = [
    "ActiveRatioCallback",
    "BalanceLoss",
    "PatchedTrainerMixin",
    "RoutingCallback",
    "SpecialiseLoss",
    "anneal_active_heads",
    "balance_loss",
    "distillation_loss",
    "optimizer_groups",
    "specialise_loss",
]
