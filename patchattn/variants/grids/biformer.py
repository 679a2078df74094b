"""BiFormer: a region of the image reads the regions whose mean keys match its mean query best. arXiv 2303.08810."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import Attend, AttentionOutput, VariantConfig, VariantInfo
from ...reading.grid_masks import CAPABILITIES, GridVariant, require_whole, shape_of_image, sizes_that_fit
from ...reading.selection import density


@dataclass(frozen=True, kw_only=True)
class BiFormerConfig(VariantConfig):
    """Settings of BiFormer's attention."""

    regions: int = option(
        7, help="Regions of a side of the image; they must divide its rows and columns.", source="paper", minimum=1
    )
    top_k: int | None = option(
        4, help="Regions that a region reads. None: all.", source="released models: 1, 4, 16 by stage", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and self.top_k > self.regions**2:
            raise ValueError(f"top_k must be at most the {self.regions**2} regions of an image, got {self.top_k}.")


class BiFormer(GridVariant):
    """Attention of regions of an image to those that match them best, as the mean query and mean keys say.

    Reports `density` `(B, Tq)`: keys read over keys seen.
    """

    config_class = BiFormerConfig
    config: BiFormerConfig

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"top_k": None}

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        count, top_k = self.config.regions, self.config.top_k
        grid = call.grid()
        if top_k is None or top_k == count**2:
            return inner(call)
        rows, columns = shape_of_image(grid, self.site)
        if rows % count or columns % count:
            raise ValueError(
                f"{count} x {count} regions do not divide the {rows} x {columns} patches of an image in "
                f"{self.site.name}. {sizes_that_fit(rows, columns)}"
            )
        require_whole(call, "biformer")
        places = grid.places[0, grid.prefix :]
        region = places[:, 0] // (rows // count) * count + places[:, 1] // (columns // count)
        query, key = (self._means(states[:, :, grid.prefix :], region, count**2) for states in (call.query, call.key))
        heads = query.shape[1] // key.shape[1]
        logits = torch.einsum("bhqd,bhkd->bqk", query, key.repeat_interleave(heads, dim=1))  # all channels together
        best = logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        reads = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, value=True)
        keep = F.pad(reads[:, region][:, :, region], (grid.prefix, 0, grid.prefix, 0), value=True)[:, None]
        if self.observers:
            self.report(call, density=density(call, call.seeing(keep)))
        return inner(call.seeing(keep))

    @staticmethod
    def _means(states: torch.Tensor, region: torch.Tensor, count: int) -> torch.Tensor:
        """`(B, H, R, D)` in float32 at least of patches `(B, H, N, D)`."""
        states = states.detach().to(torch.promote_types(states.dtype, torch.float32))
        total = states.new_zeros(*states.shape[:2], count, states.shape[3]).index_add(2, region, states)
        return total * (count / len(region))


register_variant(
    VariantInfo(
        name="biformer",
        variant=BiFormer,
        title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
        arxiv_id="2303.08810",
        year=2023,
        code="https://github.com/rayleizhu/BiFormer",
        summary="Regions of an image read the regions whose mean keys match their mean query best.",
        extra_parameters="none",
        needs_training=True,
        capabilities=CAPABILITIES,
        examples=({"regions": 2, "top_k": 2},),
    )
)
