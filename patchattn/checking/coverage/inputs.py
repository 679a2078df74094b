"""Inputs for a model nobody described: guessed from the signature of its `forward` and from its configuration."""

import copy
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

BATCH, TOKENS, DECODER_TOKENS, MEMORY_TOKENS = 2, 16, 12, 10
_MAX_GUESSES = 40
_FIRST_TOKEN = 5  # below are padding and separators, in nearly all vocabularies

_MASK = re.compile(r"mask")
_SHAPES = re.compile(r"grid_thw|grid_hws|spatial_shapes|image_sizes")

# What no attribute tells, by model type and argument: a shape of noise, or the value itself.
_SERIES = {
    "past_values": (2, 11),
    "past_time_features": (2, 11, 0),
    "past_observed_mask": torch.ones(2, 11),
}
_PACKED_SOUND = {
    "input_features": (128, 200),
    "feature_lens": torch.tensor([200]),
    "aftercnn_lens": torch.tensor([100]),
}
_HINTS: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "decision_transformer": {
        "states": (2, 8, 17),
        "actions": (2, 8, 4),
        "rewards": (2, 8, 1),
        "returns_to_go": (2, 8, 1),
        "timesteps": torch.arange(8).repeat(2, 1),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
    },
    "deepseek_ocr2_encoder": {"num_patches": 8},
    "fun_asr_nano_encoder": {
        "input_features": (2, 64, 560),
        "input_features_mask": torch.ones(2, 64, dtype=torch.long),
    },
    "gemma4_vision": {
        "pixel_values": (2, 16, 768),
        "pixel_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(2, 1, 1),
    },
    "granite_speech5_encoder": {"input_features": (2, 64, 320)},
    "idefics": {"pixel_values": (2, 2, 3, 112, 112), "image_attention_mask": torch.ones(2, 16, 2, dtype=torch.long)},
    "informer": _SERIES,
    "mllama_vision_model": {
        "pixel_values": (1, 1, 4, 3, 112, 112),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
    },
    "mimi_decoder": {"latents": (2, 128, 16)},
    "molmo2_vision": {"pixel_values": (2, 729, 588)},
    "muse_glimmer_vision": {"pixel_values": (16, 1176), "grid_thw": torch.tensor([[1, 4, 4]])},
    "muse_spark_vision": {"pixel_values": (16, 1176), "grid_thw": torch.tensor([[1, 4, 4]])},
    "paddleocr_vl_vision": {"pixel_values": (1, 16, 3, 14, 14), "grid_thw": torch.tensor([[1, 4, 4]])},
    "patchtst": {"past_values": (2, 32, 1)},
    "pix2struct_vision_model": {"flattened_patches": torch.ones(2, 16, 130)},
    "qwen2_5_omni_audio_encoder": _PACKED_SOUND,
    "qwen3_omni_moe_audio_encoder": _PACKED_SOUND,
    "time_series_transformer": _SERIES,
    "voxtral_realtime_text": {"t_cond": (1, 128)},
    "wav2vec2-bert": {"input_features": (2, 64, 128)},
}


