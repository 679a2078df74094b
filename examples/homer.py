"""HOMER on a Llama: chunks of a long context are read side by side, thinned out and merged. arXiv 2404.10308.

Each chunk is read with the prompt's prefix and suffix, at the positions that all chunks share. Every few layers the
context tokens that the last token looks at least are dropped, from the hidden states and from the kv caches so far, and
two neighbours become one. What is left of the root is a kv cache to go on from. It is a driver, not a patch: it runs
layers itself, on texts that no single forward of the model holds.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.call import AttentionCall
from patchattn.core.kv_caches import cache_argument


@dataclass
class Chunk:
    """A node of the tree.

    Attributes:
        hidden: `(1, T, E)` hidden states of prefix, context and suffix.
        places: `(T,)` positions that they are rotated by.
        stored: keys and values `(1, Hkv, T, D)` of every layer so far.
    """

    hidden: torch.Tensor
    places: torch.Tensor
    stored: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Homer:
    """What was read.

    Attributes:
        logits: `(V,)` of the token behind the suffix.
        cache: keys and values of what is left, to decode from.
        next_place: position of the token behind the suffix.
    """

    logits: torch.Tensor
    cache: DynamicCache
    next_place: int


@torch.no_grad()
def homer(
    model: Any,
    prefix: torch.Tensor,
    context: torch.Tensor,
    suffix: torch.Tensor,
    *,
    longest: int | None = None,
    warm_up: int | None = None,
    bias: torch.Tensor | None = None,
) -> Homer:
    """Read a prompt of any length by chunks of at most `longest` tokens.

    Args:
        model: a decoder built as Llama is: `model.model` has `embed_tokens`, `layers`, `rotary_emb` and `norm`.
        prefix, context, suffix: `(n,)` tokens; a prefix of one token at least, a suffix too.
        longest: tokens of a chunk, and of what is left at the root; by default half of the trained length.
        warm_up: layers that leaves go through before levels begin; by default 3 of 8, as 12 of 32.
        bias: `(layers, distances)` subtracted from the logits by which tokens are dropped. None: nothing.

    Raises:
        ValueError: an empty part, no room for the context between prefix and suffix, or more levels than layers.
    """
    base = model.model
    count, p, u = len(base.layers), len(prefix), len(suffix)
    longest = model.config.max_position_embeddings // 2 if longest is None else longest
    room = longest - p - u
    if min(p, u, len(context)) < 1 or room < 2:
        raise ValueError(
            f"Expected prefix, context and suffix, and room for context in {longest} tokens; got {p}, {len(context)} "
            f"and {u} tokens."
        )
    height = max(0, math.ceil(math.log2(len(context) / room)))
    size = math.ceil(len(context) / 2**height)
    warm_up = 3 * count // 8 if warm_up is None else warm_up
    of_level = (count - warm_up) // (height + 1)
    if of_level < 1:
        raise ValueError(f"{height + 1} levels need a layer each, and behind {warm_up} there are {count - warm_up}.")
    chunks = []
    for start in range(0, len(context), size):
        part = context[start : start + size]
        places = [*range(p + len(part)), *range(p + size, p + size + u)]
        ids = torch.cat([prefix, part, suffix]).to(base.embed_tokens.weight.device)
        chunks.append(Chunk(base.embed_tokens(ids[None]), torch.tensor(places, device=ids.device), []))
    done = count - of_level * height  # what remains of the division is the leaves'
    for level in range(height + 1):
        first = 0 if level == 0 else done + of_level * (level - 1)
        last = done + of_level * level
        target = longest if level == height else p + room // 2 + u
        chunks = [_through(model, chunk, first, last, target, p, u, bias) for chunk in chunks]
        if level < height:
            chunks = [_merged(chunks[n : n + 2], p, u) for n in range(0, len(chunks), 2)]
    (root,) = chunks
    cache = DynamicCache(config=model.config)
    for layer, (key, value) in enumerate(root.stored):
        cache.update(key, value, layer)
    logits = model.lm_head(base.norm(root.hidden[:, -1]))[0]
    return Homer(logits, cache, int(root.places[-1]) + 1)


def _through(
    model: Any, chunk: Chunk, first: int, last: int, target: int, p: int, u: int, bias: torch.Tensor | None
) -> Chunk:
    """A node behind its layers, with no more than `target` tokens."""
    seen: list[AttentionCall] = []
    hidden, places = chunk.hidden, chunk.places[None]
    tables = model.model.rotary_emb(hidden, position_ids=places)
    with patchattn.probed(model, lambda call, _: seen.append(call), layers=range(first, last)):
        for layer in model.model.layers[first:last]:
            hidden = layer(hidden, position_ids=places, position_embeddings=tables)
    stored = [*chunk.stored, *((call.key, call.value) for call in seen)]
    through = replace(chunk, hidden=hidden, stored=stored)
    dropped = hidden.shape[1] - target
    if dropped <= 0:
        return through
    call = seen[-1]
    heads = call.query.shape[1] // call.key.shape[1]
    logits = (call.query[:, :, -1:] @ call.key.repeat_interleave(heads, dim=1).mT).float() * call.scaling
    significance = logits[0, :, 0].amax(0)
    if bias is not None:
        significance = significance - bias[last - 1, chunk.places[-1] - chunk.places].to(significance)
    least = significance[p : len(significance) - u].argsort(stable=True)[:dropped] + p
    kept = torch.ones(hidden.shape[1], dtype=torch.bool, device=hidden.device).index_fill(0, least, False)
    # An MLP sees a token at a time, so that dropping behind it is dropping before it.
    return Chunk(hidden[:, kept], chunk.places[kept], [(key[:, :, kept], value[:, :, kept]) for key, value in stored])


def _merged(pair: list[Chunk], p: int, u: int) -> Chunk:
    """Two neighbours as one: prefix and suffix are the means of both, contexts follow each other."""
    if len(pair) == 1:
        return pair[0]
    left, right = pair

    def joined(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Along the last dimension but one."""
        both = ((one[..., :p, :] + other[..., :p, :]) / 2, (one[..., -u:, :] + other[..., -u:, :]) / 2)
        return torch.cat([both[0], one[..., p:-u, :], other[..., p:-u, :], both[1]], dim=-2)

    stored = [
        (joined(key, other_key), joined(value, other_value))
        for (key, value), (other_key, other_value) in zip(left.stored, right.stored, strict=True)
    ]
    places = torch.cat([left.places[:-u], right.places[p:]])
    return Chunk(joined(left.hidden, right.hidden), places, stored)


@torch.no_grad()
def answer(model: Any, read: Homer, tokens: int) -> list[int]:
    """Greedy tokens behind what was read; the cache grows."""
    written = [int(read.logits.argmax())]
    while len(written) < tokens:
        place = torch.tensor([[read.next_place + len(written) - 1]], device=read.logits.device)
        one = torch.tensor([written[-1:]], device=read.logits.device)
        output = model(one, position_ids=place, **cache_argument(model, read.cache))
        written.append(int(output.logits[0, -1].argmax()))
    return written


if __name__ == "__main__":
    import sys

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file, question = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    language_model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with open(file, encoding="utf-8") as text:
        whole = tokenizer(text.read(), add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    front = tokenizer("Read this.\n\n", return_tensors="pt").input_ids[0]
    back = tokenizer(f"\n\n{question}", add_special_tokens=False, return_tensors="pt").input_ids[0]
    found = homer(language_model, front, whole, back)
    print(tokenizer.decode(answer(language_model, found, 20)))
