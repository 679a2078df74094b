"""Quadrangle attention: windows whose keys and values are read from a learned quadrangle. QFormer, arXiv 2303.15105."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core.call import AttentionCall
from ...core.host import host
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import Attend, AttentionOutput, VariantConfig, VariantInfo
from ...reading.grid_masks import (
    CAPABILITIES,
    GridVariant,
    is_plain,
    numbers,
    require_whole,
    shape_of_image,
    sizes_that_fit,
)

_NUMBERS = 9  # of a quadrangle: translation, scale, shear and projection by x and y, and an angle


@dataclass(frozen=True, kw_only=True)
class QuadrangleConfig(VariantConfig):
    """Settings of quadrangle attention."""

    size: int | None = option(
        7,
        help="Patches of a window's side; it must divide rows and columns of an image, unless it is as large. None: "
        "all, and nothing is sampled.",
        source="released code",
        unit="patches",
        minimum=1,
    )


class Quadrangle(GridVariant):
    """Attention of windows to keys and values at the corners of a grid over a quadrangle, one per window and head.

    `weight` `(9 H, E)` and `bias` `(9 H,)` make the quadrangles of mean inputs of windows; they are zero at the start,
    where quadrangles are the windows themselves. Of a head, in this order: t_x, t_y, s_x, s_y, h_x, h_y, p_x, p_y, and
    the angle. Tokens that are no patches see all, and are seen by all windows.
    """

    config_class = QuadrangleConfig
    config: QuadrangleConfig

    def __init__(self, config: QuadrangleConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        if config.size is None:
            return
        heads, width = (site.require(fact, by="quadrangle") for fact in ("query_heads", "input_size"))
        self.weight = nn.Parameter(torch.zeros(_NUMBERS * heads, width))
        self.bias = nn.Parameter(torch.zeros(_NUMBERS * heads))

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"size": None}

    @property
    def needs_context(self) -> bool:
        return self.config.size is not None

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        size = self.config.size
        if size is None:
            return inner(call)
        grid = call.grid()
        (rows, columns), prefix = shape_of_image(grid, self.site), grid.prefix
        if size >= max(rows, columns):
            return inner(call)
        if rows % size or columns % size:
            raise ValueError(
                f"Windows of {size} x {size} do not divide the {rows} x {columns} patches of an image in "
                f"{self.site.name}. {sizes_that_fit(rows, columns)}"
            )
        require_whole(call, "quadrangle")
        if not is_plain(call) or call.mask.keeps:
            raise NotImplementedError(
                f"quadrangle reads keys between tokens, which a mask, or what is added to logits, says nothing of, in "
                f"{self.site.name}: all tokens of an image are to see all."
            )
        query, key, value = call.query, call.key, call.value
        if key.shape[1] != query.shape[1]:
            key, value = (s.repeat_interleave(query.shape[1] // s.shape[1], dim=1) for s in (key, value))
        order = numbers(grid).argsort()
        states = call.context.layer_input()[:, prefix:].index_select(1, order).mT.unflatten(-1, (rows, columns))
        at = self._places(states, query.shape[1], size)

        def sampled(maps: torch.Tensor) -> torch.Tensor:
            """`(B, H, windows, size^2, D)` of patches `(B, H, N, D)`, zero outside of the image."""
            wide = maps.flatten(0, 1).mT.unflatten(-1, (rows, columns)).to(at.dtype)
            found = F.grid_sample(wide, at.flatten(0, 1), padding_mode="zeros", align_corners=True)
            return found.permute(0, 2, 3, 1).unflatten(0, maps.shape[:2]).to(maps.dtype)

        def with_prefix(states: torch.Tensor) -> torch.Tensor:
            windows = sampled(states[:, :, prefix:].index_select(2, order))
            shared = states[:, :, None, :prefix].expand(-1, -1, windows.shape[2], -1, -1)
            return torch.cat([shared, windows], dim=3)

        by_window = torch.arange(rows * columns, device=order.device).view(rows // size, size, columns // size, size)
        patches = order[by_window.transpose(1, 2).flatten()]  # window by window, places in the call
        of_windows = query[:, :, prefix:].index_select(2, patches).unflatten(2, (-1, size**2))
        keys, values = with_prefix(key), with_prefix(value)
        weights = (of_windows @ keys.mT * call.scaling).softmax(-1)
        of_patches = (weights @ values).flatten(2, 3).index_select(2, patches.argsort())
        of_others = (query[:, :, :prefix] @ key.mT * call.scaling).softmax(-1)
        output = torch.cat([of_others @ value, of_patches], dim=2).transpose(1, 2)
        if not (call.kwargs.get("output_attentions") or not host().computes_softmax(call.base)):
            return output, None
        each = torch.eye(rows * columns, device=query.device, dtype=query.dtype).index_select(0, order)
        share = sampled(each.expand(*query.shape[:2], -1, -1))  # what of a sampled key is each patch's
        whole = torch.cat([weights[..., :prefix], weights[..., prefix:] @ share], dim=-1)
        whole = whole.flatten(2, 3).index_select(2, patches.argsort())
        return output, torch.cat([of_others, whole], dim=2)

    def _places(self, states: torch.Tensor, heads: int, size: int) -> torch.Tensor:
        """`(B, H, windows, size^2, 2)` x and y of keys, from -1 to 1 between the first and last patch of the image.

        Args:
            states: `(B, E, rows, columns)` what enters the layer.
            heads: H.
            size: of a window.
        """
        down, across = (side // size for side in states.shape[-2:])
        pooled = F.leaky_relu(F.avg_pool2d(states, size)).flatten(2).mT
        learned = F.linear(pooled.to(self.weight.dtype), self.weight, self.bias)
        learned = learned.to(torch.promote_types(learned.dtype, torch.float32))
        t_x, t_y, s_x, s_y, h_x, h_y, p_x, p_y, angle = learned.unflatten(-1, (heads, 9, 1)).permute(3, 0, 2, 1, 4)
        ys, xs = (
            torch.linspace(-1.0, 1.0, n, dtype=learned.dtype, device=learned.device).unflatten(0, (-1, size))
            for n in states.shape[-2:]
        )
        y, x = (ys[0] - ys[0].mean()).repeat_interleave(size), (xs[0] - xs[0].mean()).repeat(size)
        u, v = (s_x + 1) * x, (s_y + 1) * y
        u, v = u + h_x * v, h_y * u + v
        u, v = angle.cos() * u + angle.sin() * v, angle.cos() * v - angle.sin() * u
        depth = p_x * x + p_y * y + 1
        depth = depth.masked_fill(depth == 0, 1e-6)
        centre_y, centre_x = ys.mean(1).repeat_interleave(across)[:, None], xs.mean(1).repeat(down)[:, None]
        return torch.stack([centre_x + (u + t_x / across) / depth, centre_y + (v + t_y / down) / depth], dim=-1)


register_variant(
    VariantInfo(
        name="quadrangle",
        variant=Quadrangle,
        title="Vision Transformer with Quadrangle Attention",
        arxiv_id="2303.15105",
        year=2023,
        code="https://github.com/ViTAE-Transformer/QFormer",
        summary="Windows of an image read keys and values from learned quadrangles.",
        extra_parameters="9 heads x (layer's width + 1) values per layer",
        needs_training=True,
        innermost=True,
        capabilities=CAPABILITIES - {"sinks", "softcap", "position_bias", "padding", "dropout"},
        examples=({"size": 2},),
    )
)
