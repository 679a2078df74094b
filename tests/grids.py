"""A variant that reads the grid of its calls, and tiny vision towers to read it on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLConfig, Qwen2VLModel, ViTConfig, ViTModel

import patchattn
from patchattn.core.registry import temporarily_registered

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_size": 24, "patch_size": 8}
SEEN: list[tuple[str, Any]] = []  # of the attention module, and the grid of its call


@dataclass(frozen=True, kw_only=True)
class ReadsConfig(patchattn.VariantConfig):
    strength: float = patchattn.option(0.0, help="Scales queries by their row and column.", source="ours")


class Reads(patchattn.Variant):
    """Reads the grid, and scales every query by where its token is."""

    config_class = ReadsConfig
    needs_grid = True

    def attend(self, call, inner):
        grid = call.grid()
        if not torch.compiler.is_compiling():
            SEEN.append((self.site.name, grid))
        where = grid.places[..., 0] + 2 * grid.places[..., 1]
        factor = (1.0 + self.config.strength * where)[:, None, :, None].to(call.query.dtype)
        return inner(call.replace(query=call.query * factor))


@contextmanager
def registered() -> Iterator[None]:
    """The variant `reads` is registered, and nothing of earlier tests is in `SEEN`."""
    SEEN.clear()
    words = {"title": "", "summary": "", "extra_parameters": "", "arxiv_id": None}
    info = patchattn.VariantInfo(name="reads", variant=Reads, year=2026, needs_training=False, **words)
    with temporarily_registered(info):
        yield


def pixels(*shape: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(*shape, generator=torch.Generator().manual_seed(0))}


def qwen(patches: int, grids: list[list[int]]) -> dict[str, torch.Tensor]:
    images = torch.randn(patches, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    return {"hidden_states": images, "grid_thw": torch.tensor(grids)}


def vit(**settings: Any) -> nn.Module:
    return ViTModel(ViTConfig(**{**SIZES, **IMAGE, **settings}))


def qwen2() -> nn.Module:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    return Qwen2VLModel(Qwen2VLConfig(vision_config=vision, text_config=TEXT)).visual


def qwen2_5() -> nn.Module:
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLModel(Qwen2_5_VLConfig(vision_config=vision, text_config=TEXT)).visual


TEXT = {**SIZES, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0}
TEXT["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def make(how: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return how().eval()


def first(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs)[0]
