"""What methods must beat: pages that are read, and keys that are kept, at random."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from patchattn.cache.state import SequenceState
from patchattn.core.call import AttentionCall
from patchattn.core.places import Places
from patchattn.core.registry import temporarily_registered
from patchattn.core.variant import VariantInfo
from patchattn.reading import eviction, selection
from patchattn.reading.draws import uniform
from patchattn.reading.eviction import ScoredConfig, ScoredEviction
from patchattn.reading.pages import BoundedSelection, PagedConfig
from patchattn.reading.whole import WholeSelection

LAST = 32  # keys, as many as SnapKV keeps anyhow


@dataclass(frozen=True, kw_only=True)
class RandomPagesConfig(PagedConfig):
    """Settings of random pages."""


class RandomPages(BoundedSelection):
    """Attention to a token's own page and to others drawn anew for every token, kv head and layer."""

    config_class = RandomPagesConfig
    keeps_state = False

    def check(self, call: AttentionCall) -> None:
        WholeSelection.check(self, call)

    def select(self, call: AttentionCall) -> torch.Tensor | Places | None:
        budget, page = self.config.budget, self.config.page
        if self.is_dense(call) or budget is None or call.mask.columns <= budget:
            return None
        heads, count = call.query.shape[1], call.key.shape[2] // page
        row = (call.mask.row_places()[0, :, None] - 1) * heads + torch.arange(heads, device=call.mask.device)
        number = row.T[:, :, None] * count + torch.arange(count, device=call.mask.device)
        scores = uniform(number, 0, self.site.layer_index).expand(len(call.query), -1, -1, -1)
        most = -(-budget // page)
        return self.of_pages(call, self.best_pages(call, scores, page, most, self.config.heads), page, most=most)


class RandomKeys(ScoredEviction):
    """Keeps keys that are drawn, and the last ones."""

    config_class = ScoredConfig
    name: ClassVar[str] = "random_keys"
    default_budget = 2048

    def window(self) -> int:
        return 1

    def last(self, counts: torch.Tensor) -> torch.Tensor:
        return counts.clamp(max=LAST)

    def scores(self, call: AttentionCall, state: SequenceState) -> torch.Tensor:
        shape = call.key.shape[1:3]
        number = torch.arange(shape.numel(), device=call.key.device).view(shape)
        return uniform(number, 0, self.site.layer_index).float().expand(len(call.key), -1, -1)


_NO_PAPER = {"arxiv_id": None, "year": 0, "extra_parameters": "none", "needs_training": False}
BASELINES = (
    VariantInfo(
        name="random_pages",
        variant=RandomPages,
        title="Random pages",
        summary="A decoding token reads random pages.",
        capabilities=selection.CAPABILITIES,
        **_NO_PAPER,
    ),
    VariantInfo(
        name="random_keys",
        variant=RandomKeys,
        title="Random keys",
        summary="The kv cache keeps random keys.",
        looks_ahead=True,
        capabilities=eviction.CAPABILITIES,
        **_NO_PAPER,
    ),
)


@contextmanager
def baselines() -> Iterator[None]:
    """Both can be patched."""
    with ExitStack() as stack:
        for info in BASELINES:
            stack.enter_context(temporarily_registered(info))
        yield
