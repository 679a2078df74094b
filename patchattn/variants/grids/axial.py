"""Axial attention: patches see those of their row, or of their column, in turn. arXiv 1912.12180."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.grid_masks import CAPABILITIES, GridMaskVariant
from ...reading.grid_tiles import Seen


@dataclass(frozen=True, kw_only=True)
class AxialConfig(VariantConfig):
    """Settings of axial attention."""

    axes: Literal["alternate", "rows", "columns"] | None = option(
        "alternate",
        help="What patches see: their row in layers 0, 2, ... and their column in the others; their row; their column. "
        "None: all.",
        source="paper: layers along either axis in turn",
        choices=("alternate", "rows", "columns", None),
    )


class Axial(GridMaskVariant):
    """Attention along rows of the image in some layers, along columns in others."""

    config_class = AxialConfig
    config: AxialConfig

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"axes": None}

    def sees(self, rows: int, columns: int) -> Sequence[Seen]:
        axes = self.config.axes
        if axes == "alternate":
            axes = "columns" if self.site.layer_index % 2 else "rows"
        along_rows, along_columns = (
            tuple((place,) if axes == own else tuple(range(n)) for place in range(n))
            for own, n in (("rows", rows), ("columns", columns))
        )
        return [Seen(along_rows, along_columns)]


register_variant(
    VariantInfo(
        name="axial",
        variant=Axial,
        title="Axial Attention in Multidimensional Transformers",
        arxiv_id="1912.12180",
        year=2019,
        summary="Patches of an image see their row in every other layer, their column in the others.",
        extra_parameters="none",
        needs_training=True,
        capabilities=CAPABILITIES,
    )
)
