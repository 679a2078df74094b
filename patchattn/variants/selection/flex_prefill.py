"""FlexPrefill: a prompt's heads read lines or blocks, as many as hold a share of their weights. arXiv 2502.20766."""

from dataclasses import dataclass
from typing import Any

import torch

from patchattn_kernels import BlockLists

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.lines import Texts, lines_of, no_more, ranked, texts_of
from ...reading.scores import products
from ...reading.selection import CAPABILITIES
from ...reading.text_blocks import TextBlocks, text_blocks
from ...reading.whole import WholeSelection, keys_so_far


@dataclass(frozen=True, kw_only=True)
class FlexPrefillConfig(VariantConfig):
    """Settings of FlexPrefill."""

    gamma: float = option(
        0.9,
        help="Share of the weights that is read. 1: all.",
        source="released code: 0.9 or 0.95",
        minimum=0.0,
        maximum=1.0,
    )
    tau: float = option(
        0.1,
        help="Distance between estimated and true weights of blocks below which a head reads the blocks that its own "
        "queries score highest, in place of lines. 0: no head does.",
        source="released code",
        minimum=0.0,
        maximum=1.0,
    )
    block: int = option(
        128, help="Tokens that read the same, and keys of a block.", source="released code", unit="tokens", minimum=1
    )
    budget: int = option(
        512,
        help="Keys in whose number of blocks columns, and diagonals, are read at least.",
        source="released code: its README; 1024 in its scripts",
        unit="keys",
        minimum=1,
    )


