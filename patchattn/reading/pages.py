"""Pages of keys: what is known of each, which ones queries see, and those that are best for a query.

Page p is the keys from `p * page` on, by their columns, so that a page stays what it is as a kv cache grows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F

from patchattn_kernels.rows import full_precision

from ..core.call import AttentionCall
from ..core.keeping import of_query_heads
from ..core.mask import Mask
from ..core.places import Places
from ..core.settings import option
from ..core.variant import VariantConfig
from .selection import plain_own
from .whole import WholeSelection

_CHOICE, _WHEN = "choice", "when"


@dataclass(frozen=True, kw_only=True)
class PagedConfig(VariantConfig):
    """Settings of what chooses pages of keys by bounds, as Quest does."""

    budget: int | None = option(
        1024,
        help="Keys that a token reads, rounded up to whole pages, its own page among them. None: all.",
        source="paper: 512 to 4096",
        unit="keys",
        minimum=1,
    )
    page: int = option(16, help="Keys of a page.", source="paper", unit="keys", minimum=1)
    heads: Literal["kv", "query"] = option(
        "kv",
        help="What is chosen for: every kv head, whatever any of its query heads wants most, or every query head.",
        source="ours; the paper's models have one query head per kv head",
        choices=("kv", "query"),
    )
    prefill: Literal["dense", "selected"] = option(
        "dense",
        help="Calls of several tokens: dense, or every token chooses for itself.",
        source="paper",
        choices=("dense", "selected"),
    )
    dense_layers: int = option(2, help="First layers that stay dense.", source="paper", unit="layers", minimum=0)

    @property
    def looks_ahead(self) -> bool:
        """Whether a token reads all keys depends on whether it comes alone."""
        return self.prefill == "dense"


class PagedSelection(WholeSelection):
    """A variant that chooses pages of keys; what it knows of complete ones lives with the kv cache."""

    @property
    def keeps_state(self) -> bool:
        return True

    def check(self, call: AttentionCall) -> None:
        """As `WholeSelection.check`; a kv cache is told of the variant here, and refused if it was filled without."""
        state = call.context.sequence_state(self.owner)
        if state is not None and not call.decodes:
            state.tensors.pop(_CHOICE, None)  # what a choice was made by may have been taken back before this call
        super().check(call)

    def facts(
        self, call: AttentionCall, name: str, page: int, make: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """`(B, Hkv, P, ...)` what is known of the P = Tk // page complete pages, made once where the kv cache grows.

        Args:
            call: the call.
            name: of these facts.
            page: keys of a page.
            make: of `(B, Hkv, p * page, D)`, the keys of the last p complete pages, their facts `(B, Hkv, p, ...)`.
        """
        state, facts, keys = call.context.sequence_state(self.owner), None, call.key
        if state is not None and state.grows:
            facts = state.blocks(name, page, keys, make)
        # in a static cache, and without one, they are made anew
        return make(keys[:, :, : keys.shape[2] // page * page]) if facts is None else facts

    def chosen(
        self, call: AttentionCall, scores: torch.Tensor, *, page: int, count: int, heads: str
    ) -> torch.Tensor | Places:
        """The pages that `best_pages` finds, as `select` gives them."""
        return self.of_pages(call, self.best_pages(call, scores, page, count, heads), page, heads, most=count)

    def lasting(
        self,
        call: AttentionCall,
        choose: Callable[[], torch.Tensor],
        *,
        page: int,
        count: int,
        heads: str,
        every: int,
    ) -> torch.Tensor | Places:
        """Pages as `select` gives them; a choice of decoding tokens lasts until the keys are a multiple of `every`.

        Pages that were begun since are read as well. In a static cache, and without one, each token chooses for itself.

        Args:
            call: the call.
            choose: gives bool `(B, Hkv or H, Tq, P)`, no more than `count` pages for each.
            page: keys of a page.
            count: how many pages.
            heads: "query" or "kv", what is chosen for.
            every: how many tokens.
        """
        state, columns = call.context.sequence_state(self.owner), call.mask.columns
        lasts = state is not None and state.grows and every > 1 and call.decodes
        if lasts and state is not None and _CHOICE in state.tensors:
            # the number of keys is remembered as a size, which the host knows without asking the device
            known, when = state.tensors[_CHOICE], state.tensors[_WHEN].shape[1]
            if when < columns and when // every == columns // every:
                since = -(-columns // page) - known.shape[-1]
                visible = visible_pages(call.mask, page)[0]
                visible = visible if heads == "query" else any_of_group(visible, call.key.shape[1])
                pages = F.pad(known, (0, since), value=True)[:, :, None] & visible
                return self.of_pages(call, pages, page, heads, most=min(count + since, pages.shape[-1]))
        pages = choose()
        if lasts and state is not None:
            state.write(_CHOICE, pages[:, :, 0].expand(len(call.query), -1, -1))
            state.write(_WHEN, pages.new_empty(len(call.query), columns, 0))
        return self.of_pages(call, pages, page, heads, most=count)

    def best_pages(self, call: AttentionCall, scores: torch.Tensor, page: int, count: int, heads: str) -> torch.Tensor:
        """Each query's own page, and the visible ones that score highest, `count` in all; of equal ones the first.

        Args:
            call: the call.
            scores: `(B, H, Tq, P)` of complete pages, the higher the better.
            page: keys of a page.
            count: how many.
            heads: "query", or "kv": the highest score among the query heads of a kv head counts.

        Returns:
            bool `(B, Hkv or H, Tq, ceil(Tk / page))`.
        """
        visible, own = visible_pages(call.mask, page)
        scores = F.pad(scores, (0, visible.shape[-1] - scores.shape[-1]))  # an incomplete page is an own or hidden one
        if heads == "kv":
            groups = call.key.shape[1]
            scores = scores.masked_fill(~visible, float("-inf")).unflatten(1, (groups, -1)).amax(dim=2)
            visible, own = (any_of_group(pages, groups) for pages in (visible, own))
        return top_pages(scores, visible, own, count)

    def of_pages(
        self, call: AttentionCall, pages: torch.Tensor, page: int, heads: str, *, most: int
    ) -> torch.Tensor | Places:
        """What `select` gives, of pages `(B, Hkv or H, Tq, P)` bool, no more than `most` for each."""
        if call.query.shape[2] == 1 and heads == "kv":
            return Places(*chosen_first(pages[:, :, 0], most), block=page)
        by_head = of_query_heads(pages, call.query.shape[1])
        return by_head.repeat_interleave(page, dim=-1)[..., : call.key.shape[2]]


class BoundedSelection(PagedSelection):
    """A variant whose settings are a `PagedConfig`."""

    config: PagedConfig

    @property
    def reads_all(self) -> bool:
        """Whether the settings leave no key out in any layer."""
        return self.config.budget is None

    @property
    def is_identity(self) -> bool:
        return self.reads_all or self.site.layer_index < self.config.dense_layers

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"budget": None}

    def is_dense(self, call: AttentionCall) -> bool:
        """Whether the settings leave this call as it is."""
        return self.config.prefill == "dense" and not call.decodes

    def by_bounds(self, call: AttentionCall, budget: int | None) -> torch.Tensor | Places | None:
        """Each query's own page, and the visible ones with the highest bounds, `ceil(budget / page)` in all.

        As `select` gives them; all where so many keys are there at most.
        """
        if budget is None or call.mask.columns <= budget:
            return None
        page = self.config.page
        facts = self.facts(call, "pages", page, partial(ends_of_pages, page=page))
        bounds = upper_bounds(call.query, facts)
        return self.chosen(call, bounds, page=page, count=-(-budget // page), heads=self.config.heads)


def ends_of_pages(keys: torch.Tensor, page: int) -> torch.Tensor:
    """`(B, Hkv, P, 2D)` the greatest and the least entries among each page's keys, of keys `(B, Hkv, P * page, D)`."""
    batch, groups, _, dim = keys.shape
    least, greatest = keys.view(batch, groups, -1, page, dim).aminmax(dim=3)
    return torch.cat([greatest, least], dim=-1)


