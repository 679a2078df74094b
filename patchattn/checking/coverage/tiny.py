"""Tiny models of any type: the default configuration, made small by the names of its attributes."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, HEADS, WIDTH, VOCABULARY = 4, 4, 128, 1024
MAX_PARAMETERS = 60_000_000


class TooLargeError(ValueError):
    """A model that was made as small as can be is still large."""


@dataclass(frozen=True)
class Scale:
    """How narrow a model is made.

    Attributes:
        head_dim: width of a head, the layer has four; `None` leaves all widths as they are.
        images: make images a few patches wide.
    """

    head_dim: int | None
    images: bool


# In the order they are tried: some families fix a head's width or an image's size.
SCALES = [Scale(32, True), Scale(32, False), Scale(128, True), Scale(None, True), Scale(None, False)]

_VOCABULARY = re.compile(r"(?:\w+_)?vocab_size(?:_\w+)?")
_SHARED_LAYERS = re.compile(r"num_kv_shared_layers")
_LAYERS = re.compile(r"(?:\w+_)?(?:num|n)_(?:\w+_)?(?:layers?|blocks)|(?:\w+_)?(?:depth|layers)|n_layer|num_layers_\w+")
_HEADS = re.compile(r"(?:\w+_)?(?:num|n)_(?:\w+_)?heads?|(?:\w+_)?(?:attention|attn)_heads")
_KV_HEADS = re.compile(r"(?:\w+_)?(?:num|n)_(?:\w+_)?(?:key_value|kv)_heads|num_multi_query_groups?")
_MAMBA_HEADS = re.compile(r"mamba_\w*heads")
_HEAD_DIM = re.compile(
    r"(?:\w+_)?(?:head_(?:dim|size)|d_head)|d_kv|dim_head|dim_per_head|kv_channels|(?:qk|v)_channels_per_head"
)
_HALF_HEAD_DIM = re.compile(r"qk_(?:nope|rope)_head_dim")
_WIDTH = re.compile(
    r"(?!\w*head)(?:\w+_)?(?:hidden_size|hidden_dim|d_model|embed_dim|embed_size|n_embd|embedding_size|embedding_dim|"
    r"emb_dim|proj_dim|projection_dim|projection_size|width|channels_out|hidden_channels|dim)"
)
_INNER = re.compile(
    r"(?:\w+_)?(?:intermediate_size|intermediate_dim|ffn_dim|ffn_hidden_size|mlp_dim|d_ff|n_inner|mamba_d_ssm)"
)
_EXPERTS = re.compile(r"(?:\w+_)?(?:num|n)_(?:\w+_)?experts")
_CHOSEN = re.compile(r"(?:\w+_)?(?:top_?k|experts_per_tok(?:en)?|num_selected_experts|moe_k)")
_GROUPS = re.compile(r"n_group|topk_group|num_expert_group|n_groups_per_expert")
_CONVOLUTION_GROUPS = re.compile(r"upsample_groups")
_LORA = re.compile(r"(?:\w+_)?lora_rank")
_TOKEN = re.compile(r"(?:\w+_)?token_(?:id|index|ids)|(?:\w+_)?token")
_INDICES = re.compile(
    r"(?:\w*_)?(?:index|indexes|indices|feature_layers?|select_layers?|layer_ids)|"
    r"(?:\w*_)?(?:layers?|blocks?)_(?:idx|indexes|indices)"
)
_DERIVED = re.compile(r"stage_names|transformers_version|architectures|id2label|label2id")
_STAGES = re.compile(r"out_features|out_indices")

# Where names do not tell: values for a default configuration that cannot be built or whose parts disagree.
_RESNET = {  # in place of a backbone from the timm library, which may not be installed
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [32, 64, 96, 128],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage2", "stage3", "stage4"],
    }
}
_HALF_ROTARY = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [8, 12, 12],
    }
}
_HINTS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "bailing_hybrid": {"num_experts_per_tok": 2},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "conditional_detr": _RESNET,
    "dab-detr": _RESNET,
    "deformable_detr": _RESNET,
    "detr": _RESNET,
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] * 32},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "deepseek_ocr2": {"text_config": {"model_type": "deepseek_ocr2_text", "mlp_layer_types": ["dense"] * 32}},
    "glm4v_text": _HALF_ROTARY,
    "glm_image_text": _HALF_ROTARY,
    "glm_ocr_text": {"rope_parameters": {**_HALF_ROTARY["rope_parameters"], "mrope_section": [4, 6, 6]}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "informer": {"prediction_length": 4},
    "kimi_linear": {
        "num_experts_per_tok": 2,
        "layer_types": [*["linear_attention", "full_attention"] * 13, "full_attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"num_key_value_heads": 8},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 128},
    "step3p5": {"sliding_window": 8},
    "table-transformer": _RESNET,
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"dropout_rate": 0.0},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "time_series_transformer": {"prediction_length": 4},
}


def configuration_class(model_type: str) -> type[PretrainedConfig]:
    """The configuration class of a model type; raises KeyError for one that transformers does not know."""
    found: type[PretrainedConfig] = CONFIG_MAPPING[model_type]
    return found


def model_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """Model classes of a type: the plain model, those of the other auto classes, then what else its file defines."""
    config_class = configuration_class(model_type)
    mappings = [value for name, value in vars(modeling_auto).items() if re.fullmatch(r"MODEL_\w*MAPPING_NAMES", name)]
    names: list[str] = []
    for mapping in mappings:  # the plain model's is the first
        entry = mapping.get(model_type, ())
        names += [entry] if isinstance(entry, str) else entry
    transformers = importlib.import_module("transformers")
    classes = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    classes += list(_defined_beside(config_class))
    return [c for c in dict.fromkeys(classes) if _is_model(c)]


def _is_model(value: Any) -> bool:
    """Whether this is a model and not the base class of a family's models."""
    return isinstance(value, type) and issubclass(value, PreTrainedModel) and "PreTrainedModel" not in value.__name__


