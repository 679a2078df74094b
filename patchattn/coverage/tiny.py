"""Tiny models of any type: the default configuration, made small by the names of its attributes."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, HEADS, HEAD_DIM, WIDTH, VOCABULARY = 4, 4, 32, 128, 1024
MAX_PARAMETERS = 60_000_000

_LAYERS = re.compile(r"(?:\w+_)?(?:num|n)_(?:\w+_)?(?:layers?|blocks)|(?:\w+_)?(?:depth|layers)|n_layer|num_layers_\w+")
_HEADS = re.compile(r"(?:\w+_)?(?:num|n)_(?:\w+_)?heads?|(?:\w+_)?(?:attention|attn)_heads")
_KV_HEADS = re.compile(r"(?:\w+_)?(?:num|n)_(?:\w+_)?(?:key_value|kv)_heads|num_multi_query_groups?")
_HEAD_DIM = re.compile(
    r"(?:\w+_)?head_(?:dim|size)|d_kv|d_head|dim_head|dim_per_head|kv_channels|attention_head_size|(?:qk|v)_channels_per_head"
)
_WIDTH = re.compile(
    r"(?:\w+_)?(?:hidden_size|hidden_dim|d_model|embed_dim|embed_size|n_embd|embedding_size|embedding_dim|emb_dim|"
    r"proj_dim|projection_dim|projection_size|width|channels_out|hidden_channels)|(?:\w+_)?dim"
)
_INNER = re.compile(r"(?:\w+_)?(?:intermediate_size|intermediate_dim|ffn_dim|ffn_hidden_size|mlp_dim|d_ff|n_inner)")
_EXPERTS = re.compile(r"(?:\w+_)?(?:num|n)_(?:\w+_)?experts|moe_num_experts")
_CHOSEN = re.compile(r"(?:\w+_)?(?:top_?k|experts_per_tok(?:en)?|experts_per_token|num_selected_experts)")
_GROUPS = re.compile(r"n_group|topk_group|num_expert_group|n_groups_per_expert")
_LORA = re.compile(r"(?:\w+_)?lora_rank")
_TOKEN = re.compile(r"(?:\w+_)?token_(?:id|index|ids)|(?:\w+_)?token")
_INDICES = re.compile(r"\w*(?:index|indexes|indices|layer_idx|layers_idx|feature_layers?|select_layers?|layer_ids)\w*")
_DERIVED = ("out_features", "out_indices", "stage_names", "transformers_version", "architectures", "id2label", "label2id")

# Where names do not tell: values for a default configuration that cannot be built or whose parts disagree.
_HINTS: dict[str, dict[str, Any]] = {}


def configuration_class(model_type: str) -> type[PretrainedConfig]:
    """The configuration class of a model type; raises KeyError for one that transformers does not know."""
    found: type[PretrainedConfig] = CONFIG_MAPPING[model_type]
    return found


def model_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """Model classes of a type: the plain model, those of the other auto classes, then what else its file defines."""
    config_class = configuration_class(model_type)
    mappings = [value for name, value in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    mappings.remove(modeling_auto.MODEL_MAPPING_NAMES)
    names: list[str] = []
    for mapping in (modeling_auto.MODEL_MAPPING_NAMES, *(m for m in mappings if "config" not in str(m.get("bert")).lower())):
        entry = mapping.get(model_type, ())
        names += [entry] if isinstance(entry, str) else entry
    transformers = importlib.import_module("transformers")
    classes = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    classes += list(_defined_beside(config_class))
    return [c for c in dict.fromkeys(classes) if isinstance(c, type) and issubclass(c, PreTrainedModel)]


def _defined_beside(config_class: type[PretrainedConfig]) -> Iterator[type]:
    package = importlib.import_module(config_class.__module__.rpartition(".")[0])
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if not found.name.rpartition(".")[2].startswith("modeling_"):
            continue
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == found.name:
                if value.config_class is config_class and not value.__name__.endswith("PreTrainedModel"):
                    yield value


def tiny_config(model_type: str, *, widths: bool = True, images: bool = True) -> PretrainedConfig:
    """The default configuration with few layers, experts and tokens.

    Args:
        model_type: as in `AutoConfig`.
        widths: narrow the layers as well: to 4 heads of 32.
        images: make images a few patches wide as well.
    """
    config_class = configuration_class(model_type)
    hints = _HINTS.get(model_type, {})
    small = _shrunk(config_class(**hints).to_dict(), widths, images, tokens={})
    return config_class(**small)


def _shrunk(values: dict[str, Any], widths: bool, images: bool, tokens: dict[int, int]) -> dict[str, Any]:
    """A copy of a configuration's dictionary with small values; sub-configurations likewise."""
    if not all(isinstance(key, str) for key in values):  # a table, not a configuration
        return values
    old_layers = [v for k, v in values.items() if _is_count(v) and _LAYERS.fullmatch(k)]
    kept = _kept_layers(values, old_layers)
    layers = len(kept)
    hierarchical = any(_HEADS.fullmatch(k) and isinstance(v, list) and len(set(v)) > 1 for k, v in values.items())
    widths = widths and not hierarchical
    old_head_dim = next((v for k, v in values.items() if k in ("head_dim", "attention_head_dim") and _is_count(v)), None)
    head_width = _width_per_head(values)
    small: dict[str, Any] = {}
    for key, value in values.items():
        if key in _DERIVED:
            continue
        if isinstance(value, dict) and key == "per_layer_config":
            small[key] = {kept.index(int(i)): _shrunk(v, widths, images, tokens) for i, v in value.items() if int(i) in kept}
        elif isinstance(value, dict):
            if widths and (sections := value.get("mrope_section")):
                value = {**value, "mrope_section": _apportioned(sections, HEAD_DIM / (old_head_dim or head_width))}
            small[key] = _shrunk(value, widths, images, tokens)
        elif isinstance(value, list):
            small[key] = _shrunk_list(key, value, old_layers, kept, tokens)
        elif _is_count(value):
            small[key] = _shrunk_integer(key, value, values, layers, widths, images, tokens)
        elif key == "head_dim" and value is None and widths:  # some families cannot do without
            small[key] = HEAD_DIM
        else:
            small[key] = value
    return small


