"""Pages of keys: what is known of each, which ones queries see, and those that are best for a query.

Page p is the keys from `p * page` on, by their columns, so that a page stays what it is as a kv cache grows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..core.call import AttentionCall
from ..core.chain import window_of
from ..core.keeping import of_query_heads
from ..core.mask import Mask
from ..core.places import Places
from ..core.settings import option
from ..core.sites import AttentionSite
from ..core.variant import VariantConfig
from .selection import SelectionVariant, plain_own


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


class PagedSelection(SelectionVariant):
    """A variant whose settings are a `PagedConfig`; facts of pages are remembered under the name `pages`."""

    config: PagedConfig
    keeps_state = True

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        config, causal = super().fit(config, model, sites)
        whole = [site for site in causal if window_of(model.get_submodule(site.name)) is None]
        if not whole:
            raise NotImplementedError(
                f"{cls.__name__} reads keys by pages and leaves out layers with a sliding window, whose kv cache lets "
                "go of keys: no other one is among the chosen attention modules."
            )
        return config, whole

    @property
    def is_identity(self) -> bool:
        return self.site.layer_index < self.config.dense_layers

    def check(self, call: AttentionCall) -> None:
        """To be asked in every call: NotImplementedError if the keys have no lasting place.

        A kv cache is told of the variant here; it is refused if it was filled without.
        """
        call.context.sequence_state(self.owner)
        if call.mask.index is not None or call.mask.dropped or call.mask.extra:
            raise NotImplementedError(
                f"{self.owner} reads keys by pages, and in {self.site.name} the kv cache lets go of some, or keys come "
                "in front of the others: use it without the variant that drops or adds keys."
            )

    @property
    def owner(self) -> str:
        """Name for messages, and of what is remembered."""
        return type(self).__name__

    def is_dense(self, call: AttentionCall) -> bool:
        """Whether the settings leave this call as it is."""
        return self.config.prefill == "dense" and not call.decodes

    def by_bounds(self, call: AttentionCall, budget: int | None) -> torch.Tensor | Places | None:
        """Each query's own page, and the visible ones with the highest bounds, `ceil(budget / page)` in all.

        As `select` gives them; all where so many keys are there at most.
        """
        if budget is None or call.mask.columns <= budget:
            return None
        page, count = self.config.page, -(-budget // self.config.page)
        pages = self._best(call, count)
        if call.query.shape[2] == 1 and self.config.heads == "kv":
            return Places(*chosen_first(pages[:, :, 0], count), block=page)
        by_head = of_query_heads(pages, call.query.shape[1])
        return by_head.repeat_interleave(page, dim=-1)[..., : call.key.shape[2]]

    def _best(self, call: AttentionCall, count: int) -> torch.Tensor:
        """bool `(B, Hkv or H, Tq, P)`: pages that are chosen among the P = ceil(Tk / page)."""
        page, keys = self.config.page, call.key
        state, facts = call.context.sequence_state(self.owner), None
        if state is not None and state.grows:
            facts = state.blocks("pages", page, keys, partial(ends_of_pages, page=page))
        if facts is None:  # in a static cache, and without one, they are made anew
            facts = ends_of_pages(keys[:, :, : keys.shape[2] // page * page], page)
        visible, own = visible_pages(call.mask, page)
        bounds = upper_bounds(call.query, facts)
        scores = F.pad(bounds, (0, visible.shape[-1] - bounds.shape[-1]))  # an incomplete page is an own or hidden one
        if self.config.heads == "kv":
            groups = keys.shape[1]
            scores = scores.masked_fill(~visible, float("-inf")).unflatten(1, (groups, -1)).amax(dim=2)
            visible, own = (any_of_group(pages, groups) for pages in (visible, own))
        scores = scores.masked_fill(~visible, float("-inf")).masked_fill(own, float("inf"))
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & visible


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
    wide = torch.promote_types(query.dtype, torch.float32)
    halves = torch.cat([query.clamp(min=0), query.clamp(max=0)], dim=-1).to(wide)
    grouped = halves.reshape(len(query), ends.shape[1], -1, halves.shape[-1])
    return (grouped @ ends.to(wide).mT).view(*query.shape[:3], -1)


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
