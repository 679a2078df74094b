"""Inputs for a model nobody described: guessed from the signature of its `forward` and from its configuration."""

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

BATCH, TOKENS, DECODER_TOKENS = 2, 16, 12
_MAX_GUESSES = 60
_FIRST_TOKEN = 5  # below are padding and separators, in nearly all vocabularies

# Shapes that no attribute tells, by model type and argument.
_HINTS: dict[str, dict[str, tuple[int, ...]]] = {}


def guesses(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try, likeliest first; most modules take one of the first few."""
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    named = [p for p in list(parameters.values())[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    required = [p.name for p in named if p.default is p.empty]
    main = getattr(module, "main_input_name", "input_ids")
    wanted = list(required)
    if main in names and main not in wanted:
        wanted.insert(0, main)
    if not wanted and names:
        wanted = names[:1]
    if "input_ids" in wanted or any(name in names for name in ("input_features", "input_values")):
        wanted += [name for name in ("decoder_input_ids",) if name in names and name not in wanted]
    sets = [wanted]
    if "pixel_values" in names and "input_ids" in names:  # image and text, before text alone and image alone
        both = [*wanted, *(n for n in ("input_ids", "pixel_values", "bbox") if n in names and n not in wanted)]
        sets = [both, wanted, [n for n in wanted if n != "input_ids"] or ["pixel_values"]]
    if "input_ids" in names and "input_ids" not in wanted:
        sets.append([*required, "input_ids"])
    extras = [name for name in names if re.search(r"grid_thw|spatial_shapes|pixel_attention_mask|image_sizes", name)]
    sets += [[*wanted, *(n for n in extras if n not in wanted)]] if extras else []
    config = module.config
    tried = 0
    for chosen in sets:
        for values in itertools.product(*(list(_alternatives(name, config)) for name in chosen)):
            yield dict(zip(chosen, values, strict=True))
            tried += 1
            if tried >= _MAX_GUESSES:
                return


def _alternatives(name: str, config: PretrainedConfig) -> Iterator[Any]:
    """Values an argument of this name may want."""
    generator = torch.Generator().manual_seed(len(name))

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width = _number(config, "hidden_size", "d_model", "embed_dim", "n_embd", "dim") or 64
    if name in _HINTS.get(config.model_type, {}):
        yield noise(*_HINTS[config.model_type][name])
    elif re.fullmatch(r"(?:\w+_)?input_ids|input_tokens|\w*codes|\w+_ids", name) and "position" not in name:
        length = DECODER_TOKENS if "decoder" in name else TOKENS
        top = min([v for v in _numbers(config, "vocab_size", "codebook_size") if v > _FIRST_TOKEN + 1] or [64])
        yield torch.randint(_FIRST_TOKEN, min(top, 64), (BATCH, length), generator=generator)
        for books in _numbers(config, "num_codebooks", "num_channels", "n_codes_total"):
            yield torch.randint(_FIRST_TOKEN, min(top, 64), (BATCH, books, length), generator=generator)
            yield torch.randint(_FIRST_TOKEN, min(top, 64), (BATCH, length, books), generator=generator)
    elif "position" in name:
        yield torch.arange(TOKENS)[None]
    elif re.search(r"mask", name):
        yield torch.ones(BATCH, TOKENS, dtype=torch.long)
        yield torch.ones(1, 16, dtype=torch.long)
    elif re.search(r"grid_thw|grid_hws", name):
        yield torch.tensor([[1, 4, 4]])
        yield torch.tensor([[4, 4]])
    elif re.search(r"spatial_shapes|image_sizes", name):
        yield torch.tensor([[4, 4]])
        yield torch.tensor([[32, 32]] * BATCH)
    elif name == "bbox":
        yield torch.zeros(BATCH, TOKENS, 4, dtype=torch.long)
    elif re.search(r"pixel_values|^(?:images?|frames|x|pixels)$", name):
        yield from _images(config, noise, video="video" in name)
    elif re.search(r"input_features|input_values|audio|waveform|mel|spectrogram", name):
        yield from _sounds(config, noise, prefer_samples="values" in name)
    elif re.search(r"hidden_states|embeds|embeddings|inputs|features|query|key|value", name):
        yield noise(BATCH, TOKENS, width)
        yield from _patches(config, noise)
        yield noise(TOKENS, width)
        yield from _images(config, noise, video=False)
    else:
        yield noise(BATCH, TOKENS, width)


def _images(config: PretrainedConfig, noise: Any, *, video: bool) -> Iterator[torch.Tensor]:
    channels = _number(config, "num_channels", "in_channels", "in_chans", "num_channels_in") or 3
    sizes = [s if isinstance(s, (list, tuple)) else (s, s) for s in _values(config, "image_size", "input_size", "img_size")]
    sizes = [tuple(s) for s in sizes if len(s) == 2] + [(64, 64), (224, 224)]
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
    mels = _number(config, "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "input_dim", "mel_bins") or 80
    positions = _numbers(config, "max_source_positions")
    lengths = [*(2 * p for p in positions if p <= 3000), *_numbers(config, "max_length"), 64, 256]
    spectra = [shape for length in lengths[:3] for shape in ((BATCH, mels, length), (BATCH, length, mels))]
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
