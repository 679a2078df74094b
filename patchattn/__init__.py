"""patchattn replaces the attention of a transformers model by a published variant, in place and reversibly.

Importing it is quick: like transformers, it loads torch only when a name is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .core.host import offer_host
from .core.registry import offer
from .saving.card_report import offer_card_report
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .cache.memory import CacheReport as CacheReport
    from .cache.memory import LayerMemory as LayerMemory
    from .cache.memory import cache_report as cache_report
    from .checking.check import Check as Check
    from .checking.check import CheckReport as CheckReport
    from .checking.check import check_patch as check_patch
    from .core.call import AttentionCall as AttentionCall
    from .core.host import find_sites as find_sites
    from .core.importance import HeadImportance as HeadImportance
    from .core.info import PatchInfo as PatchInfo
    from .core.info import patch_info as patch_info
    from .core.observation import observe as observe
    from .core.patching import patch_model as patch_model
    from .core.patching import patched as patched
    from .core.patching import unpatch_model as unpatch_model
    from .core.patching import unpatched as unpatched
    from .core.probing import PlacedProbe as PlacedProbe
    from .core.probing import probed as probed
    from .core.registry import list_variants as list_variants
    from .core.registry import register_variant as register_variant
    from .core.registry import variant_info as variant_info
    from .core.report import Observation as Observation
    from .core.settings import Settings as Settings
    from .core.settings import option as option
    from .core.sites import AttentionSite as AttentionSite
    from .core.surroundings import LayerContext as LayerContext
    from .core.variant import Attend as Attend
    from .core.variant import AttentionOutput as AttentionOutput
    from .core.variant import Variant as Variant
    from .core.variant import VariantConfig as VariantConfig
    from .core.variant import VariantInfo as VariantInfo
    from .exporting.export import export as export
    from .inspection.channels import ChannelStatistics as ChannelStatistics
    from .inspection.channels import channel_statistics as channel_statistics
    from .inspection.head_importance import head_importance as head_importance
    from .inspection.kv_moments import kv_moments as kv_moments
    from .inspection.routing import LayerRouting as LayerRouting
    from .inspection.routing import RoutingStatistics as RoutingStatistics
    from .inspection.routing import routing_statistics as routing_statistics
    from .inspection.temperatures import LayerTemperatures as LayerTemperatures
    from .inspection.temperatures import Spread as Spread
    from .inspection.temperatures import TemperatureStatistics as TemperatureStatistics
    from .inspection.temperatures import temperature_statistics as temperature_statistics
    from .positions.spans import Span as Span
    from .positions.spans import marked as marked
    from .saving.checkpoint import from_pretrained as from_pretrained
    from .saving.checkpoint import load_patch as load_patch
    from .saving.checkpoint import save_patch as save_patch
    from .saving.hub import push_to_hub as push_to_hub
    from .saving.hub import save_pretrained as save_pretrained
    from .saving.sentences import load_sentence_transformer as load_sentence_transformer
    from .saving.whole_model import patched_class as patched_class
    from .training import BalanceLoss as BalanceLoss
    from .training import PatchedTrainerMixin as PatchedTrainerMixin
    from .training import RoutingCallback as RoutingCallback
    from .training import SpecialiseLoss as SpecialiseLoss
    from .training import balance_loss as balance_loss
    from .training import distillation_loss as distillation_loss
    from .training import optimizer_groups as optimizer_groups
    from .training import specialise_loss as specialise_loss
    from .vision.images import ImageSpan as ImageSpan
    from .vision.images import image_spans as image_spans
    from .vision.images import image_token_mask as image_token_mask

offer_host(f"{__name__}.hosts.transformers.seam")
offer_card_report(f"{__name__}.evaluation.report.card")
# The shipped variants, each registered by its module when it is first asked for.
offer(
    {
        name: f"{__name__}.variants.{module}"
        for name, module in {
            "a_vl": "eviction.a_vl",
            "act": "sinks.act",
            "adakv": "eviction.adakv",
            "agent": "grids.agent",
            "ape": "positions.ape",
            "attention_bias": "sinks.attention_bias",
            "axial": "grids.axial",
            "bibert": "normalisers.bibert",
            "biformer": "grids.biformer",
            "block_attention": "positions.block_attention",
            "cad": "decoding.cad",
            "cca": "branches.cca",
            "cope": "biases.cope",
            "damro": "decoding.damro",
            "decore": "decoding.decore",
            "dex": "gating.dex",
            "differential": "mixing.differential",
            "dma": "selection.dma",
            "duo": "eviction.duo",
            "ee_mllm": "selection.ee_mllm",
            "entmax": "normalisers.entmax",
            "exclusive": "gating.exclusive",
            "expected_attention": "eviction.expected_attention",
            "fastv": "tokens.fastv",
            "flap": "pruning.flap.variant",
            "flex_prefill": "selection.flex_prefill",
            "focus_icl": "positions.focus_icl",
            "fox": "biases.fox",
            "function_vectors": "editing.function_vectors",
            "gated": "gating.gated",
            "gin": "branches.gin",
            "gpsa": "grids.gpsa",
            "graph_kv": "positions.graph_kv",
            "gqa_convert": "grouping.gqa_convert",
            "h2o": "eviction.h2o",
            "halo": "grids.halo",
            "hat": "positions.hat",
            "hdt": "positions.hdt",
            "heads": "editing.heads",
            "hepos": "positions.hepos",
            "hilo": "grids.hilo",
            "hip": "selection.hip",
            "hiprune": "tokens.hiprune",
            "attention_buckets": "decoding.attention_buckets",
            "attention_transition": "editing.attention_transition",
            "hyper": "selection.hyper",
            "keydiff": "eviction.keydiff",
            "knorm": "eviction.knorm",
            "landmark": "normalisers.landmark",
            "layer_shortcuts": "branches.layer_shortcuts",
            "logn": "temperature.logn",
            "longheads": "selection.longheads",
            "longlora": "selection.longlora",
            "lserve": "selection.lserve",
            "massive": "editing.massive",
            "maxvit": "grids.maxvit",
            "meta_tokens": "sinks.meta_tokens",
            "moba": "selection.moba",
            "moh": "routing.moh",
            "mswa": "selection.mswa",
            "mta": "mixing.mta",
            "neighborhood": "grids.neighborhood",
            "nosa": "selection.nosa",
            "nsa": "selection.nsa",
            "pai": "decoding.pai",
            "paint": "decoding.paint",
            "parallel_context": "positions.parallel_context",
            "power": "selection.power",
            "prune": "pruning.prune",
            "pyramidkv": "eviction.pyramidkv",
            "qk_norm": "temperature.qk_norm",
            "quadrangle": "grids.quadrangle",
            "quest": "selection.quest",
            "rbd_like": "decoding.rbd_like",
            "recycled": "selection.recycled",
            "self_extend": "positions.self_extend",
            "shrp": "pruning.shrp.variant",
            "sigmoid": "normalisers.sigmoid",
            "sink": "sinks.sink",
            "snapkv": "eviction.snapkv",
            "softpick": "normalisers.softpick",
            "sparsifiner": "grids.sparsifiner",
            "squeezed": "selection.squeezed.variant",
            "ssa": "temperature.ssa",
            "ssmax": "temperature.ssmax",
            "streaming": "selection.streaming",
            "streaming_llm": "eviction.streaming_llm",
            "subsampled": "selection.subsampled",
            "talking_heads": "mixing.talking_heads",
            "task_vectors": "editing.task_vectors",
            "think": "eviction.think",
            "tova": "eviction.tova",
            "triangle": "selection.triangle",
            "twilight": "selection.twilight",
            "urpe": "biases.urpe",
            "var": "sinks.var",
            "vcd": "decoding.vcd",
            "vertical_slash": "selection.vertical_slash",
            "vhr": "gating.vhr",
            "window": "grids.window",
            "xattention": "selection.xattention",
        }.items()
    }
)

_NAMES = {
    "cache.memory": (
        "CacheReport",
        "LayerMemory",
        "cache_report",
    ),
    "checking.check": (
        "Check",
        "CheckReport",
        "check_patch",
    ),
    "core.call": ("AttentionCall",),
    "core.importance": ("HeadImportance",),
    "core.info": (
        "PatchInfo",
        "patch_info",
    ),
    "core.observation": ("observe",),
    "core.patching": (
        "patch_model",
        "patched",
        "unpatch_model",
        "unpatched",
    ),
    "core.probing": (
        "PlacedProbe",
        "probed",
    ),
    "core.registry": (
        "list_variants",
        "register_variant",
        "variant_info",
    ),
    "core.report": ("Observation",),
    "core.settings": (
        "Settings",
        "option",
    ),
    "core.host": ("find_sites",),
    "core.sites": ("AttentionSite",),
    "core.surroundings": ("LayerContext",),
    "core.variant": (
        "Attend",
        "AttentionOutput",
        "Variant",
        "VariantConfig",
        "VariantInfo",
    ),
    "exporting.export": ("export",),
    "inspection.channels": (
        "ChannelStatistics",
        "channel_statistics",
    ),
    "inspection.head_importance": ("head_importance",),
    "inspection.kv_moments": ("kv_moments",),
    "inspection.routing": (
        "LayerRouting",
        "RoutingStatistics",
        "routing_statistics",
    ),
    "inspection.temperatures": (
        "LayerTemperatures",
        "Spread",
        "TemperatureStatistics",
        "temperature_statistics",
    ),
    "positions.spans": (
        "Span",
        "marked",
    ),
    "saving.checkpoint": (
        "from_pretrained",
        "load_patch",
        "save_patch",
    ),
    "saving.hub": (
        "push_to_hub",
        "save_pretrained",
    ),
    "saving.sentences": ("load_sentence_transformer",),
    "saving.whole_model": ("patched_class",),
    "training": (
        "BalanceLoss",
        "PatchedTrainerMixin",
        "RoutingCallback",
        "SpecialiseLoss",
        "balance_loss",
        "distillation_loss",
        "optimizer_groups",
        "specialise_loss",
    ),
    "vision.images": (
        "ImageSpan",
        "image_spans",
        "image_token_mask",
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_FOLDERS = {module.partition(".")[0] for module in _NAMES} | {"variants"}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'patchattn' has no attribute {name!r}")
    importlib.import_module(".saving.adapters", __name__).guard_adapters()
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
