"""Variants that read some of the keys that a query sees; the kv cache keeps all."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
from torch import nn

from patchattn_kernels import BlockLists, SinkAndRecent, block_sparse_attention, selected_attention
from patchattn_kernels.key_mask import unsupported

from ..cache import waiting
from ..core.call import AttentionCall
from ..core.keeping import of_query_heads
from ..core.mask import Keep, Mask
from ..core.places import Places, of_places
from ..core.selection import require_causal
from ..core.sites import AttentionSite
from ..core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, Variant
from ..softmax.biases import attend_biased
from ..softmax.merging import merged

# What selectors are for: their rules say what a token reads of those before it.
CAPABILITIES: frozenset[str] = ALL_CAPABILITIES - {"bidirectional", "cross"}
# On a CPU, blocks that are left out save time from about so many keys on.
_PAYS_FROM = 768


class Split(NamedTuple):
    """What queries read of a call that is one causal text, whole and without padding (`plain_own`).

    Attributes:
        at: the first query that reads all keys it sees; so do those after it.
        first: what the queries before it read.
    """

    at: int
    first: SinkAndRecent


class SelectionVariant(Variant):
    """A variant that says which keys are read: a subclass gives `config_class` and `select`.

    What is chosen is attended to exactly, be it by an operation that reads nothing else or, where there is none for the
    call, under a mask: the result is the same, and a mask saves no time. It acts in causal self-attention; the other
    modules of a model are left out when it is patched. A variant that remembers something of every key cannot come
    after it.

    Reports `density` `(B or 1, Tq)`, with heads `(B or 1, Tq, H)` where they differ: keys read over keys seen.
    """

    def select(self, call: AttentionCall) -> Keep | Places | Split | None:
        """Which of the keys that queries see are read.

        Args:
            call: the call.

        Returns:
            bool `(B or 1, 1 or Hkv or H, Tk)` or `(B or 1, 1 or H, Tq or 1, Tk)`; sinks and recent keys; blocks of
            keys; places, of calls whose few queries all read the same; a split; or `None`: all, known from shapes and
            settings alone. The call is then the base's, bit for bit.
        """
        raise NotImplementedError(f"{type(self).__name__} must define select(call).")

    def finish(self, call: AttentionCall, attended: AttentionOutput, inner: Attend) -> AttentionOutput:
        """What is made of attention to the chosen keys; by default it itself.

        A variant that adds further branches to it is registered as `innermost`.

        Args:
            call: the call.
            attended: output and weights of attention to what was chosen, as `attend` gives them.
            inner: what computes.
        """
        return attended

    def key_bias(self, call: AttentionCall) -> torch.Tensor | None:
        """What is added to the logits of keys, beside the choice; nothing by default.

        A variant that says so is registered as `innermost`; and, unless it is by query, without `softcap`, as a
        `KeyBiasVariant` is.

        Args:
            call: the call.

        Returns:
            `(B or 1, Hkv or H, Tk)` float32 or wider, not scaled; `(B or 1, Hkv or H, Tq, Tk)`, by query; or `None`.
        """
        return None

    @property
    def batches_continuously(self) -> bool:
        """Budgets and prefills are of the tokens of one call; a rule on sinks and recent keys is by text."""
        return False

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        because = "it says what tokens read of those before them"
        return config, require_causal(model, sites, by=cls.__name__, because=because)

    def forget(self, call: AttentionCall) -> None:
        """After attention: tell the kv cache which keys no later call reads; nothing by default."""

    def is_zero(self, parameter: torch.Tensor) -> bool:
        """Whether a learned parameter, which need not learn now, is known to be zero, so that a call is the base's bit
        for bit; false where the device would be waited for, and where processes hold some heads each: those of one may
        be zero, and in backward the others would wait for what it left out."""
        learns = parameter.requires_grad and torch.is_grad_enabled()
        if learns or self.site.shard is not None or waiting.waits(parameter) or torch.compiler.is_compiling():
            return False
        return not bool(parameter.any())

    @final
    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        output = self._attend(call, inner)
        self.forget(call)
        return output

    def _attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        keep = self.select(call)
        if self.observers:
            self.report(call, density=density(call, narrowed(call, keep)))
        return self.finish(call, attend_to(call, keep, inner, bias=self.key_bias(call)), inner)


def attend_to(
    call: AttentionCall, keep: Keep | Places | Split | None, inner: Attend, *, bias: torch.Tensor | None = None
) -> AttentionOutput:
    """Attention to the keys that were chosen, as `SelectionVariant.select` and `key_bias` give them."""
    if bias is not None:
        return _with_bias(call, keep, of_query_heads(bias, call.query.shape[1]), inner)
    if isinstance(keep, Places):
        return _attend_places(call, keep, inner)
    own = plain_own(call.mask) if isinstance(keep, Split) else None
    if isinstance(keep, Split) and own is not None and call.kwargs.get("position_bias") is None:
        first, rest = (_of_rows(call, own, *rows) for rows in ((0, keep.at), (keep.at, call.mask.queries)))
        if skips(first, keep.first):
            return torch.cat([skipping(first, keep.first), inner(rest)[0]], dim=1), None
    if isinstance(keep, SinkAndRecent | BlockLists) and skips(call, keep):
        return skipping(call, keep), None
    return _under_mask(call, keep, inner)


def _attend_places(call: AttentionCall, places: Places, inner: Attend) -> AttentionOutput:
    """What heads read together is read once on a CPU; kernels on a GPU take no mask by head."""
    on_gpu = call.query.is_cuda and places.of_heads is None
    is_less = not call.query.is_cuda and _is_worth_a_copy(places, call.key.shape[2])
    if call.stands_alone and (on_gpu or is_less):
        index, counts = places.index, places.counts
        call = call if places.of_heads is None else call.seeing(places.of_heads)
        operands = (call.query, call.key, call.value, index, counts, places.block)
        output, _ = selected_attention(*operands, call.rule())
        return output.transpose(1, 2).to(call.query.dtype), None
    return _under_mask(call, places, inner)


def plain_own(mask: Mask) -> int | None:
    """Column of the first query's own key, where every row is one causal text, whole and without padding; or `None`."""
    is_one = mask.pairs is None and mask.real_columns is None and mask.sequence is None and mask.window is None
    is_whole = mask.index is None and not mask.dropped and not mask.extra and not mask.keeps
    if not (is_one and is_whole and isinstance(mask.own, int)):
        return None
    return mask.own if mask.causal or (mask.queries == 1 and mask.own == mask.keys - 1) else None


