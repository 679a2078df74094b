"""Variants that choose pages of keys by what is known of each: their settings, and what becomes of a choice."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..cache.state import Make
from ..core.call import AttentionCall
from ..core.keeping import of_query_heads
from ..core.places import Places
from ..core.settings import option
from ..core.variant import VariantConfig
from .choose import highest, highest_and_last
from .forced import visible_pages
from .groups import any_of_group, heads_option, read_by_one, reduced
from .index import counted_keys, ends_of_pages, page_facts
from .refresh import forget_choice, is_due, last_choice, remember_choice
from .scores import by_sign, highest_products, products
from .selection import plain_own
from .whole import WholeSelection


def prefill_option(default: Literal["dense", "selected"]) -> Any:
    """The setting that says what calls of several tokens do."""
    return option(
        default,
        help="Calls of several tokens: dense, or every token chooses for itself.",
        source="paper",
        choices=("dense", "selected"),
    )


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
    heads: Literal["kv", "query"] = heads_option(
        "kv", source="ours; the paper's models have one query head per kv head"
    )
    prefill: Literal["dense", "selected"] = prefill_option("dense")
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

    @property
    def needs_groups(self) -> bool:
        return getattr(self.config, "heads", "kv") == "kv"

    def check(self, call: AttentionCall) -> None:
        """As `WholeSelection.check`; a kv cache is told of the variant here, and refused if it was filled without."""
        state = call.context.sequence_state(self.owner)
        if state is not None:
            state.begin_call()
        if not call.decodes:
            forget_choice(state)
        super().check(call)

    def facts(self, call: AttentionCall, name: str, page: int, make: Make) -> torch.Tensor:
        """`(B, Hkv, P, ...)` what is known of the complete pages of a call, as `index.page_facts` has it."""
        return page_facts(call, call.context.sequence_state(self.owner), name, page, make)

    def ends(self, call: AttentionCall, name: str, page: int, *, within: int) -> torch.Tensor:
        """`(B, Hkv, P, 2D)` the greatest and the least entries of those keys of each complete page that count.

        Args:
            call: the call.
            name: of these facts.
            page: keys of a page.
            within: keys of the pages that are read, a multiple of `page`.
        """

        def make(keys: torch.Tensor, part: slice | torch.Tensor) -> torch.Tensor:
            return ends_of_pages(keys, page, counted_keys(call.mask, within, part))

        return self.facts(call, name, page, make)

    def chosen(
        self, call: AttentionCall, query: torch.Tensor, facts: torch.Tensor, *, page: int, count: int, heads: str
    ) -> torch.Tensor | Places:
        """Each query's own page, and the visible ones that score highest, `count` in all, as `select` gives them.

        Args:
            call: the call.
            query: `(B, H, Tq, E)` what is known of each query.
            facts: `(B, Hkv, P, E)` what is known of each complete page: its products with the queries are its scores.
            page: keys of a page.
            count: how many.
            heads: "query", or "kv": the highest score among the query heads of a kv head counts.
        """
        if heads == "kv" and sees_all(call):
            own = (call.key.shape[2] - 1) // page
            return Places(highest_and_last(highest_products(query, facts), own, count), block=page)
        return self.of_pages(call, self.best_pages(call, products(query, facts), page, count, heads), page, most=count)

    def lasting(
        self, call: AttentionCall, choose: Callable[[], torch.Tensor], *, page: int, count: int, every: int
    ) -> torch.Tensor | Places:
        """Pages as `select` gives them; a choice of decoding tokens lasts until the keys are a multiple of `every`.

        Pages that were begun since are read as well. In a static cache, and without one, each token chooses for itself.

        Args:
            call: the call.
            choose: gives bool `(B, Hkv or H, Tq, P)`, no more than `count` pages for each.
            page: keys of a page.
            count: how many pages.
            every: how many tokens.
        """
        state, columns = call.context.sequence_state(self.owner), call.mask.columns
        if state is None or not state.grows or every == 1 or not call.decodes:
            return self.of_pages(call, choose(), page, most=count)
        last = last_choice(state, columns)
        if last is None or is_due(columns, last.columns, every):
            pages = choose()
            remember_choice(state, pages[:, :, 0].expand(len(call.query), -1, -1), columns)
            return self.of_pages(call, pages, page, most=count)
        known, visible = last.chosen, visible_pages(call.mask, page)[0]
        if known.shape[1] != call.query.shape[1]:
            visible = any_of_group(visible, call.key.shape[1])
        since = visible.shape[-1] - known.shape[-1]
        pages = F.pad(known, (0, since), value=True)[:, :, None] & visible
        return self.of_pages(call, pages, page, most=min(count + since, pages.shape[-1]))

    def best_pages(self, call: AttentionCall, scores: torch.Tensor, page: int, count: int, heads: str) -> torch.Tensor:
        """The pages of `chosen`, bool `(B, Hkv or H, Tq, ceil(Tk / page))`, by scores `(B, H, Tq, P)`."""
        visible, own = visible_pages(call.mask, page)
        scores = F.pad(scores, (0, visible.shape[-1] - scores.shape[-1]))  # an incomplete page is an own or hidden one
        if heads == "kv":
            groups = call.key.shape[1]
            scores = reduced(scores.masked_fill(~visible, float("-inf")), groups, "max")
            visible, own = (any_of_group(pages, groups) for pages in (visible, own))
        return highest(scores, visible, own, count)

    def of_pages(self, call: AttentionCall, pages: torch.Tensor, page: int, *, most: int) -> torch.Tensor | Places:
        """What `select` gives, of pages `(B, Hkv or H, Tq, P)` bool, no more than `most` for each."""
        if call.query.shape[2] == 1:
            return read_by_one(call, pages[:, :, 0], most=most, block=page)
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
        return self.reads_all  # a dense layer still appends to its kv cache in place

    @property
    def is_dense_layer(self) -> bool:
        """Whether this is one of the first layers, which stay dense."""
        return self.site.layer_index < self.config.dense_layers

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"budget": None}

    def is_dense(self, call: AttentionCall) -> bool:
        """Whether the settings leave this call as it is; to be asked in every call. As `check` says, it may refuse."""
        if self.is_dense_layer:
            return True
        self.check(call)
        return self.config.prefill == "dense" and not call.decodes

    def by_bounds(self, call: AttentionCall, budget: int | None) -> torch.Tensor | Places | None:
        """Each query's own page, and the visible ones with the highest bounds, `ceil(budget / page)` in all.

        As `select` gives them; all where so many keys are there at most.
        """
        if budget is None or call.mask.columns <= budget:
            return None
        page = self.config.page
        ends, count = self.ends(call, "pages", page, within=page), -(-budget // page)
        return self.chosen(call, by_sign(call.query), ends, page=page, count=count, heads=self.config.heads)


def sees_all(call: AttentionCall) -> bool:
    """Whether the call is of one query, which sees every key, the last of which is its own: known from structure."""
    return call.query.shape[2] == 1 and plain_own(call.mask) == call.mask.keys - 1
