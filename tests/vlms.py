"""Tiny random vision-language models, and inputs for each: batches with images and, where asked for, left padding."""

import copy
import functools
from typing import Any

import torch
import transformers as tf
from torch import nn

from .families import FAMILIES

IMAGE, PAD, VOCABULARY, SIDE, PATCH = 63, 0, 64, 16, 4
PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16]]
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def _llava(**extra: Any) -> nn.Module:
    parts = {"text_config": tf.LlamaConfig(**_TEXT), "vision_config": tf.CLIPVisionConfig(**_VISION), **extra}
    config = tf.LlavaConfig(**parts, image_token_id=IMAGE, image_seq_length=16)
    return tf.LlavaForConditionalGeneration(config)


def _llava_next() -> nn.Module:
    config = tf.LlavaNextConfig(
        text_config=tf.LlamaConfig(**_TEXT),
        vision_config=tf.CLIPVisionConfig(**_VISION),
        image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return tf.LlavaNextForConditionalGeneration(config)


def _instructblip() -> nn.Module:
    vision = tf.InstructBlipVisionConfig(**_VISION, initializer_range=0.1)  # its default is 1e-10
    former = tf.InstructBlipQFormerConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        encoder_hidden_size=32,
        cross_attention_frequency=1,
    )
    config = tf.InstructBlipConfig(
        vision_config=vision.to_dict(),
        qformer_config=former.to_dict(),
        text_config=tf.LlamaConfig(**_TEXT).to_dict(),
        num_query_tokens=3,
        image_token_index=IMAGE,
    )
    model = tf.InstructBlipForConditionalGeneration(config)
    with torch.no_grad():
        model.query_tokens.normal_()
    return model


_BUILDERS = {
    "llava": _llava,
    "llava_siglip": lambda: _llava(
        vision_config=tf.SiglipVisionConfig(**_VISION), vision_feature_select_strategy="full", vision_feature_layer=-1
    ),
    "llava_next": _llava_next,
    "instructblip": _instructblip,
    "qwen2_5_vl": FAMILIES["qwen2_5_vl"].build,
}
VLMS = list(_BUILDERS)
# Its window ends within the image.
_BUILDERS["llava_sliding"] = lambda: _llava(text_config=tf.MistralConfig(**_TEXT, sliding_window=8))


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in evaluation mode, with weights large enough for attention to be far from uniform."""
    model, state = _made(name, seed)
    torch.set_rng_state(state)
    return copy.deepcopy(model).to(dtype)


@functools.cache
def _made(name: str, seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A model that nobody changes, as copies take half the time; and the state in which it leaves torch's generator."""
    torch.manual_seed(seed)
    model = _BUILDERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    # Whatever a random model says, it goes on: tests of generation want steps.
    for part in (model, getattr(model, "language_model", model)):
        if part.can_generate():
            part.generation_config.eos_token_id = None
            part.generation_config.pad_token_id = PAD
    return model.eval(), torch.get_rng_state()


def inputs(name: str, rows: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """One image a row, of different sizes where the model allows it; rows of different length are padded on the left.

    Row `i` is equal to `single(inputs, i)` but for the padding.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def text(length: int) -> torch.Tensor:
        return torch.randint(3, 60, (length,), generator=generator)

    extra: dict[str, torch.Tensor] = {}
    if name == "llava_next":
        sizes = [[32, 16], [20, 40], [30, 28], [16, 48]][:rows]  # height, width: tiles 2x1, 1x2, 2x2, 1x2
        tiles = [3, 3, 5, 3][:rows]
        lengths = [16 + 8 * 5, 16 + 4 * 9, 16 + 8 * 9, 16 + 2 * 9][:rows]
        pixels = torch.zeros(rows, max(tiles), 3, SIDE, SIDE, dtype=dtype)
        for row, count in enumerate(tiles):
            pixels[row, :count] = normal(count, 3, SIDE, SIDE)
        extra = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    elif name == "qwen2_5_vl":
        grids = [[1, 4, 4], [1, 8, 4], [1, 4, 12], [1, 4, 8]][:rows]
        lengths = [h * w // 4 for _, h, w in grids]
        extra = {
            "pixel_values": normal(sum(h * w for _, h, w in grids), 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor(grids),
        }
    else:
        lengths = [3 if name == "instructblip" else 16] * rows
        extra = {"pixel_values": normal(rows, 3, SIDE, SIDE)}
    if name == "instructblip":
        extra["qformer_input_ids"] = torch.randint(3, 40, (rows, 4), generator=generator)
        extra["qformer_attention_mask"] = torch.ones(rows, 4, dtype=torch.long)
    parts = [
        torch.cat([text(2), torch.full((length,), IMAGE), text(4 + 2 * row)]) for row, length in enumerate(lengths)
    ]
    for part, length in zip(parts, lengths, strict=True) if name == "qwen2_5_vl" else ():
        part[1], part[length + 2] = 62, 61  # where an image starts and ends
    width = max(map(len, parts))
    ids = torch.stack([torch.cat([torch.full((width - len(part),), PAD), part]) for part in parts])
    mask = torch.stack([(torch.arange(width) >= width - len(part)).long() for part in parts])
    if name == "qwen2_5_vl":
        extra["mm_token_type_ids"] = (ids == IMAGE).int()
    return {"input_ids": ids, "attention_mask": mask, **extra}


def single(given: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of `inputs`, without its padding."""
    real = given["attention_mask"][row].bool()
    alone = {}
    for name, value in given.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            alone[name] = value[row : row + 1, real]
        elif name == "pixel_values" and "image_grid_thw" in given:
            counts = given["image_grid_thw"].prod(-1).tolist()
            alone[name] = value.split(counts)[row]
        else:
            alone[name] = value[row : row + 1]
    return alone