def _defined_beside(config_class: type[PretrainedConfig]) -> Iterator[type]:
    package = importlib.import_module(config_class.__module__.rpartition(".")[0])
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if not found.name.rpartition(".")[2].startswith("modeling_"):
            continue
        for value in vars(importlib.import_module(found.name)).values():
            if _is_model(value) and value.__module__ == found.name and value.config_class is config_class:
                yield value


def tiny_config(model_type: str, scale: Scale = SCALES[0]) -> PretrainedConfig:
    """The default configuration with few layers, experts and tokens, and as narrow as `scale` says."""
    default = default_config(model_type)
    return type(default)(**_shrunk(default.to_dict(), scale, tokens={}))


def default_config(model_type: str) -> PretrainedConfig:
    """The default configuration, completed where it cannot be built without help."""
    return configuration_class(model_type)(**_HINTS.get(model_type, {}))


def _shrunk(values: dict[str, Any], scale: Scale, tokens: dict[int, int]) -> dict[str, Any]:
    """A copy of a configuration's dictionary with small values; sub-configurations likewise."""
    if not all(isinstance(key, str) for key in values):  # a table, not a configuration
        return values
    old_layers = [v for k, v in values.items() if _is_count(v) and _LAYERS.fullmatch(k)]
    kept = _kept_layers(values, old_layers)
    if any(_HEADS.fullmatch(k) and isinstance(v, list) and len(set(v)) > 1 for k, v in values.items()):
        scale = replace(scale, head_dim=None)  # a pyramid of widths that depend on each other
    small: dict[str, Any] = {}
    for key, value in values.items():
        if _DERIVED.fullmatch(key):
            continue
        if _STAGES.fullmatch(key):
            if "depths" in values:  # as many stages as before
                small[key] = value
            continue
        if isinstance(value, dict) and key == "per_layer_config":
            small[key] = {kept.index(int(i)): _shrunk(v, scale, tokens) for i, v in value.items() if int(i) in kept}
        elif isinstance(value, dict):
            if scale.head_dim and (sections := value.get("mrope_section")):
                factor = scale.head_dim / _old_head_dim(values)
                value = {**value, "mrope_section": _apportioned(sections, factor)}
            small[key] = _shrunk(value, scale, tokens)
        elif key == "image_size" and scale.images and _is_list(value, int):
            small[key] = [min(size, 256) for size in value]
        elif isinstance(value, list):
            small[key] = _shrunk_list(key, value, old_layers, kept, tokens)
        elif _is_count(value):
            small[key] = _shrunk_integer(key, value, values, len(kept), scale, tokens)
        elif key == "head_dim" and value is None and scale.head_dim:  # some families cannot do without
            small[key] = scale.head_dim
        else:
            small[key] = value
    return small


def _kept_layers(values: dict[str, Any], old_layers: list[int]) -> list[int]:
    """Indices of the layers to keep: the first of every kind, so that a hybrid keeps its attention, then the first."""
    lists = [v for v in values.values() if _is_list(v, str) and v and len(v) in old_layers]
    firsts = list(dict.fromkeys(kinds.index(kind) for kinds in lists for kind in dict.fromkeys(kinds)))
    rest = [i for i in range(max(old_layers, default=LAYERS)) if i not in firsts]
    return sorted((firsts + rest)[: max(LAYERS, len(firsts))])


