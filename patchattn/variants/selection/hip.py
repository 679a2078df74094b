"""HiP attention: a tree of parts of the text, which each token goes down to the keys it reads. arXiv 2406.09827."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from patchattn_kernels.rows import full_precision

from ...core.call import AttentionCall
from ...core.places import Places, gathered, taken
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantInfo
from ...reading.choose import chosen_first, down_a_tree
from ...reading.forced import visible_pages
from ...reading.groups import any_of_group, heads_option, reduced
from ...reading.pages import BoundedSelection, PagedConfig, prefill_option
from ...reading.refresh import refresh_option
from ...reading.scores import products
from ...reading.selection import CAPABILITIES, plain_own
from ...reading.tiles import TextRows


@dataclass(frozen=True, kw_only=True)
class HiPConfig(PagedConfig):
    """Settings of HiP attention."""

    budget: int | None = option(
        512,
        help="Keys that a token reads, rounded up to whole pages, its own page among them. None: all.",
        source="paper: 512 to 1024",
        unit="keys",
        minimum=1,
    )
    page: int = option(2, help="Keys of a page, the leaf of the tree.", source="paper", unit="keys", minimum=1)
    queries: int = option(
        32,
        help="Tokens that share a choice in calls of several, counted from the first of the text: a page scores what "
        "it scores for that of them which wants it most. 1: every token chooses for itself.",
        source="paper",
        unit="tokens",
        minimum=1,
    )
    refresh: int = refresh_option(1, source="paper: 1 to 8")
    heads: Literal["kv", "query"] = heads_option("query", source="paper")
    prefill: Literal["dense", "selected"] = prefill_option("selected")
    dense_layers: int = option(3, help="First layers that stay dense.", source="paper", unit="layers", minimum=0)

    @property
    def looks_ahead(self) -> bool:
        return self.budget is not None and (super().looks_ahead or self.refresh > 1 or self.queries > 1)


class HiP(BoundedSelection):
    """Attention to the pages that are left when parts of the text are halved again and again, the best half of which
    stays.

    A part is judged by the page in its middle alone.
    """

    config_class = HiPConfig
    config: HiPConfig
    splits_by_head = True

    def select(self, call: AttentionCall) -> torch.Tensor | Places | None:
        config = self.config
        if self.is_dense(call) or config.budget is None or call.mask.columns <= config.budget:
            return None
        count = -(-config.budget // config.page)
        return self.lasting(
            call, lambda: self._chosen(call, count), page=config.page, count=count, every=config.refresh
        )

    def _chosen(self, call: AttentionCall, count: int) -> torch.Tensor:
        """bool `(B, Hkv or H, Tq, P)`: each query's own page, and `count - 1` of those that its block of queries sees,
        but for the last one of these."""
        visible, own = visible_pages(call.mask, self.config.page)
        if self.config.heads == "kv":
            visible, own = (any_of_group(pages, call.key.shape[1]) for pages in (visible, own))
        shape = (len(call.query), call.query.shape[1] if self.config.heads == "query" else call.key.shape[1])
        visible, own = (pages.expand(*shape, -1, -1) for pages in (visible, own))
        if count == 1:
            return own
        size = visible.shape[-1]
        together = self.config.queries > 1 and call.query.shape[2] > 1
        blocks = TextRows(call.mask, self.config.queries) if together else None
        number = torch.arange(size, device=own.device)
        # of queries that see nothing there is no part
        first = torch.where(visible, number, size).amin(dim=-1, keepdim=True)
        end = torch.where(own, number, 0).amax(dim=-1, keepdim=True)
        if blocks is not None:
            first, end = -blocks.highest(-first, -size), blocks.highest(end, 0)
        score = self._scorer(call, blocks)
        with torch.no_grad():
            if plain_own(call.mask) is not None:
                pages = down_a_tree(first.squeeze(-1), end.squeeze(-1), size, count - 1, score)
            else:  # padding that stands between pages of a text is no part of it
                seen = visible if blocks is None else blocks.highest(visible.long(), 0) > 0
                order, counts = chosen_first(seen & (number < end), size)
                chosen = down_a_tree(
                    torch.zeros_like(counts), counts, size, count - 1, lambda some: score(order.gather(-1, some))
                )
                pages = torch.zeros_like(chosen).scatter(-1, order, chosen)
        pages = pages if blocks is None else blocks.by_row(pages)
        return (pages | own) & visible

    def _scorer(self, call: AttentionCall, blocks: TextRows | None) -> Callable[[torch.Tensor], torch.Tensor]:
        """What scores pages `(B, Hkv or H, Tq, n)`, or of blocks of queries, by their numbers: the highest product of a
        visible key."""
        page, groups, keys = self.config.page, call.key.shape[1], call.key.shape[2]
        hidden = ~call.mask.seen()
        if call.query.shape[2] > 1:
            logits = products(call.query, call.key).masked_fill(hidden, float("-inf"))
            whole = F.pad(logits, (0, -keys % page), value=float("-inf")).unflatten(-1, (-1, page)).amax(dim=-1)
            whole = reduced(whole, groups, "max") if self.config.heads == "kv" else whole
            of_blocks = whole if blocks is None else blocks.highest(whole, float("-inf"))
            return lambda pages: of_blocks.gather(-1, pages)
        ratio = call.query.shape[1] // groups

        def of_few(pages: torch.Tensor) -> torch.Tensor:
            inside = torch.arange(page, device=pages.device)
            places = (pages[:, :, 0, :, None] * page + inside).clamp(max=keys - 1).flatten(2)  # of pages before the own
            lists = places.shape[1] // groups
            some = taken(call.key, places.unflatten(1, (groups, lists)).flatten(2)).unflatten(2, (lists, -1))
            query = call.query[:, :, 0].unflatten(1, (groups, ratio))
            if lists == 1:
                logits = full_precision(query) @ full_precision(some[:, :, 0]).mT
            else:
                logits = (full_precision(query)[:, :, :, None] @ full_precision(some).mT).squeeze(3)
            of_heads = places if places.shape[1] == call.query.shape[1] else places.repeat_interleave(ratio, dim=1)
            is_hidden = gathered(hidden[:, :, 0], of_heads).unflatten(1, (groups, ratio))
            logits = logits.masked_fill(is_hidden, float("-inf")).unflatten(-1, (-1, page)).amax(dim=-1)
            return (logits.amax(dim=2) if lists == 1 and self.config.heads == "kv" else logits.flatten(1, 2))[
                :, :, None
            ]

        return of_few


register_variant(
    VariantInfo(
        name="hip",
        variant=HiP,
        title="A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned "
        "Attention",
        arxiv_id="2406.09827",
        year=2024,
        code="https://github.com/DeepAuto-AI/hip-attention",
        summary="Every token halves parts of the text again and again and reads the keys that are left.",
        extra_parameters="none",
        needs_training=False,
        capabilities=CAPABILITIES,
        examples=(
            {"budget": 3, "page": 1, "queries": 1, "dense_layers": 0},
            {"budget": 3, "page": 1, "queries": 4, "heads": "kv", "dense_layers": 0},
        ),
    )
)
