"""patchattn replaces the attention of a transformers model by a published variant, in place and reversibly.

Importing it is quick: like transformers, it loads torch only when a name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration.channels import ChannelStatistics as ChannelStatistics
    from .calibration.channels import channel_statistics as channel_statistics
    from .calibration.fluctuation import FlapStatistics as FlapStatistics
    from .calibration.fluctuation import flap_statistics as flap_statistics
    from .calibration.importance import HeadImportance as HeadImportance
    from .calibration.scoring import head_importance as head_importance
    from .call import AttentionCall as AttentionCall
    from .call import LayerContext as LayerContext
    from .call import Observation as Observation
    from .checking import Check as Check
    from .checking import CheckReport as CheckReport
    from .checking import check_patch as check_patch
    from .checkpoint import from_pretrained as from_pretrained
    from .checkpoint import load_patch as load_patch
    from .checkpoint import save_patch as save_patch
    from .compression import compress as compress
    from .compression import reset_usage as reset_usage
    from .hub import push_to_hub as push_to_hub
    from .hub import save_pretrained as save_pretrained
    from .images import ImageSpan as ImageSpan
    from .images import image_spans as image_spans
    from .images import image_token_mask as image_token_mask
    from .observation import observe as observe
    from .patching import patch_info as patch_info
    from .patching import patch_model as patch_model
    from .patching import patched as patched
    from .patching import unpatch_model as unpatch_model
    from .patching import unpatched as unpatched
    from .routing import LayerRouting as LayerRouting
    from .routing import RoutingStatistics as RoutingStatistics
    from .routing import routing_statistics as routing_statistics
    from .sentences import load_sentence_transformer as load_sentence_transformer
    from .settings import Settings as Settings
    from .settings import option as option
    from .sites import AttentionSite as AttentionSite
    from .sites import find_sites as find_sites
    from .statistics import LayerTemperatures as LayerTemperatures
    from .statistics import Spread as Spread
    from .statistics import TemperatureStatistics as TemperatureStatistics
    from .statistics import position_coefficients as position_coefficients
    from .statistics import temperature_statistics as temperature_statistics
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
    from .variant import Attend as Attend
    from .variant import AttentionOutput as AttentionOutput
    from .variant import Variant as Variant
    from .variant import VariantConfig as VariantConfig
    from .variant import VariantInfo as VariantInfo
    from .variant import list_variants as list_variants
    from .variant import register_variant as register_variant
    from .variant import variant_info as variant_info
    from .whole_model import patched_class as patched_class

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
