"""Methods with the settings that leave a share of the keys, and how each meets a prompt and its answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from caches import Gates, settings_of

How = Literal["rows", "prompt", "steps", "question", "once", "always"]
Settings = Callable[[float, int], dict[str, Any] | None]
SHARES = (0.25, 0.1, 0.5, 0.05)
WINDOW = 100  # last tokens of a text that Squeezed Attention always reads


@dataclass(frozen=True)
class Method:
    """A variant and its settings.

    Attributes:
        name: in rows and tables.
        variant: its name.
        how: 'rows': every token chooses for itself, so that prompt and answer are one call; 'prompt': it acts in the
            call of a prompt, and decoding is dense; 'steps': it acts in decoding alone, from the prompt's last token
            on; 'question': in what follows the text of a prompt, which is read densely, and with it what is known of
            it beforehand; 'once': the cache is compressed at the end of a prompt; 'always': at the end of every call.
        settings: of a share that is asked for and the tokens of a prompt; `None` if there are none.
        asked: shares, or what the method has in their place.
        text: settings beside these for losses, where all tokens come in one call; `None`: it has none.
        alone: whether it can go on from a cache that the plain model filled.
        dear: whether it takes so long that it is given few and short prompts.
    """

    name: str
    variant: str
    how: How
    settings: Settings
    asked: Sequence[float] = SHARES
    text: Mapping[str, Any] | None = field(default_factory=dict)
    alone: bool = False
    dear: bool = False

    @property
    def shares(self) -> bool:
        """Whether one cache that it has filled serves all its settings, which matter behind it."""
        return self.how == "steps" or (self.how in ("once", "always") and not self.alone)


def pages(share: float, length: int, **more: Any) -> dict[str, Any]:
    """Of methods with a budget of keys."""
    return {"budget": max(1, round(share * length)), **more}


def streaming(share: float, length: int) -> dict[str, Any]:
    return {"sinks": 4, "recent": max(1, round(share * length) - 4)}


def mswa(share: float, length: int) -> dict[str, Any]:
    scale = (0.25 + 0.5 + 1 + 2) / 4  # the mean of the scales of layers, and of heads
    return {"window": max(16, 16 * round(share * length / scale**2 / 16))}


def power(share: float, length: int) -> dict[str, Any] | None:
    """Blocks of 16: the last ones, those at powers of two beyond them, and the first."""
    blocks = length // 16

    def read(local: int) -> int:
        away = range(blocks)
        return sum(n < local or n & (n - 1) == 0 or n == blocks - 1 for n in away)

    if read(1) > 1.5 * share * blocks:
        return None  # as few cannot be read
    return {"block": 16, "local": min(range(1, blocks), key=lambda local: abs(read(local) - share * blocks))}


def triangle(share: float, length: int) -> dict[str, Any]:
    return {"last": 64, "sinks": 8, "recent": max(1, round(share * length) - 8)}


def vertical_slash(share: float, length: int) -> dict[str, Any]:
    half = max(8, round(share * length / 2))
    return {"columns": half, "diagonals": half, "sinks": min(30, half), "recent": min(100, half), "block": 1}


def hyper(share: float, length: int) -> dict[str, Any]:
    most = max(8, round(share * length / 4))
    return {"exact": 2 * most, "block": most, "samples": most}


def selection_methods() -> list[Method]:
    """Those that say which keys are read; the cache keeps all. Blocks are smaller than the papers', as are lengths."""
    chosen = {"prefill": "selected"}
    return [
        Method("quest", "quest", "steps", pages, text=chosen),
        Method("quest, page 4", "quest", "steps", partial(pages, page=4), text=chosen),
        Method("twilight", "twilight", "steps", lambda p, n: {"top_p": p, "budget": None}, (0.85, 0.5, 0.95), chosen),
        Method("lserve", "lserve", "steps", pages, text={**chosen, "refresh": 1}),
        Method("lserve, page 16", "lserve", "steps", partial(pages, page=16, logical=4), text={**chosen, "refresh": 1}),
        Method("recycled", "recycled", "steps", pages, text=None),
        Method("random pages", "random_pages", "steps", pages, text=chosen, alone=True),
        Method("squeezed", "squeezed", "question", lambda p, n: {"sparsity": p}, (0.7, 0.9, 0.5), text=None),
        Method(
            "random pages, question",
            "random_pages",
            "question",
            lambda p, n: pages(1.0 - p, n - WINDOW, prefill="selected", dense_layers=0),
            (0.7, 0.9, 0.5),
            text=None,
            alone=True,
        ),
        Method("streaming", "streaming", "rows", streaming),
        Method("mswa", "mswa", "rows", mswa),
        Method("power", "power", "rows", power),
        Method("hip", "hip", "rows", partial(pages, queries=1), dear=True),
        Method("vertical_slash", "vertical_slash", "prompt", vertical_slash),
        Method("triangle", "triangle", "prompt", triangle),
        Method("hyper", "hyper", "prompt", hyper, dear=True),
        Method(
            "flex_prefill",
            "flex_prefill",
            "prompt",
            lambda gamma, n: {"gamma": gamma, "block": 32, "budget": 64},
            (0.7, 0.4, 0.9),
        ),
        Method(
            "xattention",
            "xattention",
            "prompt",
            lambda threshold, n: {"threshold": threshold, "stride": 8, "block": 32},
            (0.7, 0.4, 0.9),
        ),
    ]


def cache_methods(gates: Mapping[str, Gates]) -> list[Method]:
    """Those that drop keys of the cache.

    Args:
        gates: of DuoAttention's kv heads, under the names of where they are from.
    """

    def of(variant: str, share: float, length: int) -> dict[str, Any]:
        return settings_of(variant, share, length, [])[1]

    shares = (0.25, 0.1, 0.5)
    once = ("snapkv", "pyramidkv", "adakv", "knorm", "keydiff")
    duo = [
        Method(
            f"duo ({origin})",
            "duo",
            "rows",
            partial(lambda own, share, length: settings_of("duo", share, length, own)[1], own),
            shares,
        )
        for origin, own in gates.items()
    ]
    return [
        *(Method(name, name, "once", partial(of, name), shares, alone=True) for name in once),
        Method("random keys", "random_keys", "once", pages, shares, alone=True),
        Method("think", "think", "once", partial(of, "think"), (0.8, 0.7, 0.55), alone=True),
        Method("tova", "tova", "always", partial(of, "tova"), shares, {"event": "chunk"}, alone=True),
        Method("streaming_llm", "streaming_llm", "rows", partial(of, "streaming_llm"), shares),
        *duo,
        Method("expected_attention", "expected_attention", "once", partial(of, "expected_attention"), shares),
        Method("h2o", "h2o", "always", partial(of, "h2o"), shares, {"event": "chunk"}),
    ]