def narrowed(call: AttentionCall, keep: Keep | Places | Split | None) -> AttentionCall:
    """The call whose queries see what was chosen and no more."""
    if isinstance(keep, Places):
        keep = keep.kept(call.key.shape[2])
    elif isinstance(keep, Split):
        first = call.seeing(keep.first).mask.seen()
        keep = first | (torch.arange(first.shape[2], device=first.device) >= keep.at)[:, None]
    return call.seeing(keep)


def _with_bias(
    call: AttentionCall, keep: Keep | Places | Split | None, bias: torch.Tensor, inner: Attend
) -> AttentionOutput:
    """Attention to what was chosen, with numbers `(B or 1, H, Tk)` or `(B or 1, H, Tq, Tk)` added to the logits."""
    if bias.dim() == 4:
        some, given = narrowed(call, keep), call.kwargs.get("position_bias")
        bias = bias.masked_fill(bias == float("-inf"), 0.0)  # of what was not chosen
        bias = bias if given is None else bias + given[..., : bias.shape[-1]]
        return merged(some.replace(kwargs={**call.kwargs, "position_bias": bias}))
    if isinstance(keep, Places) and call.stands_alone and _is_worth_a_copy(keep, call.key.shape[2]):
        index = keep.of_keys(call.key.shape[2]).index
        return attend_biased(call.at(keep), of_places(bias, index), inner)
    return attend_biased(narrowed(call, keep), bias, inner)


def _under_mask(call: AttentionCall, keep: Keep | Places | Split | None, inner: Attend) -> AttentionOutput:
    return inner(narrowed(call, keep).replace(context=replace(call.context, of_some_keys=True)))


def skipping(call: AttentionCall, keep: SinkAndRecent | BlockLists) -> torch.Tensor:
    """`(B, Tq, H, D)` by an operation that leaves out what is not kept."""
    heads = call.query.shape[1]
    if isinstance(keep, SinkAndRecent) and len(keep.sinks) == 1 < heads:
        keep = keep._replace(sinks=keep.sinks.repeat(heads), recent=keep.recent.repeat(heads))
    output = block_sparse_attention(call.query, call.key, call.value, keep, call.rule())
    return output.transpose(1, 2).to(call.query.dtype)


def _of_rows(call: AttentionCall, own: int, start: int, end: int) -> AttentionCall:
    """The call of some neighbouring queries, without keys behind the last of them; query 0's own key is key `own`."""
    keys = own + end
    mask = replace(call.mask, own=own + start, queries=end - start, keys=keys, columns=keys, given=None, changed=True)
    query, (key, value) = call.query[:, :, start:end], (tensor[:, :, :keys] for tensor in (call.key, call.value))
    return call.replace(query=query, key=key, value=value, mask=mask)


def _is_worth_a_copy(places: Places, keys: int) -> bool:
    """Whether so few keys are read that it pays to copy them, on a CPU: a copy is written, read, and written again."""
    most = places.index.shape[-1]
    if places.counts is not None and not waiting.waits(places.counts) and not torch.compiler.is_compiling():
        most = int(places.counts.max())
    return 2 * most * places.block <= keys


def density(call: AttentionCall, narrow: AttentionCall) -> torch.Tensor:
    """`(B or 1, Tq)` or `(B or 1, Tq, H)`: what of the keys that queries see is read, 1 of those that see none."""
    seen, read = call.mask.counts(), narrow.mask.counts()
    if seen.dim() != read.dim():
        seen, read = (count if count.dim() == 3 else count[..., None] for count in (seen, read))
    return torch.where(seen > 0, read / seen.clamp(min=1), 1.0)


def skips(call: AttentionCall, keep: SinkAndRecent | BlockLists) -> bool:
    """Whether an operation computes the call that reads no more than what is kept, and is the faster for it."""
    is_large = call.query.is_cuda or call.key.shape[2] >= _PAYS_FROM
    if not call.stands_alone or not is_large or (isinstance(keep, SinkAndRecent) and call.mask.index is not None):
        return False
    rule = call.rule()
    has_rows = rule.mask is not None and rule.mask.dim() == 4
    if unsupported(rule) is not None or (isinstance(keep, SinkAndRecent) and (rule.order is not None or has_rows)):
        return False
    if call.query.is_cuda:  # its kernels take whole tiles of queries and of keys
        is_tiled = isinstance(keep, SinkAndRecent) or (_is_tile(keep.block_q) and _is_tile(keep.block_k))
        return is_tiled and call.value.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return isinstance(keep, SinkAndRecent) or keep.indices.shape[1] == 1


def _is_tile(size: int) -> bool:
    return size >= 16 and size & (size - 1) == 0
