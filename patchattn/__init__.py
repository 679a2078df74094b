"""patchattn replaces the attention of a transformers model by a published variant, in place and reversibly.

Importing it is quick: like transformers, it loads torch only when a name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checking.check import Check as Check
    from .checking.check import CheckReport as CheckReport
    from .checking.check import check_patch as check_patch
    from .core.call import AttentionCall as AttentionCall
    from .core.call import LayerContext as LayerContext
    from .core.call import Observation as Observation
    from .core.importance import HeadImportance as HeadImportance
    from .core.observation import observe as observe
    from .core.patching import patch_info as patch_info
    from .core.patching import patch_model as patch_model
    from .core.patching import patched as patched
    from .core.patching import unpatch_model as unpatch_model
    from .core.patching import unpatched as unpatched
    from .core.settings import Settings as Settings
    from .core.settings import option as option
    from .core.sites import AttentionSite as AttentionSite
    from .core.sites import find_sites as find_sites
    from .core.variant import Attend as Attend
    from .core.variant import AttentionOutput as AttentionOutput
    from .core.variant import Variant as Variant
    from .core.variant import VariantConfig as VariantConfig
    from .core.variant import VariantInfo as VariantInfo
    from .core.variant import list_variants as list_variants
    from .core.variant import register_variant as register_variant
    from .core.variant import variant_info as variant_info
    from .inspection.channels import ChannelStatistics as ChannelStatistics
    from .inspection.channels import channel_statistics as channel_statistics
    from .inspection.head_importance import head_importance as head_importance
    from .inspection.routing import LayerRouting as LayerRouting
    from .inspection.routing import RoutingStatistics as RoutingStatistics
    from .inspection.routing import routing_statistics as routing_statistics
    from .inspection.temperatures import LayerTemperatures as LayerTemperatures
    from .inspection.temperatures import Spread as Spread
    from .inspection.temperatures import TemperatureStatistics as TemperatureStatistics
    from .inspection.temperatures import position_coefficients as position_coefficients
    from .inspection.temperatures import temperature_statistics as temperature_statistics
    from .saving.checkpoint import from_pretrained as from_pretrained
    from .saving.checkpoint import load_patch as load_patch
    from .saving.checkpoint import save_patch as save_patch
    from .saving.hub import push_to_hub as push_to_hub
    from .saving.hub import save_pretrained as save_pretrained
    from .saving.sentences import load_sentence_transformer as load_sentence_transformer
    from .saving.whole_model import patched_class as patched_class
    from .training import ActiveRatioCallback as ActiveRatioCallback
    from .training import BalanceLoss as BalanceLoss
    from .training import PatchedTrainerMixin as PatchedTrainerMixin
    from .training import RoutingCallback as RoutingCallback
    from .training import SpecialiseLoss as SpecialiseLoss
    from .training import anneal_active_heads as anneal_active_heads
    from .training import balance_loss as balance_loss
    from .training import distillation_loss as distillation_loss
    from .training import optimizer_groups as optimizer_groups
    from .training import specialise_loss as specialise_loss
    from .variants.pruning.flap.statistics import FlapStatistics as FlapStatistics
    from .variants.pruning.flap.statistics import flap_statistics as flap_statistics
    from .variants.pruning.shrp.compression import compress as compress
    from .variants.pruning.shrp.compression import reset_usage as reset_usage
    from .vision.images import ImageSpan as ImageSpan
    from .vision.images import image_spans as image_spans
    from .vision.images import image_token_mask as image_token_mask

__version__ = "0.1.0"

_NAMES = {
    "calibration.channels": ("ChannelStatistics", "channel_statistics"),
    "calibration.fluctuation": ("FlapStatistics", "flap_statistics"),
    "calibration.importance": ("HeadImportance",),
    "calibration.scoring": ("head_importance",),
    "call": ("AttentionCall", "LayerContext", "Observation"),
    "checking": ("Check", "CheckReport", "check_patch"),
    "checkpoint": ("from_pretrained", "load_patch", "save_patch"),
    "compression": ("compress", "reset_usage"),
    "hub": ("push_to_hub", "save_pretrained"),
    "images": ("ImageSpan", "image_spans", "image_token_mask"),
    "observation": ("observe",),
    "patching": ("patch_info", "patch_model", "patched", "unpatch_model", "unpatched"),
    "routing": ("LayerRouting", "RoutingStatistics", "routing_statistics"),
    "sentences": ("load_sentence_transformer",),
    "settings": ("Settings", "option"),
    "sites": ("AttentionSite", "find_sites"),
    "statistics": (
        "LayerTemperatures",
        "Spread",
        "TemperatureStatistics",
        "position_coefficients",
        "temperature_statistics",
    ),
    "training": (
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
    ),
    "variant": (
        "Attend",
        "AttentionOutput",
        "Variant",
        "VariantConfig",
        "VariantInfo",
        "list_variants",
        "register_variant",
        "variant_info",
    ),
    "whole_model": ("patched_class",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in (*_NAMES, "variants"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'patchattn' has no attribute {name!r}")
    importlib.import_module(".adapters", __name__).guard_adapters()
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
