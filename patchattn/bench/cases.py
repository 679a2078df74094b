"""What is measured: shapes of real models, and the cases of each suite."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Mode = Literal["prefill", "decode", "training"]
Pattern = Literal["uniform", "moh", "trained"]
PATTERNS: tuple[Pattern, ...] = ("moh", "trained")  # besides the uniform one
MODES: tuple[Mode, ...] = ("prefill", "training", "decode")
SHORT = 2048  # queries of all sequences: launches may be most of the time of a prefill with no more
TOKENS_OF_A_BATCH = 16384  # short sequences are batched up to this many tokens, as FlashAttention's benchmarks do


@dataclass(frozen=True)
class Shape:
    """Geometry of one layer.

    Attributes:
        name: as cases spell it.
        family: whose layer the end-to-end cases build: `llama`, `bert` or `vit`.
        query_heads, kv_heads, head_dim: of its attention.
        hidden: width of the layer.
        inner: width of its feed-forward part.
        causal: whether queries see no key after their own.
    """

    name: str
    family: Literal["llama", "bert", "vit"]
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    causal: bool


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama3_8b", "llama", 32, 8, 128, 4096, 14336, True),
        Shape("mha", "llama", 32, 32, 128, 4096, 11008, True),
        Shape("gpt2", "llama", 12, 12, 64, 768, 3072, True),
        Shape("bert_base", "bert", 12, 12, 64, 768, 3072, False),
        Shape("vit_b", "vit", 12, 12, 64, 768, 3072, False),
        Shape("tiny", "llama", 4, 2, 16, 64, 96, True),
        Shape("tiny_encoder", "bert", 4, 4, 16, 64, 96, False),
    )
}


@dataclass(frozen=True)
class Case:
    """One thing to measure; all its implementations get the same operands.

    Attributes:
        op: name of the operation, a key of `patchattn.bench.registry.PROBLEMS`.
        shape: name of a shape.
        tokens: number of keys; of queries too, but in decoding, where there is one.
        mode: forward over all tokens, one decoding step, or forward and backward.
        active: share of the query heads that a token keeps, or of the pages that are read, of operations that select.
        pattern: which ones: any (`uniform`), or MoH's, where two thirds of them are the same for all tokens, or as
            often as a `trained` router keeps each.
        dtype: of the operands.
        batch: sequences.
    """

    op: str
    shape: str
    tokens: int
    mode: Mode = "prefill"
    active: float = 1.0
    pattern: Pattern = "uniform"
    dtype: str = "bfloat16"
    batch: int = 1

    @property
    def name(self) -> str:
        """Short and unique, such as `routed llama3_8b prefill 8192 50%`."""
        parts = [self.op, self.shape, self.mode, str(self.tokens)]
        if self.batch > 1:
            parts.append(f"x{self.batch}")
        if self.op in SELECTING:
            parts.append(f"{self.active:.0%}")
        if self.pattern != "uniform":
            parts.append(self.pattern)
        if self.dtype != "bfloat16":
            parts.append(self.dtype)
        return " ".join(parts)

    @property
    def is_short(self) -> bool:
        """Whether it is a prefill that is measured with and without a CUDA graph."""
        return self.mode == "prefill" and self.tokens * self.batch <= SHORT

    @property
    def geometry(self) -> Shape:
        return SHAPES[self.shape]


SELECTING = ("routed", "selected", "moh_attention", "moh_layer")

ROUTED = Case("routed", "llama3_8b", 8192, active=0.5)
ROUTED_TRAINING = Case("routed", "llama3_8b", 8192, "training", active=0.5)
ALL_ROUTED = Case("routed", "llama3_8b", 8192, active=1.0)
ROUTED_DECODING = Case("routed", "mha", 16384, "decode", active=0.5, batch=8)
ACT = Case("act", "llama3_8b", 8192)
BLOCK_SPARSE = Case("block_sparse", "llama3_8b", 32768)
ROUTED_SHORT = Case("routed", "llama3_8b", 1024, active=0.5)
ROUTED_TRAINED = Case("routed", "llama3_8b", 8192, active=0.5, pattern="trained")
SELECTED = Case("selected", "llama3_8b", 16384, "decode", active=0.125, batch=8)
WINDOW_DECODING = Case("block_sparse", "llama3_8b", 16384, "decode", batch=8)
GOALS = (
    ROUTED,
    ROUTED_TRAINING,
    ALL_ROUTED,
    ROUTED_DECODING,
    ACT,
    BLOCK_SPARSE,
    ROUTED_TRAINED,
    ROUTED_SHORT,
    WINDOW_DECODING,
    SELECTED,
    Case("moh_attention", "llama3_8b", 8192, active=0.5, pattern="moh"),
    Case("moh_layer", "llama3_8b", 8192, active=0.5, pattern="moh"),
    Case("act_attention", "llama3_8b", 8192),
    Case("act_layer", "llama3_8b", 8192),
    Case("temperature", "llama3_8b", 8192),
)


def suite(name: str, ops: tuple[str, ...] = ()) -> list[Case]:
    """The cases of a suite, of some operations or of all.

    Args:
        name: `goals` (what the project is to reach, minutes on a GPU), `full` (all shapes and lengths: hours) or
            `smoke` (small enough for a CPU: shows that everything runs, no figure of it means anything).
        ops: names of operations; all by default.

    Raises:
        ValueError: there is no such suite, or it has no case of these operations.
    """
    suites = {"goals": lambda: GOALS, "full": _full, "smoke": _smoke}
    if name not in suites:
        raise ValueError(f"There is no suite {name!r}: choose one of {', '.join(suites)}.")
    cases = list(suites[name]())
    known = list(dict.fromkeys(case.op for case in cases))
    if unknown := [op for op in ops if op not in known]:
        raise ValueError(f"The suite {name!r} has no operation {unknown[0]!r}: it has {', '.join(known)}.")
    return [case for case in cases if not ops or case.op in ops]


def _full() -> Iterator[Case]:
    lengths = [2**power for power in range(10, 17)]
    for shape in ("llama3_8b", "mha", "bert_base", "vit_b"):
        causal = SHAPES[shape].causal
        for tokens in lengths:
            batch = max(1, TOKENS_OF_A_BATCH // tokens)
            for mode in MODES[:2]:
                for active in (0.25, 0.5, 0.75, 1.0):
                    yield Case("routed", shape, tokens, mode, active, batch=batch)
                for pattern in PATTERNS:
                    yield Case("routed", shape, tokens, mode, 0.5, pattern, batch=batch)
            if causal:
                for active in (0.25, 0.5, 0.75, 1.0):
                    yield Case("routed", shape, tokens, "decode", active, batch=8)
                for active in (0.0625, 0.125, 0.25):
                    yield Case("selected", shape, tokens, "decode", active, batch=8)
                yield Case("act", shape, tokens, batch=batch)
                for mode in MODES:
                    yield Case("block_sparse", shape, tokens, mode, batch=8 if mode == "decode" else batch)
                for op in ("moh_attention", "moh_layer"):
                    yield Case(op, shape, tokens, active=0.5, pattern="moh", batch=batch)
                for op in ("act_attention", "act_layer"):
                    yield Case(op, shape, tokens, batch=batch)
            else:
                yield Case("moh_layer", shape, tokens, active=0.5, pattern="moh", batch=batch)
            for op in ("split", "column_mass", "temperature"):
                yield Case(op, shape, tokens, batch=batch)


def _smoke() -> Iterator[Case]:
    how = {"dtype": "float32", "batch": 2}
    for mode in MODES:
        yield Case("routed", "tiny", 48, mode, 0.5, **how)  # type: ignore[arg-type]
        yield Case("block_sparse", "tiny", 96, mode, **how)  # type: ignore[arg-type]
    for pattern in PATTERNS:
        yield Case("routed", "tiny_encoder", 40, active=0.5, pattern=pattern, **how)  # type: ignore[arg-type]
    yield Case("selected", "tiny", 96, "decode", 0.5, **how)  # type: ignore[arg-type]
    for op in ("act", "split", "column_mass", "temperature", "act_attention", "act_layer"):
        yield Case(op, "tiny", 64, **how)  # type: ignore[arg-type]
    for op in ("moh_attention", "moh_layer"):
        yield Case(op, "tiny", 48, active=0.5, pattern="moh", **how)  # type: ignore[arg-type]
    yield Case("moh_layer", "tiny_encoder", 40, active=0.5, pattern="moh", **how)  # type: ignore[arg-type]
