"""Training a patched model: losses on routers, distillation, optimizer groups, logs."""

from .balance import BalanceLoss, SpecialiseLoss, balance_loss, specialise_loss
from .callbacks import RoutingCallback
from .distillation import distillation_loss
from .groups import optimizer_groups
from .trainer import PatchedTrainerMixin

__all__ = [
    "BalanceLoss",
    "PatchedTrainerMixin",
    "RoutingCallback",
    "SpecialiseLoss",
    "balance_loss",
    "distillation_loss",
    "optimizer_groups",
    "specialise_loss",
]
