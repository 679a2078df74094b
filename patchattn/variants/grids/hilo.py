"""HiLo: some heads attend within windows, the others to windows' mean keys and values. LITv2, arXiv 2205.13213."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import Attend, AttentionOutput, VariantConfig, VariantInfo
from ...reading.grid_masks import CAPABILITIES, GridVariant, require_whole, shape_of_image, sizes_that_fit


@dataclass(frozen=True, kw_only=True)
class HiLoConfig(VariantConfig):
    """Settings of HiLo."""

    alpha: float = option(
        0.5,
        help="Share of heads, rounded down, that read means of windows; they are the last ones.",
        source="released code; the released models have 0.9",
        minimum=0.0,
        maximum=1.0,
    )
    size: int = option(
        2,
        help="Patches of a window's side; it must divide rows and columns of an image. 1: all heads read all.",
        source="released code",
        unit="patches",
        minimum=1,
    )


class HiLo(GridVariant):
    """Attention within windows in the first heads, to mean keys and values of windows in the last ones."""

    config_class = HiLoConfig
    config: HiLoConfig

    def __init__(self, config: HiLoConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads = site.require("query_heads", by="hilo")
        self.high = heads - int(config.alpha * heads)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"size": 1}

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        grid, size = call.grid(), self.config.size
        if size == 1:
            return inner(call)
        rows, columns = shape_of_image(grid, self.site)
        if rows % size or columns % size:
            raise ValueError(
                f"Windows of {size} x {size} do not divide the {rows} x {columns} patches of an image in "
                f"{self.site.name}. {sizes_that_fit(rows, columns)}"
            )
        require_whole(call, "hilo")
        places = grid.places[0, grid.prefix :]
        window = places[:, 0] // size * (columns // size) + places[:, 1] // size
        count, heads = rows * columns // size**2, call.query.shape[1]
        key, value = (self._means(states[:, :, grid.prefix :], window, count) for states in (call.key, call.value))
        is_patch = grid.places[0, :, 0] >= 0
        within = F.pad(window[:, None] == window, (grid.prefix, 0, grid.prefix, 0), value=True)
        to_means = is_patch[:, None].expand(-1, count)
        to_tokens = ~(is_patch[:, None] & is_patch)
        high = torch.cat([torch.zeros_like(to_means), within], dim=1)
        low = torch.cat([to_means, to_tokens], dim=1)
        keep = torch.stack([high] * self.high + [low] * (heads - self.high))[None]
        mask = call.mask.prepended(count).narrowed(keep)
        return inner(
            call.replace(key=torch.cat([key, call.key], dim=2), value=torch.cat([value, call.value], dim=2), mask=mask)
        )

    @staticmethod
    def _means(states: torch.Tensor, window: torch.Tensor, count: int) -> torch.Tensor:
        """`(B, Hkv, windows, D)` of patches `(B, Hkv, N, D)`."""
        total = states.new_zeros(*states.shape[:2], count, states.shape[3]).index_add(2, window, states)
        return total * (count / len(window))


register_variant(
    VariantInfo(
        name="hilo",
        variant=HiLo,
        title="Fast Vision Transformers with HiLo Attention",
        arxiv_id="2205.13213",
        year=2022,
        code="https://github.com/ziplab/LITv2",
        summary="Some heads attend within windows of an image, the others to windows' mean keys and values.",
        extra_parameters="none",
        needs_training=True,
        capabilities=CAPABILITIES,
        examples=({"size": 2}, {"size": 2, "alpha": 1.0}),
    )
)
