"""What the tests of the photo VLM share: photographs of plain colours, and tiny models to put together."""

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CLASSES = ("airplane", "bird", "cat", "deer", "dog", "frog", "horse", "ship")
WORDS = [
    "user",
    "assistant",
    "Is",
    "there",
    "There",
    "is",
    "a",
    "an",
    "and",
    "in",
    "the",
    "image",
    "What",
    "Yes",
    "No",
    "?",
    ".",
    ",",
]


def photographs(path: Path, count: int, shade: int) -> str:
    """A zip file in which each class has a colour of its own."""
    with zipfile.ZipFile(path, "w") as archive:
        for index, name in enumerate(CLASSES):
            for number in range(count):
                pixels = np.full((8, 8, 3), (30 * index, 255 - 30 * index, shade + number), dtype=np.uint8)
                buffer = BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                archive.writestr(f"train/{name}/{number:04}.png", buffer.getvalue())
    return str(path)


def parts(folder: Path) -> dict[str, Any]:
    """Settings that name a tiny encoder, a tiny language model and photographs, all written into a folder."""
    torch.manual_seed(0)
    tower = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(tower).save_pretrained(folder / "tower")
    BitImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(
        folder / "tower"
    )
    words = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", *WORDS, *CLASSES]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    ).save_pretrained(folder / "text")
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(text).save_pretrained(folder / "text")
    return {
        "tower": str(folder / "tower"),
        "language_model": str(folder / "text"),
        "photos": photographs(folder / "train.zip", 3, 0),
        "eval_photos": photographs(folder / "test.zip", 2, 100),
    }
