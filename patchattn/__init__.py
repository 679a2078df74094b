"""patchattn replaces the attention of a transformers model by a published variant, in place and reversibly."""

from . import variants
from .call import AttentionCall, LayerContext
from .checking import Check, CheckReport, check_patch
from .checkpoint import from_pretrained, load_patch, patched_class, save_patch
from .hub import push_to_hub, save_pretrained
from .observe import observe
from .patching import patch_info, patch_model, patched, unpatch_model, unpatched
from .sites import AttentionSite, find_sites
from .variant import (
    Attend,
    AttentionOutput,
    Variant,
    VariantConfig,
    VariantInfo,
    list_variants,
    option,
    register_variant,
    variant_info,
)

__version__ = "0.1.0"

__all__ = [
    "Attend",
    "AttentionCall",
    "AttentionOutput",
    "AttentionSite",
    "Check",
    "CheckReport",
    "LayerContext",
    "Variant",
    "VariantConfig",
    "VariantInfo",
    "check_patch",
    "find_sites",
    "from_pretrained",
    "list_variants",
    "load_patch",
    "observe",
    "option",
    "patch_info",
    "patch_model",
    "patched",
    "patched_class",
    "push_to_hub",
    "register_variant",
    "save_patch",
    "save_pretrained",
    "unpatch_model",
    "unpatched",
    "variant_info",
    "variants",
]