def _kept_layers(values: dict[str, Any], old_layers: list[int]) -> list[int]:
    """Indices of the layers to keep: the first of every kind, so that a hybrid keeps its attention, then the first."""
    kinds = next((v for v in values.values() if _is_list(v, str) and v and len(v) in old_layers), [])
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    rest = [i for i in range(max(old_layers, default=LAYERS)) if i not in firsts]
    return sorted((firsts + rest)[: max(LAYERS, len(firsts))])


def _shrunk_integer(
    key: str, value: int, values: dict[str, Any], layers: int, widths: bool, images: bool, tokens: dict[int, int]
) -> int:
    if _TOKEN.fullmatch(key):
        return _token(value, tokens)
    if re.fullmatch(r"(?:\w+_)?vocab_size", key):
        return min(value, VOCABULARY)
    if _LAYERS.fullmatch(key):
        return min(value, layers)
    if _INDICES.fullmatch(key):
        return min(value, layers - 1)
    if _GROUPS.fullmatch(key):
        return 1
    if _EXPERTS.fullmatch(key):
        return min(value, 4)
    if _CHOSEN.fullmatch(key):
        return min(value, 2)
    if key == "image_size" and images and _is_count(values.get("patch_size")):
        return min(value, values["patch_size"] * 8)
    if not widths:
        return value
    if _KV_HEADS.fullmatch(key):
        heads = next((v for k, v in values.items() if _HEADS.fullmatch(k) and not _KV_HEADS.fullmatch(k)), value)
        return min(value, HEADS if not _is_count(heads) or value >= heads else HEADS // 2)
    if _HEADS.fullmatch(key):
        return 2 * HEADS if "mamba" in key else min(value, HEADS)
    if key in ("qk_nope_head_dim", "qk_rope_head_dim"):
        return HEAD_DIM // 2
    if _HEAD_DIM.fullmatch(key):
        return HEAD_DIM
    if _WIDTH.fullmatch(key) and "head" not in key:
        return min(value, WIDTH)
    if _INNER.fullmatch(key):
        return min(value, 2 * WIDTH)
    if _LORA.fullmatch(key):
        return min(value, HEAD_DIM)
    return value


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


def _width_per_head(values: dict[str, Any]) -> float:
    width = next((v for k, v in values.items() if k in ("hidden_size", "d_model", "embed_dim") and _is_count(v)), WIDTH)
    heads = next((v for k, v in values.items() if k in ("num_attention_heads", "num_heads") and _is_count(v)), HEADS)
    return width / heads


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
        ValueError: it would not be tiny.
    """
    size = sum(p.numel() for p in meta_model(model_class, config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{model_class.__name__} could not be made small: {size / 1e6:.0f} million parameters.")
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
