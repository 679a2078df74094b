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
from ...reading.pages import BoundedSelection, PagedConfig, any_of_group, products, visible_pages
from ...reading.selection import CAPABILITIES


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
    refresh: int = option(
        1,
        help="Tokens that a choice lasts while decoding: it is made anew where the number of keys is a multiple.",
        source="paper: 1 to 8",
        unit="tokens",
        minimum=1,
    )
    heads: Literal["kv", "query"] = option(
        "query",
        help="What is chosen for: every kv head, whatever any of its query heads wants most, or every query head.",
        source="paper",
        choices=("kv", "query"),
    )
    prefill: Literal["dense", "selected"] = option(
        "selected",
        help="Calls of several tokens: dense, or every token chooses for itself.",
        source="paper",
        choices=("dense", "selected"),
    )
    dense_layers: int = option(3, help="First layers that stay dense.", source="paper", unit="layers", minimum=0)

    @property
    def looks_ahead(self) -> bool:
        return self.budget is not None and (super().looks_ahead or self.refresh > 1)


class HiP(BoundedSelection):
    """Attention to the pages that are left when parts of the text are halved again and again, the best half of which
    stays.

    A part is judged by the page in its middle alone.
    """

    config_class = HiPConfig
    config: HiPConfig

    def select(self, call: AttentionCall) -> torch.Tensor | Places | None:
        self.check(call)
        config = self.config
        if config.budget is None or self.is_dense(call) or call.mask.columns <= config.budget:
            return None
        count = -(-config.budget // config.page)
        return self.lasting(
            call,
            lambda: self._chosen(call, count),
            page=config.page,
            count=count,
            heads=config.heads,
            every=config.refresh,
        )

    def _chosen(self, call: AttentionCall, count: int) -> torch.Tensor:
        """bool `(B, Hkv or H, Tq, P)`: each query's own page, and `count - 1` of those before it."""
        visible, own = visible_pages(call.mask, self.config.page)
        if self.config.heads == "kv":
            visible, own = (any_of_group(pages, call.key.shape[1]) for pages in (visible, own))
        shape = (len(call.query), call.query.shape[1] if self.config.heads == "query" else call.key.shape[1])
        visible, own = (pages.expand(*shape, -1, -1) for pages in (visible, own))
        if count == 1:
            return own
        # of a query that sees nothing there is no part
        first, end = (pages.to(torch.uint8).argmax(dim=-1) for pages in (visible, own))
        with torch.no_grad():
            pages = descended(first, end, visible.shape[-1], count - 1, self._scorer(call))
        return (pages | own) & visible

    def _scorer(self, call: AttentionCall) -> Callable[[torch.Tensor], torch.Tensor]:
        """What scores pages `(B, Hkv or H, Tq, n)` by their numbers: the highest product of a visible key."""
        page, groups, keys = self.config.page, call.key.shape[1], call.key.shape[2]
        hidden = ~call.mask.seen()
        if call.query.shape[2] > 1:
            logits = products(call.query, call.key).masked_fill(hidden, float("-inf"))
            whole = F.pad(logits, (0, -keys % page), value=float("-inf")).unflatten(-1, (-1, page)).amax(dim=-1)
            if self.config.heads == "kv":
                whole = whole.unflatten(1, (groups, -1)).amax(dim=2)
            return lambda pages: whole.gather(-1, pages)
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


def descended(
    first: torch.Tensor, end: torch.Tensor, pages: int, count: int, score: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The pages of each query that are left of those from `first` to `end`: bool `(B, h, Tq, P)`, `count` at most.

    They are cut into as many parts as even as can be. Each part of several pages is halved, the first half being the
    longer one, and of all those the `count` stay whose middle page scores highest, of equal ones the first, until no
    part is longer than one page.

    Args:
        first: `(B, h, Tq)` the first page.
        end: likewise, behind the last one.
        pages: P.
        count: how many.
        score: of pages `(B, h, Tq, n)` their scores.
    """
    part = torch.arange(count + 1, device=first.device)
    borders = first[..., None] + torch.div((end - first).clamp(min=0)[..., None] * part, count, rounding_mode="floor")
    start, stop = borders[..., :-1], borders[..., 1:]
    for _ in range((-(-pages // count) - 1).bit_length()):
        middle = (start + stop + 1) // 2
        starts = torch.stack([start, middle], dim=-1).flatten(-2)
        stops = torch.stack([middle, stop], dim=-1).flatten(-2)
        scores = score(((starts + stops) // 2).clamp(max=pages - 1)).masked_fill(starts >= stops, float("-inf"))
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values
        start, stop = starts.gather(-1, best), stops.gather(-1, best)
    found = torch.zeros(*start.shape[:-1], pages + 1, dtype=torch.bool, device=start.device)
    return found.scatter(-1, torch.where(start < stop, start, pages), True)[..., :pages]


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
            {"budget": 3, "page": 1, "dense_layers": 0},
            {"budget": 3, "page": 1, "heads": "kv", "dense_layers": 0},
        ),
    )
)
