"""Halo attention: a block of patches sees itself and a rim around it. HaloNet, arXiv 2103.12731."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.grid_masks import CAPABILITIES, GridMaskVariant
from ...reading.grid_tiles import Seen, Sets


@dataclass(frozen=True, kw_only=True)
class HaloConfig(VariantConfig):
    """Settings of halo attention."""

    block: int | None = option(
        8, help="Patches of a block's side. None: all see all.", source="paper", unit="patches", minimum=1
    )
    halo: int = option(3, help="Patches that a block sees beyond each side.", source="paper", unit="patches", minimum=0)


class Halo(GridMaskVariant):
    """Attention of blocks of the image to themselves and what is near them."""

    config_class = HaloConfig
    config: HaloConfig

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"block": None}

    def sees(self, rows: int, columns: int) -> Sequence[Seen]:
        return [Seen(self._along(rows), self._along(columns))]

    def _along(self, size: int) -> Sets:
        block, halo = self.config.block or size, self.config.halo
        starts = [place // block * block for place in range(size)]
        return tuple(tuple(range(max(start - halo, 0), min(start + block + halo, size))) for start in starts)


register_variant(
    VariantInfo(
        name="halo",
        variant=Halo,
        title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        arxiv_id="2103.12731",
        year=2021,
        summary="Blocks of an image see themselves and a rim of patches around them.",
        extra_parameters="none",
        needs_training=True,
        capabilities=CAPABILITIES,
        examples=({"block": 2, "halo": 1},),
    )
)