def _shrunk_integer(
    key: str, value: int, values: dict[str, Any], layers: int, scale: Scale, tokens: dict[int, int]
) -> int:
    if _TOKEN.fullmatch(key):
        return _token(value, tokens)
    if key == "image_size" and scale.images and _is_count(values.get("patch_size")):
        return min(value, values["patch_size"] * 8)
    limits = [
        (_VOCABULARY, VOCABULARY),
        (_SHARED_LAYERS, 0),
        (_LAYERS, layers),
        (_INDICES, layers - 1),
        (_GROUPS, 1),
        (_EXPERTS, 4),
        (_CHOSEN, 2),
    ]
    if scale.head_dim:
        width = HEADS * scale.head_dim
        heads = next((v for k, v in values.items() if _HEADS.fullmatch(k) and not _KV_HEADS.fullmatch(k)), value)
        head_dim = scale.head_dim
        if key == "head_dim" and _is_count(values.get("qk_rope_head_dim")):  # the rotary embedding's, in proportion
            head_dim = scale.head_dim // 2 * value // values["qk_rope_head_dim"]
        limits += [
            (_KV_HEADS, HEADS if not _is_count(heads) or value >= heads else HEADS // 2),
            (_MAMBA_HEADS, 2 * HEADS),
            (_HEADS, HEADS),
            (_HALF_HEAD_DIM, scale.head_dim // 2),
            (_HEAD_DIM, head_dim),
            (_WIDTH, width),
            (_INNER, 2 * width),
            (_LORA, scale.head_dim),
            (_CONVOLUTION_GROUPS, width),
        ]
    return next((min(value, limit) for pattern, limit in limits if pattern.fullmatch(key)), value)


def _shrunk_list(
    key: str, value: list[Any], old_layers: list[int], kept: list[int], tokens: dict[int, int]
) -> list[Any]:
    if _TOKEN.fullmatch(key):
        return [_token(item, tokens) if _is_count(item) else item for item in value]
    if key == "depths":
        return [min(item, 2) if _is_count(item) else item for item in value]
    layers = len(kept)
    if len(value) in old_layers and len(value) > layers:
        return [value[i] for i in kept]
    if _INDICES.fullmatch(key) and value and all(isinstance(i, int) for i in value) and max(value) >= layers:
        top = max(old_layers, default=max(value) + 1) - 1
        return list(dict.fromkeys(min(i * (layers - 1) // max(top, 1), layers - 1) for i in value))
    return value


def _old_head_dim(values: dict[str, Any]) -> float:
    def first(default: int | None, *names: str) -> int | None:
        return next((values[name] for name in names if _is_count(values.get(name))), default)

    width, heads = first(WIDTH, "hidden_size", "d_model", "embed_dim"), first(HEADS, "num_attention_heads", "num_heads")
    return first(None, "head_dim", "attention_head_dim") or width / heads  # type: ignore[operator]


def _apportioned(sections: list[int], factor: float) -> list[int]:
    """The sections of a rotary embedding for smaller heads; they must fill it exactly."""
    total = max(round(sum(sections) * factor), len(sections))
    small = [max(1, int(part * factor)) for part in sections]
    small[0] += total - sum(small)
    return small


def _token(value: int, tokens: dict[int, int]) -> int:
    """Token ids beyond the small vocabulary are counted down from its end, equal ones alike in all parts."""
    if value < VOCABULARY:
        return value
    return tokens.setdefault(value, VOCABULARY - 1 - len(tokens))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def meta_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The structure of a model, without memory for its weights."""
    with torch.device("meta"):
        return model_class(config).eval()


def tiny_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A model with random weights, the same for the same configuration.

    Raises:
        TooLargeError: it would not be tiny.
    """
    size = sum(p.numel() for p in meta_model(model_class, config).parameters())
    if size > MAX_PARAMETERS:
        raise TooLargeError(f"it could not be made small: {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = model_class(config).eval().float()
    _randomise(model)
    return model


def _randomise(model: nn.Module) -> None:
    """Fill all parameters: initial zeros (gates, output projections) would hide what attention does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() >= 2:
                parameter.normal_(std=0.1)
            else:
                parameter.nan_to_num_(0.0, 0.0, 0.0).add_(torch.randn_like(parameter), alpha=0.1)
