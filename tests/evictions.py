"""What tests of caches that forget are made of: prompts, what attention saw in each call, one forward under that."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.core.registry import temporarily_registered

from .families import FAMILIES

LANGUAGE = r"^(?!.*vision)"  # attention modules of language models
LENGTHS = (12, 9, 7)  # of three left-padded prompts
HOW = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}


class Watch(patchattn.Variant):
    """Notes of every call which columns of which keys each query sees, and queries, keys and values."""

    config_class = patchattn.VariantConfig
    calls: list[dict[str, Any]] = []

    def attend(self, call: Any, inner: Any) -> Any:
        seen, index = call.mask.seen(), call.mask.index
        heads, columns = call.query.shape[1], call.mask.columns
        seen = seen.expand(len(call.query), heads, -1, -1)
        if index is not None:
            found = torch.zeros(*seen.shape[:3], columns, dtype=torch.int32)
            places = index.expand(len(seen), -1, -1).repeat_interleave(heads // index.shape[1], dim=1)
            places = places[:, :, None].expand(seen.shape)
            seen = found.scatter_add_(-1, places.clamp(min=0), (seen & (places >= 0)).int()) > 0
        states = {"query": call.query, "key": call.key, "value": call.value}
        self.calls.append({"layer": self.site.layer_index, "seen": seen, "index": index, **states})
        return inner(call)


class Told(patchattn.Variant):
    """Sees of the keys of one forward what it is told, by layer."""

    config_class = patchattn.VariantConfig
    seen: dict[int, torch.Tensor] = {}

    def attend(self, call: Any, inner: Any) -> Any:
        return inner(call.seeing(self.seen[self.site.layer_index]))


def allocated(layer: Any) -> int:
    """Bytes of the memory that a layer's keys and values lie in, together or apart, spare places included."""
    storages = [tensor.untyped_storage() for tensor in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@contextmanager
def registered() -> Iterator[None]:
    words = {"title": "", "summary": "", "extra_parameters": "", "arxiv_id": None, "year": 2026}
    with ExitStack() as stack:
        for name, variant in (("watch", Watch), ("told", Told)):
            info = patchattn.VariantInfo(name=name, variant=variant, needs_training=False, **words)
            stack.enter_context(temporarily_registered(info))
        yield


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `(3, 12)` of prompts, and bool which of them are text."""
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[place >= 12 - length for place in range(12)] for length in LENGTHS])
    return ids.masked_fill(~real, 0), real


def extended(real: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(real, (0, length - real.shape[1]), value=True)


def fed(model: Any, cache: Any, ids: torch.Tensor, real: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Logits of calls of these sizes, one after the other, behind what the cache has seen."""
    start, parts = cache.get_seq_length(), []
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    for size in sizes:
        given = {"attention_mask": real[:, : start + size].long(), "position_ids": positions[:, start : start + size]}
        with torch.no_grad():
            parts.append(model(ids[:, start : start + size], **given, **cache_argument(model, cache)).logits)
        start += size
    return torch.cat(parts, dim=1)


def stored(layer: Any) -> float:
    """Tokens whose keys and values would take up what a layer stores of a row, in each head on average."""
    parts = [layer] if layer.first is None else [layer, layer.first]
    numbers = sum(tensor.numel() for part in parts for tensor in (part.keys, part.values))
    token = sum(tensor[:, :, 0].numel() for tensor in (layer.keys, layer.values))
    return numbers / token


def fewest(cache: Any) -> float:
    """The smallest number of keys that a layer stores, or the part of it that is apart."""
    return min(stored(part) for layer in cache.layers for part in (layer, *(layer.apart or ())[1:]))


def watched(
    variant: str,
    settings: Any,
    ids: torch.Tensor,
    real: torch.Tensor,
    sizes: Sequence[int],
    family: str = "llama",
    layers: Sequence[int] | None = None,
) -> tuple[torch.Tensor, list[list[dict[str, Any]]], Any]:
    """Logits of calls of these sizes, what attention saw, by layer and call, and the cache afterwards."""
    model = FAMILIES[family].make_exact()
    patchattn.patch_model(model, variant, settings, layers=layers)
    patchattn.patch_model(model, "watch", layers=layers, modules=LANGUAGE)
    Watch.calls.clear()
    cache = DynamicCache(config=model.config.get_text_config())
    logits = fed(model, cache, ids, real, sizes)
    numbers = sorted({call["layer"] for call in Watch.calls})
    return logits, [[call for call in Watch.calls if call["layer"] == number] for number in numbers], cache


def seen_by_row(calls: list[dict[str, Any]]) -> torch.Tensor:
    """`(B, H, T, T)` bool: what the rows of the calls of a layer saw, over all columns."""
    total = calls[-1]["seen"].shape[-1]
    parts = [torch.nn.functional.pad(call["seen"], (0, total - call["seen"].shape[-1])) for call in calls]
    return torch.cat(parts, dim=2)


def dense(
    seen: Sequence[torch.Tensor],
    ids: torch.Tensor,
    real: torch.Tensor,
    family: str = "llama",
    layers: Sequence[int] | None = None,
) -> torch.Tensor:
    """Logits of one forward without a cache in which the rows of every layer, or of some, see just that."""
    Told.seen = dict(zip(range(len(seen)) if layers is None else layers, seen, strict=True))
    model = patchattn.patch_model(FAMILIES[family].make_exact(), "told", layers=layers, modules=LANGUAGE)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, attention_mask=real.long(), position_ids=positions, use_cache=False).logits


