"""XAttention: a prompt reads the blocks whose antidiagonals sum up to a share of its weights. arXiv 2503.16428."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from patchattn_kernels import BlockLists
from patchattn_kernels.rows import full_precision

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.scores import products
from ...reading.selection import CAPABILITIES
from ...reading.tiles import RowGrid
from ...reading.whole import WholeSelection, keys_so_far


@dataclass(frozen=True, kw_only=True)
class XAttentionConfig(VariantConfig):
    """Settings of XAttention."""

    threshold: float = option(
        0.9,
        help="Share of the estimated weights that a block of tokens reads. 1: all.",
        source="paper: before it is lowered for each head; 0.8 in the released code",
        minimum=0.0,
        maximum=1.0,
    )
    stride: int = option(
        16, help="Tokens and keys of a tile, which is scored by one antidiagonal.", source="paper: 8 or 16", minimum=1
    )
    block: int = option(
        128, help="Tokens that read the same, and keys of a block.", source="released code", unit="tokens", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % self.stride:
            raise ValueError(f"block must be a multiple of stride={self.stride}, got {self.block}.")


class XAttention(WholeSelection):
    """Attention of a prompt to blocks of keys, as few as hold a share of weights that antidiagonals estimate."""

    config_class = XAttentionConfig
    config: XAttentionConfig
    splits_by_head = True

    @property
    def is_identity(self) -> bool:
        return self.config.threshold == 1.0

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"threshold": 1.0}

    def select(self, call: AttentionCall) -> torch.Tensor | BlockLists | None:
        self.check(call)
        block, mask = self.config.block, call.mask
        # the first block and the own one are read anyhow
        if self.config.threshold == 1.0 or call.decodes or mask.columns <= 2 * block:
            return None
        grid = RowGrid(mask, block)
        weights = tile_weights(call, grid, self.config.stride).detach()
        per_block = block // self.config.stride
        weights = F.pad(weights, (0, -weights.shape[-1] % per_block))
        mass = weights.unflatten(3, (-1, per_block)).sum(dim=4).unflatten(2, (-1, per_block)).sum(dim=3)
        return grid.keep(enough_blocks(mass, grid.seen(block, block), self.config.threshold), block)


def tile_weights(call: AttentionCall, grid: RowGrid, stride: int) -> torch.Tensor:
    """`(B, H, rows, tiles)` softmax over the tiles of keys that queries of a tile see.

    The logit of a tile is the mean over the antidiagonal of its logits, without bias or cap; what is no text counts as
    zeros.
    """
    mask = call.mask
    query = grid.spread(full_precision(call.query) * mask.real()[:, None, :, None])
    key = full_precision(call.key) * keys_so_far(mask)[..., None]
    key = F.pad(key, (0, 0, 0, -key.shape[2] % stride))
    # queries of a tile from the last to the first, beside its keys from the first to the last
    from_last = query.unflatten(2, (-1, stride)).flip(3).flatten(3)
    logits = products(from_last, key.unflatten(2, (-1, stride)).flatten(3)) * (call.scaling / stride)
    return logits.masked_fill(~grid.seen(stride, stride), float("-inf")).softmax(dim=-1).nan_to_num(0.0)


def enough_blocks(mass: torch.Tensor, seen: torch.Tensor, share: float) -> torch.Tensor:
    """bool `(B, H, Qb, Kb)`: the first block that is seen, the last one, and the heaviest others, while those before
    them have less than a share of all mass; of equal ones the first.

    Args:
        mass: `(B, H, Qb, Kb)` of blocks of keys.
        seen: bool, broadcast to it.
        share: of the mass of each block of queries.
    """
    seen = seen.expand(mass.shape)
    number = torch.arange(mass.shape[-1], device=mass.device)
    first = number == seen.to(torch.uint8).argmax(dim=-1, keepdim=True)
    last = number == torch.where(seen, number, -1).amax(dim=-1, keepdim=True)
    forced = (first | last) & seen
    others = mass.masked_fill(~seen | forced, float("-inf"))
    ordered, index = others.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.clamp(min=0)
    before = mass.masked_fill(~forced, 0.0).sum(dim=-1, keepdim=True) + ordered.cumsum(dim=-1) - ordered
    needed = before < share * mass.sum(dim=-1, keepdim=True)
    return (torch.zeros_like(seen).scatter(-1, index, needed) & seen) | forced


register_variant(
    VariantInfo(
        name="xattention",
        variant=XAttention,
        title="XAttention: Block Sparse Attention with Antidiagonal Scoring",
        arxiv_id="2503.16428",
        year=2025,
        code="https://github.com/mit-han-lab/x-attention",
        summary="A prompt reads the blocks of keys whose antidiagonals sum up to a share of its attention.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES,
        presets={"stride_8": {"stride": 8}, "released_code": {"threshold": 0.8}},
        examples=({"threshold": 0.5, "stride": 1, "block": 1},),
    )
)