class FlexPrefill(WholeSelection):
    """Attention of a prompt to blocks in columns and along diagonals, or to those that mean queries score highest."""

    config_class = FlexPrefillConfig
    config: FlexPrefillConfig
    splits_by_head = True

    @property
    def is_identity(self) -> bool:
        return self.config.gamma == 1.0

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"gamma": 1.0}

    def select(self, call: AttentionCall) -> torch.Tensor | BlockLists | None:
        self.check(call)
        gamma, block, mask = self.config.gamma, self.config.block, call.mask
        if gamma == 1.0 or call.decodes or mask.columns <= max(2 * block, self.config.budget):
            return None
        texts = texts_of(mask)
        grid = text_blocks(mask, texts, block)
        together, real = grid.together[:, None], keys_so_far(mask)
        number = torch.arange(grid.text.shape[1], device=mask.device)
        columns, diagonals = (line.masked_fill(~real, 0.0) for line in lines_of(call, texts, block))
        estimate, scores = self._estimates(call, texts, grid)
        is_aware = distance(estimate, grid.sums(columns), together) < self.config.tau

        first, last = (
            ((together & later).sum(dim=-1) == 0) for later in (number < number[:, None], number > number[:, None])
        )
        chosen = []
        for line, forced in ((columns, first), (diagonals, last)):
            count = torch.where(is_aware, 1, self._blocks_of(line, texts, grid)).clamp(
                min=-(-self.config.budget // block)
            )
            mass = grid.sums(line).masked_fill(forced, float("inf"))
            chosen.append(ranked(mass, grid.text).rank < count)
        # diagonals, like keys, are told by how far from the end of the text they are
        end = torch.where(together, number, -1).amax(dim=-1)[:, 0]
        place = (end[:, :, None] - (number[:, None] - number)).clamp(0, len(number) - 1)[:, None]
        on_diagonal = chosen[1][:, :, None].expand(*chosen[1].shape, -1)
        on_diagonal = on_diagonal.gather(-1, place.expand(on_diagonal.shape))
        lines = chosen[0][:, :, None] | on_diagonal
        return grid.keep((lines | (is_aware[..., None] & self._best(scores, grid))) & visible(grid), mask, block)

    def _blocks_of(self, line: torch.Tensor, texts: Texts, grid: TextBlocks) -> torch.Tensor:
        """`(B, H, N)` of each block's text, the blocks that the fewest tokens with more than a share of a line fill."""
        total = line.new_zeros(*line.shape[:2], line.shape[2] + 1)
        of_keys = texts.of_keys[:, None].expand(line.shape)
        total = total.scatter_add(-1, of_keys, line).gather(-1, of_keys)
        too_little = no_more(ranked(line, texts.of_keys).running, self.config.gamma * total).to(torch.long)
        tokens = too_little.new_zeros(*line.shape[:2], line.shape[2] + 1).scatter_add(-1, of_keys, too_little) + 1
        text = grid.text.clamp(min=0)[:, None].expand(*line.shape[:2], -1)
        return tokens.gather(-1, text) // self.config.block + 1

    def _estimates(self, call: AttentionCall, texts: Texts, grid: TextBlocks) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of blocks of keys: of each text's mean last query `(B, H, N)`, of all mean queries `(B, H, N, N)`."""
        means = grid.mean_keys(call.key)
        is_last = (texts.behind_rows < self.config.block) & call.mask.real()
        counts = (is_last[..., None] & (texts.of_rows[..., None] == grid.text[:, None]))[:, None]
        by_row = products(call.query, means) * call.scaling
        estimate = by_row.masked_fill(~counts, 0.0).sum(dim=2) / counts.sum(dim=2).clamp(min=1)
        scores = products(grid.mean_queries(call.query), means) * call.scaling
        return estimate.detach(), scores.detach()

    def _best(self, scores: torch.Tensor, grid: TextBlocks) -> torch.Tensor:
        """bool `(B, H, N, N)`: the largest entries of the whole map, as many as have no more than a share of it."""
        weights = scores.masked_fill(~visible(grid), float("-inf")).softmax(dim=-1).nan_to_num(0.0)
        size = weights.shape[-1]
        running = ranked(weights.flatten(2), grid.text.repeat_interleave(size, dim=1)).running.view(weights.shape)
        rows = (grid.together & grid.has_rows.any(dim=-1)[:, None]).sum(dim=-1)[:, None, :, None]
        return no_more(running, self.config.gamma * rows)


def visible(grid: TextBlocks) -> torch.Tensor:
    """`(B or 1, 1, N, N)` bool: blocks of the same text up to the own one, of blocks with queries in this call."""
    size = grid.text.shape[1]
    before = torch.ones(size, size, dtype=torch.bool, device=grid.text.device).tril()
    return (grid.together & before & grid.has_rows.any(dim=-1)[..., None])[:, None]


def distance(logits: torch.Tensor, mass: torch.Tensor, together: torch.Tensor) -> torch.Tensor:
    """`(B, H, N)` square root of the Jensen-Shannon divergence, within each one's group.

    Args:
        logits: `(B, H, N)` whose softmax is the one distribution.
        mass: `(B, H, N)` the other one, not normalised.
        together: bool `(B or 1, 1, N, N)` the groups; one that is in none has a distance of 0 from its like.
    """
    groups = together.to(mass.dtype)
    total = logits[:, :, None].masked_fill(~together, float("-inf")).logsumexp(dim=-1)
    estimated = (logits - total).exp().masked_fill(~together.any(dim=-1), 0.0)
    true = mass / (groups @ mass[..., None])[..., 0].clamp(min=torch.finfo(mass.dtype).tiny)
    middle = (estimated + true) / 2
    terms = torch.stack([torch.xlogy(part, part) - torch.xlogy(part, middle) for part in (estimated, true)])
    return (groups @ terms.mean(dim=0)[..., None])[..., 0].clamp(min=0).sqrt()


register_variant(
    VariantInfo(
        name="flex_prefill",
        variant=FlexPrefill,
        title="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
        arxiv_id="2502.20766",
        year=2025,
        code="https://github.com/bytedance/FlexPrefill",
        summary="A prompt reads columns and diagonals of blocks, or the best blocks, for a share of its attention.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES,
        presets={"scripts": {"budget": 1024}},
        examples=(
            {"gamma": 0.5, "tau": 0.0, "block": 1, "budget": 1},
            {"gamma": 0.5, "tau": 1.0, "block": 1, "budget": 1},
        ),
    )
)
