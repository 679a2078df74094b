"""Selected pages of keys on a CPU: whole pages are copied one after another, and torch's kernel attends to the copy."""

import math
import threading

import torch

from .dense_attention_cpu import flash
from .rows import AttentionRule, with_heads

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class _Memory(threading.local):
    """Memory that a thread's calls reuse: to get as much anew from the system costs more than the copy."""

    def __init__(self) -> None:
        self.flat: dict[torch.dtype, torch.Tensor] = {}

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor that is valid until the next call."""
        size = math.prod(shape)
        flat = self.flat.get(dtype)
        if flat is None or flat.numel() < size:
            with torch.inference_mode(False):  # outside of it others could not be written to
                flat = self.flat[dtype] = torch.empty(size, dtype=dtype)
        return flat[:size].view(shape)


_memory = _Memory()


def by_whole_pages(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    counts: torch.Tensor | None,
    page_size: int,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(B, H, Tq, Dv)` and log-sum-exp `(B, H, Tq)`, without a graph; arguments as of `selected_attention`."""
    batch, heads, rows, dim = query.shape
    groups, keys, width = value.shape[1:]
    group = heads // groups
    if not _hides(rule, rows, keys):
        at_once = _copied_at_once(key, value, pages, counts, page_size)
        if at_once is not None:
            grouped = query.reshape(batch, groups, -1, dim)
            output, sums = flash(grouped, *at_once, rule.scaling)
            return output.reshape(batch, heads, rows, dim), sums.reshape(batch, heads, rows)
    whole, rest = divmod(keys, page_size)
    # whole pages first, the one that the end cuts off after them: then a kv head's keys lie without a gap
    pages = pages.expand(batch, groups, -1).long()
    number = torch.tensor(pages.shape[-1]) if counts is None else counts.expand(batch, groups)
    listed = torch.arange(pages.shape[-1]) < number[..., None]
    kind = torch.where(listed & (pages >= 0) & (pages * page_size < keys), (pages == whole).long(), 2)
    kind, order = kind.sort(dim=-1, stable=True)
    pages = pages.gather(-1, order)
    full = (kind == 0).sum(dim=-1)
    lengths = full * page_size + (kind == 1).sum(dim=-1) * rest
    longest = int(lengths.max())
    lse = query.new_full((batch, heads, rows), float("-inf"), dtype=torch.promote_types(query.dtype, torch.float32))
    if longest == 0:
        return value.new_zeros(batch, heads, rows, width), lse

    # torch's kernel wants as many channels of values as of queries: zeros change neither logits nor the rest
    wide = max(dim, width)
    copies = _memory.take(query.dtype, 2, batch, groups, longest, wide)
    for copy, tensor in zip(copies, (key, value), strict=True):
        copy[..., tensor.shape[-1] :] = 0.0
        for place, (number, length) in enumerate(zip(full.flatten().tolist(), lengths.flatten().tolist(), strict=True)):
            at = divmod(place, groups)
            some, own = copy[at][..., : tensor.shape[-1]], tensor[at]
            paged = own[: whole * page_size].unflatten(0, (whole, page_size))
            end = number * page_size
            torch.index_select(paged, 0, pages[at][:number], out=some[:end].unflatten(0, (number, page_size)))
            some[end:length] = own[whole * page_size :][: length - end]
            some[length:] = 0.0

    inside = torch.arange(longest) < lengths[..., None]
    places = torch.arange(longest)
    columns = pages[..., places // page_size] * page_size + places % page_size
    hidden = None
    if not bool(inside.all()) or _hides(rule, rows, keys):
        columns = columns.clamp(0, keys - 1).repeat_interleave(group, dim=1)[:, :, None].expand(-1, -1, rows, -1)
        visible = with_heads(rule.visible(slice(0, rows), (rows, keys), key.device)).expand(batch, heads, rows, keys)
        visible = visible.gather(-1, columns) & inside.repeat_interleave(group, dim=1)[:, :, None]
        hidden = torch.zeros(visible.shape, dtype=lse.dtype).masked_fill_(~visible, float("-inf"))
        hidden = hidden.view(batch, groups, -1, longest)
    grouped = torch.nn.functional.pad(query, (0, wide - dim)).reshape(batch, groups, -1, wide)
    output, sums = _flash(grouped, *copies, 0.0, False, attn_mask=hidden, scale=rule.scaling)
    output, sums = output[..., :width].reshape(batch, heads, rows, width), sums.reshape(batch, heads, rows)
    if hidden is None:
        return output, sums
    blind = ~visible.any(dim=-1)
    return output.masked_fill(blind[..., None], 0.0), sums.masked_fill(blind, float("-inf"))


def _copied_at_once(
    key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, counts: torch.Tensor | None, page_size: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values `(B, G, n, D)` of the pages, where a copy of whole pages is all there is to do; else `None`.

    So it is where all kv heads read as many, the page that the end cuts off is the last one of all or in none, and
    pages lie in memory one after another: as in a cache with spare places, whose length in memory is whole pages. Keys
    and values in one piece of memory, as that cache has them, are copied at once.
    """
    batch, groups, keys, dim = key.shape
    size, (whole, rest) = page_size * dim, divmod(keys, page_size)
    count, steps = pages.shape[-1], key.stride()
    if not count or value.shape[-1] != dim or (counts is not None and int(counts.min()) < count):
        return None
    is_cut = rest > 0 and set(pages[..., -1].flatten().tolist()) == {whole}
    uncut, last = pages[..., :-1] if is_cut else pages, whole
    if uncut.numel():
        first, last = (int(number) for number in uncut.aminmax())
        if first < 0 or last >= whole:
            return None
    every = ((batch - 1) * steps[0] + (groups - 1) * steps[1]) // size + max(last, is_cut * whole) + 1
    if value.stride() != steps or not (_has_lines(key, size, every) and _has_lines(value, size, every)):
        return None
    copies = _memory.take(key.dtype, 2, batch, groups, count * page_size, dim)
    starts = torch.tensor([[[(b * steps[0] + g * steps[1]) // size] for g in range(groups)] for b in range(batch)])
    apart, left = divmod(int(value.storage_offset()) - int(key.storage_offset()), size)
    if left == 0 <= apart and value.untyped_storage().data_ptr() == key.untyped_storage().data_ptr():
        parts = [(copies, key, torch.stack([starts, starts + apart]), every + apart)]
    else:
        parts = [(copies[0], key, starts, every), (copies[1], value, starts, every)]
    for copy, tensor, begins, count_of_lines in parts:
        matrix, lines = tensor.as_strided((count_of_lines, size), (size, 1)), pages + begins
        torch.index_select(matrix, 0, lines.flatten(), out=copy.view(-1, size))
    length = (count - is_cut) * page_size + rest * is_cut
    return copies[0, :, :, :length], copies[1, :, :, :length]


def _has_lines(tensor: torch.Tensor, size: int, count: int) -> bool:
    """Whether keys or values are in as many lines of so many numbers, each head's beginning with one."""
    steps, room = tensor.stride(), tensor.untyped_storage().nbytes() // tensor.element_size()
    is_whole = steps[2:] == (tensor.shape[-1], 1) and steps[0] % size == 0 and steps[1] % size == 0
    return is_whole and tensor.storage_offset() + count * size <= room


def _hides(rule: AttentionRule, rows: int, keys: int) -> bool:
    """Whether a rule may hide keys from some query."""
    offset = keys - rows if rule.offset is None else rule.offset
    given = (rule.mask, rule.sequence, rule.window)
    return any(some is not None for some in given) or (rule.causal and offset + 1 < keys)
