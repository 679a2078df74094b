"""VL-SAM: attention multiplied up through all layers, from a word to parts of a picture; boxes. arXiv 2410.05963."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.selection import base_model, select_sites
from ..vision.images import ImageSpan, image_layout
from ..vision.regions import regions
from .attention_maps import asking_rows, head_weights, image_place, look, of_row


@dataclass(frozen=True)
class Box:
    """A part of a picture that stands out.

    Attributes:
        left, top, right, bottom: its edges, as shares of the picture's width and height.
        point: share of the width and of the height at which the middle of its strongest token lies: a prompt for a
            segmentation model.
        share: of the flow to the whole picture.
    """

    left: float
    top: float
    right: float
    bottom: float
    point: tuple[float, float]
    share: float


@dataclass(frozen=True, eq=False)
class ImageFlow:
    """Attention flow from text to the tokens of one picture.

    Attributes:
        span: the image's tokens.
        grid: `(rows, columns)` float64: flow to each token of the whole picture, the largest one is 1.
        boxes: around connected tokens above the threshold, the one with the largest share first.
        layers: how many layers it went through.
    """

    span: ImageSpan
    grid: torch.Tensor
    boxes: tuple[Box, ...]
    layers: int


def image_flow(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    queries: Literal["last", "text"] | int = "last",
    threshold: float = 0.5,
    row: int = 0,
    image: int = 0,
) -> ImageFlow:
    """Attention flow to the parts of a picture, through all layers of the language model.

    Of each layer, heads are weighed by w_h, the mean over queries of their largest attention, A = mean_h w_h a_h, and
    F = (I + A) (I + F of the layer below), F below the first layer being 0; then each column of F, which L0 of L
    tokens see, is multiplied by 1 - (L0 - 1) / L, since what stands first is seen by all. Where F begins, and that
    columns are multiplied in every layer, is ours; it is not normalised.

    Args:
        model: a LLaVA-1.5, LLaVA-NeXT or Qwen2.5-VL, patched or not.
        inputs: keyword arguments of one forward, as the processor makes them.
        queries: whose flow: that of the last token, of all text after the image, mean; or of the token with that
            index, such as the name of an object in an answer.
        threshold: boxes are around tokens with at least that much of the largest flow.
        row: which sequence of the batch.
        image: which image of that sequence.

    Raises:
        ValueError: a threshold that is not above 0 and at most 1; or as `image_attention`.
        NotImplementedError: as `image_attention`.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}.")
    base: Any = base_model(model)
    span, first, inside = image_place(base, inputs, row, image)
    ids, image_token = inputs["input_ids"][row], image_layout(base).image_token_id
    flow: list[torch.Tensor] = []
    asking: list[torch.Tensor] = []

    def see(call: AttentionCall, own: torch.Tensor | None) -> None:
        visible, rows = of_row(call, row)
        asking[:] = [asking_rows(rows, ids, span, queries, image_token)]
        seen = visible[rows].sum(0).cpu().double()
        total = torch.zeros(visible.shape, dtype=torch.float64)
        heads = call.query.shape[1]
        for head in range(heads):
            weights = head_weights(call, own, head, row, visible).cpu().double()
            total += weights[rows].amax(-1).mean() / heads * weights
        one = torch.eye(len(total), dtype=torch.float64)
        below = flow[-1] if flow else torch.zeros_like(one)
        flow.append(((one + total) @ (one + below)) * (1 - (seen - 1).clamp(min=0) / len(rows)))

    sites = select_sites(base, modules=inside)
    look(base, inputs, sites, see)
    rows_, columns = span.grid or (0, 0)
    found = flow[-1][asking[0]].mean(0)[first : first + rows_ * columns].view(rows_, columns)
    grid = found / found.max()
    return ImageFlow(span, grid, boxes(grid, threshold), len(sites))


def boxes(grid: torch.Tensor, threshold: float) -> tuple[Box, ...]:
    """Around the connected tokens of a map that have at least so much of its largest value, the heaviest first."""
    rows, columns = grid.shape
    found = []
    for part in regions(grid >= threshold * grid.max()):
        (top, left), (bottom, right) = part.amin(0).tolist(), (part.amax(0) + 1).tolist()
        values = grid[part[:, 0], part[:, 1]]
        y, x = part[int(values.argmax())].tolist()
        point = ((x + 0.5) / columns, (y + 0.5) / rows)
        share = float(values.sum() / grid.sum())
        found.append(Box(left / columns, top / rows, right / columns, bottom / rows, point, share))
    return tuple(sorted(found, key=lambda box: -box.share))