def upper_bounds(query: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`(B, H, Tq, P)` that no product of a query with a key of the page exceeds: Quest, section 3.3.

    A query's positive entries meet the greatest of the keys, its negative ones the least.

    Args:
        query: `(B, H, Tq, D)`.
        ends: `(B, Hkv, P, 2D)`, as `ends_of_pages` gives them.
    """
    return products(torch.cat([query.clamp(min=0), query.clamp(max=0)], dim=-1), ends)


def products(query: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """`(B, H, Tq, P)` products of queries `(B, H, Tq, D)` with a vector of every page `(B, Hkv, P, D)`, in float32 at
    least."""
    query, facts = full_precision(query), full_precision(facts)
    grouped = query.reshape(len(query), facts.shape[1], -1, query.shape[-1])
    return (grouped @ facts.mT).view(*query.shape[:3], -1)


def visible_pages(mask: Mask, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pages have a key that a query sees, and which is the query's own, that of the last such key.

    Returns:
        Twice bool `(B or 1, 1 or H, Tq, ceil(Tk / page))`. A query that sees nothing has no page of its own.
    """
    number = torch.arange(-(-mask.keys // page), device=mask.device)
    first = plain_own(mask)
    if first is not None:
        own = (torch.arange(mask.queries, device=mask.device) + first)[None, None, :, None] // page
        return number <= own, number == own
    seen = F.pad(mask.seen(), (0, len(number) * page - mask.keys)).unflatten(-1, (-1, page)).any(dim=-1)
    last = torch.where(seen, number, -1).amax(dim=-1, keepdim=True)
    return seen, number == last


def top_pages(scores: torch.Tensor, visible: torch.Tensor, forced: torch.Tensor, count: int) -> torch.Tensor:
    """bool, as scores `(B, h, Tq, P)`: the forced pages and the best visible ones, `count` in all; of equal ones the
    first.

    Args:
        scores: the higher the better.
        visible: bool, broadcast to them: no other page is chosen.
        forced: likewise: pages that are chosen first, no more than `count`.
        count: how many.
    """
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(forced & visible, float("inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & visible


def ends_of_text(visible: torch.Tensor, own: torch.Tensor, first: int, local: int) -> torch.Tensor:
    """bool, as `visible_pages` gives them: each query's first visible pages, and the last ones up to its own.

    Args:
        visible: which pages a query sees.
        own: which is its own.
        first: how many first pages.
        local: how many last ones, its own among them.
    """
    order = visible.cumsum(dim=-1, dtype=torch.int32)
    number = torch.arange(own.shape[-1], device=own.device)
    last = torch.where(own, number, -1).amax(dim=-1, keepdim=True)
    return visible & ((order <= first) | ((number > last - local) & (number <= last)))


def any_of_group(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """`(B, 1 or Hkv, ...)` whether it is so in any query head of a kv head, of bool `(B, 1 or H, ...)`."""
    return tensor if tensor.shape[1] == 1 else tensor.unflatten(1, (groups, -1)).any(dim=2)


def chosen_first(chosen: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers `(..., most)` of those that are chosen among `(..., N)`, then of others, and how many are chosen `(...)`.

    Args:
        chosen: bool.
        most: that no more are chosen.
    """
    order = chosen.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    return order[..., :most], chosen.sum(dim=-1)
