"""MaxViT: patches see their window, or a lattice over the whole image, in turn. arXiv 2204.01697."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.grid_masks import CAPABILITIES, GridMaskVariant, sizes_that_fit
from ...reading.grid_tiles import Seen, alike


@dataclass(frozen=True, kw_only=True)
class MaxViTConfig(VariantConfig):
    """Settings of MaxViT's attention."""

    size: int | None = option(
        7,
        help="Patches of a side of a window, and of a lattice; it must divide rows and columns. None: all.",
        source="paper",
        unit="patches",
        minimum=1,
    )
    pattern: Literal["alternate", "block", "grid"] = option(
        "alternate",
        help="Windows in layers 0, 2, ... and lattices in the others; windows; lattices.",
        source="paper: a block is followed by a grid",
        choices=("alternate", "block", "grid"),
    )


class MaxViT(GridMaskVariant):
    """Attention within windows in some layers, within lattices of patches that are far from each other in others."""

    config_class = MaxViTConfig
    config: MaxViTConfig

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"size": None}

    def sees(self, rows: int, columns: int) -> Sequence[Seen]:
        size, pattern = self.config.size, self.config.pattern
        if size is None:
            return [Seen(alike([0] * rows), alike([0] * columns))]
        if rows % size or columns % size:
            raise ValueError(
                f"Windows and lattices of {size} x {size} do not divide the {rows} x {columns} patches of an image in "
                f"{self.site.name}. {sizes_that_fit(rows, columns)}"
            )
        if pattern == "alternate":
            pattern = "grid" if self.site.layer_index % 2 else "block"
        along = [
            alike([place // size if pattern == "block" else place % (n // size) for place in range(n)])
            for n in (rows, columns)
        ]
        return [Seen(along[0], along[1])]


register_variant(
    VariantInfo(
        name="maxvit",
        variant=MaxViT,
        title="MaxViT: Multi-Axis Vision Transformer",
        arxiv_id="2204.01697",
        year=2022,
        code="https://github.com/google-research/maxvit",
        summary="Patches of an image see their window in every other layer, a lattice over the image in the others.",
        extra_parameters="none",
        needs_training=True,
        capabilities=CAPABILITIES,
        examples=({"size": 2},),
    )
)
