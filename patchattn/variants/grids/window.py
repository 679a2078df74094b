"""Window attention: patches see their own window, shifted in every other layer. Swin Transformer, arXiv 2103.14030."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.grid_masks import CAPABILITIES, GridMaskVariant
from ...reading.grid_tiles import Seen, alike


@dataclass(frozen=True, kw_only=True)
class WindowConfig(VariantConfig):
    """Settings of window attention."""

    size: int | None = option(
        7, help="Patches of a window's side. None: all.", source="paper", unit="patches", minimum=1
    )
    shifted: Literal["odd", "none", "all"] = option(
        "odd",
        help="Layers, counted from 0, whose windows are shifted by half a window.",
        source="paper: every second block",
        choices=("odd", "none", "all"),
    )


class Window(GridMaskVariant):
    """Attention within windows of the image, which are shifted by half a window in every other layer."""

    config_class = WindowConfig
    config: WindowConfig

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"size": None}

    def sees(self, rows: int, columns: int) -> Sequence[Seen]:
        least = min(rows, columns)
        size = least if self.config.size is None else min(self.config.size, least)
        is_shifted = self.config.shifted == "all" or (self.config.shifted == "odd" and self.site.layer_index % 2 == 1)
        shift = size // 2 if is_shifted and size < least else 0
        along = [alike([(place + size - shift) // size for place in range(n)]) for n in (rows, columns)]
        return [Seen(along[0], along[1])]


register_variant(
    VariantInfo(
        name="window",
        variant=Window,
        title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
        arxiv_id="2103.14030",
        year=2021,
        code="https://github.com/microsoft/Swin-Transformer",
        summary="Patches of an image see those of their own window, which is shifted in every other layer.",
        extra_parameters="none",
        needs_training=True,
        capabilities=CAPABILITIES,
        examples=({"size": 2}, {"size": 3, "shifted": "all"}),
    )
)
