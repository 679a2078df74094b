"""How many bytes a kv cache that forgets takes up, counted from settings and sizes, to compare with its tensors."""

from dataclasses import dataclass
from typing import Any

from patchattn.reading.gates import HeadGates

FEWEST, MOST = 256, 1024  # spare places of a layer that appends in place, an eighth of what it holds between these
WHOLE = 64  # a long one has a multiple of so many places in all
INDEX = 4  # bytes of a stored key and head: its column, and as many for since when it is dropped, where some are


@dataclass(frozen=True)
class Sizes:
    """Of a model's cache, batch 1.

    Attributes:
        layers, heads, kv_heads, width: of its attention.
        item: bytes of a number.
    """

    layers: int
    heads: int
    kv_heads: int
    width: int
    item: int

    @classmethod
    def of(cls, model: Any) -> "Sizes":
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.num_hidden_layers, heads, config.num_key_value_heads, width, model.dtype.itemsize)

    @property
    def token(self) -> int:
        """Bytes of a token's keys and values in one kv head of one layer."""
        return 2 * self.width * self.item


def places(held: int) -> int:
    """Those of a layer that held so many keys when a first token was appended in place."""
    found = held + 1 + min(max(held // 8, FEWEST), MOST)
    return found + (-found % WHOLE if held > 16 * WHOLE else 0)


def dense(sizes: Sizes, tokens: int) -> int:
    return sizes.layers * sizes.kv_heads * sizes.token * tokens


def kept(sizes: Sizes, keys: int, steps: int, *, alike: bool, waits: bool, hides: bool = False) -> int:
    """A layer that kept so many keys of a prompt in each head, some steps later.

    Args:
        sizes: of the model.
        keys: how many.
        steps: single tokens since the prompt, two at least.
        alike: all heads keep the same.
        waits: keys are dropped with the first single token, which is then held with them.
        hides: some of those stored are dropped, as at every call, and leave storage together with later ones.
    """
    index = INDEX * (1 + hides) * (1 if alike else sizes.kv_heads) * (keys + steps)
    return sizes.kv_heads * sizes.token * places(keys + waits) + index


def stored(method: str, sizes: Sizes, settings: dict[str, Any], tokens: int, steps: int, cache: Any) -> int:
    """Bytes of all layers after a prompt and some steps.

    Args:
        method: a variant.
        sizes: of the model.
        settings: of the variant.
        tokens: of the prompt.
        steps: single tokens behind it, two at least.
        cache: asked only for what scores decide: the longest head under adakv, and the layers' shares under pyramidkv.
    """
    if method == "duo":
        return sum(_duo_layer(sizes, settings, tokens, steps, layer) for layer in range(sizes.layers))
    if method == "think":
        narrow = sizes.width - int(settings["ratio"] * sizes.width)
        earlier = tokens - settings.get("recent", 32)
        first = sizes.item * earlier * (narrow + sizes.width) + 8 * narrow
        tail = tokens - earlier + 1
        return sizes.layers * sizes.kv_heads * (first + sizes.token * places(tail))
    if method == "streaming_llm":
        keys = settings["sinks"] + settings["recent"]
        return sizes.layers * kept(sizes, keys, steps, alike=True, waits=False)
    budget = settings["budget"]
    if budget >= tokens:
        return sizes.layers * sizes.kv_heads * sizes.token * places(tokens)
    if method == "adakv":
        found = [layer.kept.columns.shape[-1] - steps for layer in cache.layers]
        return sum(_ragged(sizes, budget, longest, steps) for longest in found)
    if method == "pyramidkv":
        found = [layer.kept.columns.shape[-1] - steps for layer in cache.layers]
        return sum(kept(sizes, keys, steps, alike=False, waits=True) for keys in found)
    drops_always = method in ("h2o", "tova")
    of_layer = kept(sizes, budget, steps, alike=method == "tova", waits=not drops_always, hides=drops_always)
    if method == "h2o":  # a sum for each key
        of_layer += 4 * sizes.kv_heads * (budget + steps)
    if method == "expected_attention":  # what it remembers of the prompt's queries
        of_layer += 4 * sizes.heads * sizes.width * (sizes.width + 1)
    return sizes.layers * of_layer


def _ragged(sizes: Sizes, budget: int, longest: int, steps: int) -> int:
    """Heads of another length behind one another, where that saves a sixteenth of the rectangle."""
    if 16 * budget > 15 * longest:
        return kept(sizes, longest, steps, alike=False, waits=True)
    return sizes.kv_heads * (sizes.token * (budget + places(1)) + INDEX * (longest + steps))


def _duo_layer(sizes: Sizes, settings: dict[str, Any], tokens: int, steps: int, layer: int) -> int:
    """Full heads appended in place, streaming ones apart."""
    streaming = len(HeadGates.parse(settings["gates"]).lowest(settings["sparsity"])[layer])
    near = settings["sinks"] + settings["recent"]
    full = (sizes.kv_heads - streaming) * sizes.token * places(tokens)
    apart = streaming * sizes.token * places(near) + (INDEX * (near + steps) if streaming else 0)
    return full + apart