def kept_by_loops(scores: Sequence[float], real: Sequence[bool], count: int, last: int = 0) -> list[int]:
    """The places of the best real keys, ascending; of equal ones the first; the last ones come before all."""
    places = [place for place, each in enumerate(real) if each]
    near = places[max(0, len(places) - min(last, count)) :]
    rest = sorted((place for place in places if place not in near), key=lambda place: -scores[place])
    return sorted([*near, *rest[: max(0, count - len(near))]])


def window_scores(
    layers: list[list[dict[str, Any]]],
    real: torch.Tensor,
    *,
    window: int,
    kernel: int = 7,
    pooling: str = "max",
    group: str = "mean",
    **others: Any,
) -> list[list[list[list[float]]]]:
    """By layer, row and kv head the scores of SnapKV of a prompt's columns, written as loops; zero of padding."""
    found = []
    for calls in layers:
        states = [call for call in calls if call["query"].shape[2] > 1]
        query = torch.cat([call["query"] for call in states], dim=2)
        key = states[-1]["key"]
        of_rows = []
        for row in range(len(query)):
            places = [place for place in range(real.shape[1]) if real[row, place]]
            last = places[-window:]
            of_heads = []
            for kv_head in range(key.shape[1]):
                sums = []
                for head in (2 * kv_head, 2 * kv_head + 1):
                    total = dict.fromkeys(places, 0.0)
                    for own in last:
                        seen = [place for place in places if place <= own]
                        logits = torch.stack([query[row, head, own] @ key[row, kv_head, place] for place in seen])
                        weights = (logits * query.shape[-1] ** -0.5).softmax(0).tolist()
                        for place, weight in zip(seen, weights, strict=True):
                            total[place] += weight
                    sums.append(total)
                reduce = {"mean": lambda pair: sum(pair) / len(pair), "max": max, "sum": sum}[group]
                one = [0.0 if place in last else reduce([total[place] for total in sums]) for place in places]
                pooled = []
                for middle in range(len(one)):
                    near = [
                        one[n] if 0 <= n < len(one) else None
                        for n in range(middle - kernel // 2, middle + kernel // 2 + 1)
                    ]
                    known = [value for value in near if value is not None]
                    pooled.append(max(known) if pooling == "max" else sum(known) / kernel)
                values = dict(zip(places, pooled, strict=True))
                of_heads.append([values.get(place, 0.0) for place in range(real.shape[1])])
            of_rows.append(of_heads)
        found.append(of_rows)
    return found