def guesses(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try, likeliest first; most modules take one of the first few."""
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    named = [p for p in list(parameters.values())[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    tried = 0
    for chosen in _argument_sets(names, [p.name for p in named if p.default is p.empty], module):
        masks = [name for name in chosen if _MASK.search(name) and name not in _hints(module.config)]
        others = [name for name in chosen if name not in masks]
        for values in itertools.product(*(list(_alternatives(name, module.config)) for name in others)):
            arguments = dict(zip(others, values, strict=True))
            for filled in _masked(arguments, masks):
                yield filled
                tried += 1
                if tried >= _MAX_GUESSES:
                    return


def _argument_sets(names: list[str], required: list[str], module: nn.Module) -> Iterator[list[str]]:
    """Which arguments to pass: the required and the main one first, then more and more of the optional ones."""
    main = getattr(module, "main_input_name", "input_ids")
    least = list(required)
    if main in names and main not in least:
        least.insert(0, main)
    least = least or names[:1]
    if "decoder_input_ids" in names and "decoder_input_ids" not in least:
        least.append("decoder_input_ids")

    def those(*wanted: str) -> list[str]:
        return list(dict.fromkeys([*least, *(name for name in names if name in wanted)]))

    sets = [least]
    if "pixel_values" in names and "input_ids" in names:  # both, before either alone
        without_text = [name for name in least if name != "input_ids"] or ["pixel_values"]
        sets = [those("input_ids", "pixel_values", "bbox"), least, without_text]
    sets += [[name for name in names if name in (*required, other)] for other in ("input_ids", "inputs_embeds")]
    sets.append(those("encoder_hidden_states"))
    sets.append(those(*(name for name in names if _SHAPES.search(name) or (_MASK.search(name) and "pixel" in name))))
    sets.append(those(*(name for name in names if _MASK.search(name))))
    sets.append(those("inputs_embeds", "patch_embeds", "encoder_hidden_states"))
    if hinted := _hints(module.config):
        sets.insert(0, list(dict.fromkeys([*least, *hinted])))
    if "use_cache" in names:  # the default cache does not know every hybrid
        sets.append([*least, "use_cache"])
    seen: list[list[str]] = []
    for chosen in sets:
        if chosen and chosen not in seen:
            seen.append(chosen)
            yield chosen


def _masked(arguments: dict[str, Any], masks: list[str]) -> Iterator[dict[str, Any]]:
    """The arguments with masks that hide nothing, over the second or the last axis of the first argument."""
    first = next(iter(arguments.values()), None)
    if not masks or first is None:
        yield arguments
        return
    for axis in dict.fromkeys((1, first.dim() - 1)):
        mask = torch.ones(first.shape[0], first.shape[axis], dtype=torch.long)
        yield {**arguments, **dict.fromkeys(masks, mask)}


def _hints(config: Any) -> dict[str, Any]:
    return _HINTS.get(config.model_type, {})


def _alternatives(name: str, config: PretrainedConfig) -> Iterator[Any]:
    """Values an argument of this name may want."""
    generator = torch.Generator().manual_seed(len(name))

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width = _number(config, "hidden_size", "d_model", "embed_dim", "n_embd", "dim") or 64
    if name in _hints(config):
        hint = _hints(config)[name]
        yield noise(*hint) if isinstance(hint, tuple) else copy.deepcopy(hint)
    elif re.fullmatch(r"(?:\w+_)?input_ids|input_tokens|\w*codes|\w+_ids", name) and "position" not in name:
        length = DECODER_TOKENS if "decoder" in name else TOKENS
        top = min([v for v in _numbers(config, "vocab_size", "codebook_size") if v > _FIRST_TOKEN + 1] or [64])
        yield torch.randint(_FIRST_TOKEN, min(top, 64), (BATCH, length), generator=generator)
        for books in _numbers(config, "num_codebooks", "num_channels", "n_codes_total"):
            yield torch.randint(_FIRST_TOKEN, min(top, 64), (BATCH, books, length), generator=generator)
            yield torch.randint(_FIRST_TOKEN, min(top, 64), (BATCH, length, books), generator=generator)
    elif "position" in name:
        yield torch.arange(TOKENS)[None]
    elif re.search(r"grid_thw|grid_hws", name):
        yield torch.tensor([[1, 4, 4]])
        yield torch.tensor([[4, 4]])
    elif re.search(r"spatial_shapes|image_sizes", name):
        yield torch.tensor([[4, 4]])
        yield torch.tensor([[32, 32]] * BATCH)
    elif name == "use_cache":
        yield False
    elif name == "bbox":
        yield torch.zeros(BATCH, TOKENS, 4, dtype=torch.long)
    elif re.search(r"pixel_values|^(?:images?|frames|x|pixels)$", name):
        yield from _images(config, noise, video="video" in name)
    elif re.search(r"input_features|input_values|audio|waveform|mel|spectrogram", name):
        yield from _sounds(config, noise, prefer_samples="values" in name)
    elif name.startswith(("encoder_", "cross_", "key_value", "memory")):
        yield noise(BATCH, MEMORY_TOKENS, width)
    elif re.search(r"hidden_states|embeds|embeddings|inputs|features|query|key|value", name):
        yield noise(BATCH, TOKENS, width)
        yield from _patches(config, noise)
        yield noise(TOKENS, width)
        yield from _images(config, noise, video=False)
    else:
        yield noise(BATCH, TOKENS, width)


def _images(config: PretrainedConfig, noise: Any, *, video: bool) -> Iterator[torch.Tensor]:
    channels = _number(config, "num_channels", "in_channels", "in_chans", "num_channels_in") or 3
    stated = _values(config, "image_size", "input_size", "img_size")
    pairs = [tuple(s) if isinstance(s, list | tuple) else (s, s) for s in stated]
    sizes = [pair for pair in pairs if len(pair) == 2] + [(64, 64), (224, 224)]
    frames = _number(config, "num_frames", "frames_per_clip", "num_image_with_embedding") or 2
    stills = [(BATCH, channels, *size) for size in dict.fromkeys(sizes)]
    films = [(BATCH, frames, channels, *size) for size in dict.fromkeys(sizes)]
    for shape in [*films, *stills] if video else [*stills[:2], *films[:1], *stills[2:], *films[1:]]:
        yield noise(*shape)
    yield from _patches(config, noise)


def _patches(config: PretrainedConfig, noise: Any) -> Iterator[torch.Tensor]:
    """Sixteen patches already cut out and flattened, as packed vision towers want them."""
    channels = _number(config, "num_channels", "in_channels", "in_chans") or 3
    for patch in _numbers(config, "patch_size"):
        depth = _number(config, "temporal_patch_size") or 1
        yield noise(16, channels * depth * patch * patch)
        yield noise(1, 16, channels * depth * patch * patch)
        yield noise(16, channels, patch, patch)


def _sounds(config: PretrainedConfig, noise: Any, *, prefer_samples: bool) -> Iterator[torch.Tensor]:
    samples = [noise(BATCH, 8000), noise(BATCH, 1, 8000), noise(BATCH, 8000, 1)]
    names = ("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "input_size", "input_dim", "mel_bins")
    mels = _numbers(config, *names) or [80]
    positions = _numbers(config, "max_source_positions")
    lengths = [*(2 * p for p in positions if p <= 3000), *_numbers(config, "max_length"), 64, 256]
    spectra = [s for n in lengths[:3] for mel in mels[:2] for s in ((BATCH, mel, n), (BATCH, n, mel))]
    yield from samples if prefer_samples else ()
    for shape in spectra:
        yield noise(*shape)
    yield from () if prefer_samples else samples


def _values(config: PretrainedConfig, *names: str) -> list[Any]:
    """Values of these attributes, of the configuration itself first and of its parts after."""
    found = [getattr(config, name) for name in names if getattr(config, name, None) is not None]
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            found += _values(part, *names)
    return found


def _numbers(config: PretrainedConfig, *names: str) -> list[int]:
    found = _values(config, *names)
    return list(dict.fromkeys(v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0))


def _number(config: PretrainedConfig, *names: str) -> int | None:
    return next(iter(_numbers(config, *names)), None)
