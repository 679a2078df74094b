"""Neighborhood attention: patches see those around them. NAT, arXiv 2204.07143; dilated: DiNAT, arXiv 2209.15001."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import VariantConfig, VariantInfo
from ...reading.grid_masks import CAPABILITIES, GridMaskVariant
from ...reading.grid_tiles import Seen, Sets


@dataclass(frozen=True, kw_only=True)
class NeighborhoodConfig(VariantConfig):
    """Settings of neighborhood attention."""

    kernel: int | tuple[int, ...] | None = option(
        7, help="Patches of a neighbourhood's side; or several. None: all.", source="paper", unit="patches", minimum=2
    )
    dilation: int | tuple[int, ...] = option(
        1,
        help="Every so many rows and columns there is a neighbour; or several.",
        source="NAT; DiNAT alternates 1 with larger ones",
        unit="patches",
        minimum=1,
    )
    stride: int = option(
        1,
        help="So many neighbouring patches share the neighbourhood of the middle one; at most the kernel.",
        source="NATTEN",
        unit="patches",
        minimum=1,
    )
    several: Literal["layers", "heads"] = option(
        "layers",
        help="What several kernels and dilations are for: layers in turn, or neighbouring groups of heads.",
        source="DiNAT: layers; StyleNAT's Hydra: heads",
        choices=("layers", "heads"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kernels = self.kernel if isinstance(self.kernel, tuple) else (self.kernel,)
        dilations = self.dilation if isinstance(self.dilation, tuple) else (self.dilation,)
        if not kernels or not dilations or len({len(kernels), len(dilations)} - {1}) > 1:
            raise ValueError(
                "kernel and dilation must be one number each, or as many of either as of the other, got "
                f"{len(kernels)} and {len(dilations)}."
            )
        if any(kernel is not None and self.stride > kernel for kernel in kernels):
            raise ValueError(f"stride must be at most the kernel, got {self.stride} and {min(filter(None, kernels))}.")

    def pairs(self) -> list[tuple[int, int]]:
        """Kernels and their dilations; none where everything is seen."""
        kernels = self.kernel if isinstance(self.kernel, tuple) else (self.kernel,)
        dilations = self.dilation if isinstance(self.dilation, tuple) else (self.dilation,)
        count = max(len(kernels), len(dilations))
        whole = (several * count if len(several) == 1 else several for several in (kernels, dilations))
        return [(kernel, dilation) for kernel, dilation in zip(*whole, strict=True) if kernel is not None]


class Neighborhood(GridMaskVariant):
    """Attention to the patches around each, whose neighbourhood is moved inwards at the border."""

    config_class = NeighborhoodConfig
    config: NeighborhoodConfig

    def __init__(self, config: NeighborhoodConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        self.groups: list[tuple[int | None, int, int]] = []  # heads, kernel, dilation
        kinds = config.pairs()
        if kinds and config.several == "layers":
            self.groups = [(None, *kinds[site.layer_index % len(kinds)])]
        elif kinds:
            heads = site.require("query_heads", by="neighborhood")
            if heads < len(kinds):
                raise ValueError(f"{len(kinds)} kernels or dilations are more than the {heads} heads of {site.name}.")
            each, more = divmod(heads, len(kinds))
            counts = [each + (number >= len(kinds) - more) for number in range(len(kinds))]
            self.groups = [(count, *kind) for count, kind in zip(counts, kinds, strict=True)]

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"kernel": None}

    def sees(self, rows: int, columns: int) -> Sequence[Seen]:
        if not self.groups:
            return [Seen((tuple(range(rows)),) * rows, (tuple(range(columns)),) * columns)]
        for _, kernel, dilation in self.groups:
            if kernel * dilation > min(rows, columns):
                raise ValueError(
                    f"A neighbourhood of {kernel} patches, every {dilation}, needs {kernel * dilation} rows and "
                    f"columns, and {self.site.name} attends over an image of {rows} x {columns}: choose kernel and "
                    f"dilation whose product is at most {min(rows, columns)}, or larger images."
                )
        stride = self.config.stride
        return [
            Seen(neighbours(rows, kernel, dilation, stride), neighbours(columns, kernel, dilation, stride), heads)
            for heads, kernel, dilation in self.groups
        ]


def neighbours(size: int, kernel: int, dilation: int, stride: int) -> Sets:
    """Of each of `size` positions the `kernel` ones that it sees, by NATTEN's rule."""
    return tuple(_neighbours(position, size, kernel, dilation, stride) for position in range(size))


def _neighbours(position: int, size: int, kernel: int, dilation: int, stride: int) -> tuple[int, ...]:
    group, place = position % dilation, position // dilation
    count = -(-(size - group) // dilation)  # positions that are so many dilations away from this one
    before, after = kernel // 2, kernel // 2 + kernel % 2 - 1
    leader = min(place // stride * stride + stride // 2, count - 1)
    centre = min(max(leader, before), count - 1 - after)
    return tuple(group + dilation * other for other in range(centre - before, centre + after + 1))


register_variant(
    VariantInfo(
        name="neighborhood",
        variant=Neighborhood,
        title="Neighborhood Attention Transformer",
        arxiv_id="2204.07143",
        year=2022,
        code="https://github.com/SHI-Labs/NATTEN",
        summary="Patches of an image see as many around them, be they next to each other or some way apart.",
        extra_parameters="none",
        needs_training=True,
        capabilities=CAPABILITIES,
        examples=({"kernel": 3}, {"kernel": 2, "dilation": (1, 2), "several": "heads"}),
    )
)
