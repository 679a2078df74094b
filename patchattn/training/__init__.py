"""Training a patched model: losses on routers, distillation (of layers, and MiniLM's), optimizer groups, logs."""

from .balance import BalanceLoss, SpecialiseLoss, balance_loss, specialise_loss
from .callbacks import RoutingCallback
from .distillation import distillation_loss
from .groups import optimizer_groups
from .minilm import AttentionStreams, attention_streams, minilm_loss
from .trainer import PatchedTrainerMixin

__all__ = [
    "AttentionStreams",
    "BalanceLoss",
    "PatchedTrainerMixin",
    "RoutingCallback",
    "SpecialiseLoss",
    "attention_streams",
    "balance_loss",
    "distillation_loss",
    "minilm_loss",
    "optimizer_groups",
    "specialise_loss",
]
