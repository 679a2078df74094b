"""Toy variants that write a kv cache: one drops keys, one reads some pages of them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import patchattn
from patchattn.core.places import Places
from patchattn.core.registry import temporarily_registered
from patchattn_kernels import sink_and_recent

BLOCK = 3


@dataclass(frozen=True, kw_only=True)
class ForgetConfig(patchattn.VariantConfig):
    sinks: int = patchattn.option(2, help="First keys that every row sees.", source="ours")
    recent: int = patchattn.option(4, help="Last keys that rows of the first kv head see.", source="ours")
    more: int = patchattn.option(2, help="So many more are seen in every further kv head.", source="ours")
    drops: bool = patchattn.option(True, help="Drop what no later row sees; otherwise it is hidden.", source="ours")
    slack: int = patchattn.option(4, help="Tokens that can be taken back.", source="ours")


class Forget(patchattn.Variant):
    """The first keys and the last ones, of which every kv head sees another number."""

    config_class = ForgetConfig
    keeps_state = True
    owner = "forget"

    def attend(self, call: Any, inner: Any) -> Any:
        config, heads, groups = self.config, call.query.shape[1], call.key.shape[1]
        recent = [config.recent + config.more * group for group in range(groups)]
        of_heads = [recent[head * groups // heads] for head in range(heads)]
        output = inner(call.seeing(sink_and_recent(config.sinks, of_heads, heads)))
        if config.drops:
            order, newest = call.mask.key_order(), call.mask.row_order()[:, -1:, None]
            near = newest - config.slack - order < torch.tensor(recent)[:, None] - 1  # of the next row, so long ago
            kept = call.mask.real_keys() & ((order <= config.sinks) | near)
            kept = kept.expand(len(call.key), groups, -1)
            bound = config.sinks + max(recent) - 1 + config.slack
            call.context.keep(self.owner, kept, bound=bound, slack=config.slack, since=config.slack)
        return output


class ForgetToo(Forget):
    owner = "forget_too"


class Apart(Forget):
    """The first kv head sees and keeps the first keys and the last ones, all others see and keep everything."""

    owner = "apart"

    def attend(self, call: Any, inner: Any) -> Any:
        heads, groups = call.query.shape[1], call.key.shape[1]
        whole = heads == self.site.query_heads
        if not whole and not call.context.is_apart:
            return inner(call)
        few, config = heads // groups if whole else heads, self.config
        recent = [config.recent] * few + [None] * (heads - few)
        output = inner(call.seeing(sink_and_recent(config.sinks, recent, heads)))
        if whole:
            call.context.set_apart(self.owner, [0])
        else:
            near = call.mask.row_order()[:, -1:, None] - call.mask.key_order() < config.recent - 1
            kept = call.mask.real_keys() & ((call.mask.key_order() <= config.sinks) | near)
            kept = kept.expand(len(call.key), -1, -1)
            call.context.keep(self.owner, kept, bound=config.sinks + config.recent - 1, slack=config.slack)
        return output


class Select(patchattn.Variant):
    """Of the pages before a row's own, those in which some key is positive in its first number, in each kv head."""

    config_class = patchattn.VariantConfig
    keeps_state = True

    def attend(self, call: Any, inner: Any) -> Any:
        rows, keys = call.query.shape[2], call.key.shape[2]
        state = call.context.sequence_state("select")
        if state is None:  # by the definition, key by key
            chosen = torch.zeros(*call.key.shape[:2], keys)
            for place in torch.cartesian_prod(*(torch.arange(size) for size in chosen.shape)).tolist():
                batch, head, key = place
                page = range(key // BLOCK * BLOCK, min(keys, key // BLOCK * BLOCK + BLOCK))
                chosen[batch, head, key] = any(call.key[batch, head, other, 0] > 0 for other in page)
        else:
            pages = state.blocks(
                "best", BLOCK, call.key, lambda part, _: part[..., 0].unflatten(2, (-1, BLOCK)).amax(-1)
            )
            pages = call.key.new_zeros(*call.key.shape[:2], 0) if pages is None else pages
            chosen = (pages > 0).repeat_interleave(BLOCK, dim=2)
            chosen = torch.nn.functional.pad(chosen, (0, keys - chosen.shape[2]))
        key_page, row_page = torch.arange(keys) // BLOCK, torch.arange(keys - rows, keys) // BLOCK
        keep = chosen.bool()[:, :, None] | (key_page == row_page[:, None])
        if not call.decodes:
            return inner(call.seeing(keep.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)))
        keep = keep[:, :, 0]
        places = keep.long().argsort(dim=-1, stable=True)[..., keys - int(keep.sum(-1).max()) :]
        places = places.masked_fill(~keep.gather(-1, places), -1)
        return inner(call.at(Places(places, has_empty=True)))


@contextmanager
def registered() -> Iterator[None]:
    words = {"title": "", "summary": "", "extra_parameters": "", "arxiv_id": None, "year": 2026}
    with ExitStack() as stack:
        for name, variant in (("forget", Forget), ("forget_too", ForgetToo), ("apart", Apart), ("select", Select)):
            info = patchattn.VariantInfo(name=name, variant=variant, needs_training=False, **words)
            stack.enter_context(temporarily_registered(info))
        yield
