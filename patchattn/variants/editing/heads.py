"""Edits of heads: what chosen heads give on chosen rows is masked, scaled or replaced. arXiv 1905.10650 masks outputs.

What papers call masking a head is several things; `docs/variants/heads.md` says which setting is which paper's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.head_vectors import HeadVectors, Vectors
from ...core.heads import HeadList, Heads
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.token_numbers import key_numbers, last_rows, row_numbers
from ...core.variant import Attend, AttentionOutput, Variant, VariantConfig, VariantInfo
from ...surgery.folding import fold_factors

_marks: ContextVar[tuple[tuple[int, ...], ...] | None] = ContextVar("marks", default=None)


@contextmanager
def marked_tokens(tokens: Sequence[Sequence[int]]) -> Iterator[None]:
    """Say which tokens of each sequence `rows="marked"` edits, in a `with` block.

    Args:
        tokens: for every sequence of the batch their numbers, maybe none; the first token that is no padding is 0.

    Raises:
        ValueError: no sequence, or a negative number.
        TypeError: something else than a list of integers for each sequence.
    """
    if not isinstance(tokens, Sequence) or not all(isinstance(of_one, Sequence) for of_one in tokens):
        raise TypeError(f"Marks are a list of numbers for each sequence, got {tokens!r}.")
    numbers = [number for of_one in tokens for number in of_one]
    if wrong := [number for number in numbers if isinstance(number, bool) or not isinstance(number, int)]:
        raise TypeError(f"Marks are numbers of tokens, got {wrong[0]!r}.")
    if not tokens or min(numbers, default=0) < 0:
        raise ValueError(f"Marks are of at least one sequence, counted from 0, got {tokens!r}.")
    token = _marks.set(tuple(tuple(of_one) for of_one in tokens))
    try:
        yield
    finally:
        _marks.reset(token)


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(VariantConfig):
    """Settings of head edits; every field is described by `patchattn info heads`."""

    edit: Literal["output", "query", "value"] = option(
        "output",
        help="What of a head becomes gain * x + strength * vector: its output (output), its query (query), or the "
        "value of a token, which every later row of it reads (value).",
        source="Sixteen Heads, MAPS: output; Retrieval Head and DeCoRe as released: query; temporal heads: value",
    )
    gain: float = option(
        0.0,
        help="Factor of what is edited; 0 takes it out, 1 leaves it.",
        source="all of them",
        minimum=-1e6,
        maximum=1e6,
    )
    vectors: Vectors | None = option(
        None,
        parse=lambda given: HeadVectors.parse(given).to_dict(),  # a saved patch holds them, not the name of a file
        help="A vector for each head, which is added: a file that `head_means(...).save` wrote, or a mapping from "
        "layers to heads to numbers. Not for queries.",
    )
    strength: float = option(1.0, help="Factor of the vectors.", minimum=-1e6, maximum=1e6)
    heads: Heads | None = option(
        None,
        parse=lambda given: HeadList.parse(given).to_dict(),
        help="Which query heads: a file, a mapping from layers to heads, or pairs of (layer, head). None: those that "
        "have a vector; without vectors, all.",
    )
    rows: Literal["all", "last", "from", "marked"] = option(
        "all",
        help="Which tokens are edited: all; the last one that a call brings of each sequence (last); from the one with "
        "the number first_row on (from); those that tokens names (marked).",
    )
    first_row: int = option(
        0, help="With rows=from: number of the first edited token; the first that is not padding is 0.", minimum=0
    )
    tokens: tuple[int, ...] | None = option(
        None,
        help="With rows=marked: numbers of the edited tokens, the same in every sequence; the first that is not "
        "padding is 0. None: `with marked_tokens(...)` says them of each sequence.",
        minimum=0,
    )
    phase: Literal["both", "prompt", "decoding"] = option(
        "both",
        help="In which calls: all (both), those that begin a text (prompt), or those that go on with one (decoding).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and self.rows != "marked":
            raise ValueError(f'tokens are for rows="marked", got rows={self.rows!r}.')
        if self.rows != "from" and self.first_row != 0:
            raise ValueError(f'first_row={self.first_row} is for rows="from", got rows={self.rows!r}.')
        if self.edit == "query" and self.vectors is not None:
            raise ValueError('edit="query" multiplies queries by gain alone: leave out vectors.')
        if self.edit == "value" and (self.rows == "last" or self.phase != "both"):
            raise ValueError(
                'edit="value" is of tokens, whatever call reads them: rows is "all", "from" or "marked", phase "both".'
            )

    @property
    def looks_ahead(self) -> bool:
        return self.rows == "last" or self.phase != "both"


class HeadEdit(Variant):
    """Attention with what chosen query heads give changed to `gain * x + strength * vector`, on chosen rows.

    Tokens are counted along the sequence, without padding and each packed sequence on its own, so that a prefill,
    chunks and decoding steps edit the same ones.
    """

    config_class = HeadsConfig
    config: HeadsConfig

    def __init__(self, config: HeadsConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        count = site.require("query_heads", by="heads")
        known = None if config.vectors is None else HeadVectors.parse(config.vectors)
        self.vectors = {} if known is None else known.vectors.get(site.layer_index, {})
        self.heads = tuple(range(count))
        if config.heads is not None:
            self.heads = HeadList.parse(config.heads).of_site(site)
        elif known is not None:
            self.heads = known.heads.of_site(site)
        if known is not None and (lacking := [head for head in self.heads if head not in self.vectors]):
            raise ValueError(f"There is no vector for head {lacking[0]} of layer {site.layer_index} ({site.name}).")
        if site.is_cross and self.heads and (config.rows != "all" or config.phase != "both"):
            raise NotImplementedError(
                f'{site.name} is cross attention, where rows are not counted: rows="all" and phase="both", or leave it '
                "out with modules=..."
            )
        if config.edit == "value":
            self._check_groups(site)

    def _check_groups(self, site: AttentionSite) -> None:
        """ValueError if query heads share values of which not all are to be edited, or not alike."""
        size = (site.query_heads or 0) // site.require("kv_heads", by="heads")
        for head in self.heads:
            group = range(head // size * size, head // size * size + size)
            alike = all(other in self.heads and self.vectors.get(other) == self.vectors.get(head) for other in group)
            if not alike:
                raise ValueError(
                    f"The query heads {group[0]} to {group[-1]} of {site.name} share one head of values: name all of "
                    f"them, with the same vector, to edit it; got {list(self.heads)}."
                )

    @classmethod
    def fit(
        cls, config: HeadsConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[HeadsConfig, Sequence[AttentionSite]]:
        if config.heads is not None:
            HeadList.parse(config.heads).check(model, sites)
        if config.vectors is not None:
            HeadVectors.parse(config.vectors).heads.check(model, sites)
        return config, sites

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"gain": 1.0, "strength": 0.0}

    @property
    def is_identity(self) -> bool:
        adds = bool(self.vectors) and self.config.strength != 0.0
        return not self.heads or (self.config.gain == 1.0 and not adds)

    @property
    def keeps_state(self) -> bool:
        """The kv cache tells which token is which, also where the mask does not."""
        return self.config.rows != "all" or self.config.phase != "both"

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if self.config.edit == "query":
            return inner(call.replace(query=self._edited(call.query, self._rows(call))))
        if self.config.edit == "value":
            return inner(call.replace(value=self._edited(call.value, self._keys(call))))
        output, weights = inner(call)
        return self._edited(output.transpose(1, 2), self._rows(call)).transpose(1, 2), weights

    def fold(self, plain: nn.Module) -> None:
        config = self.config
        if config.rows != "all" or config.phase != "both":
            raise NotImplementedError("it edits some tokens and not others")
        if self.vectors and config.strength != 0.0:
            raise NotImplementedError("it adds vectors, for which attention has no place; leave them out")
        size = (self.site.query_heads or 0) // (self.site.kv_heads or 1) if config.edit == "value" else 1
        factors = torch.ones((self.site.query_heads or 0) // size)
        factors[sorted({head // size for head in self.heads})] = config.gain
        fold_factors(plain, self.site, config.edit, factors)

    def _edited(self, states: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
        """`(B, H, T, D)` with `gain * x + strength * vector` in some heads, at tokens `(B or 1, T)` or at all."""
        count = states.shape[1]
        size = (self.site.query_heads or count) // count
        places = sorted({head // size for head in self.heads})
        index = torch.tensor(places, device=states.device)
        old = states.index_select(1, index)
        new = old * self.config.gain
        if self.vectors:
            added = torch.tensor([self.vectors[place * size] for place in places], dtype=torch.float64)
            if added.shape[1] != states.shape[-1]:
                raise ValueError(
                    f"The vectors have {added.shape[1]} numbers, but heads of {self.site.name} give {states.shape[-1]}."
                )
            new = new + (added * self.config.strength).to(device=states.device, dtype=states.dtype)[:, None]
        if where is not None:
            new = torch.where(where[:, None, :, None], new, old)
        return states.index_copy(1, index, new)

    def _rows(self, call: AttentionCall) -> torch.Tensor | None:
        """`(B or 1, Tq)` bool: which rows are edited; `None`: all."""
        config, chosen = self.config, None
        if config.rows == "last":
            chosen = last_rows(call.mask)
        elif config.rows != "all":
            chosen = self._among(row_numbers(call.mask), call)
        if config.phase == "both":
            return chosen
        own = call.context.own_key()
        begins = call.mask.queries == call.mask.columns if own is None else own == 0
        wanted = torch.as_tensor(begins, device=call.query.device).view(1, 1) == (config.phase == "prompt")
        return wanted if chosen is None else chosen & wanted

    def _keys(self, call: AttentionCall) -> torch.Tensor | None:
        """`(B or 1, Tk)` bool: whose values are edited; `None`: all."""
        if self.config.rows == "all":
            return None
        return self._among(key_numbers(call.mask), call) & call.mask.real_keys()[:, 0]

    def _among(self, numbers: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """`(B or 1, T)` bool: which of the numbers are edited."""
        if self.config.rows == "from":
            return numbers >= self.config.first_row
        marks, batch = _marks.get() if self.config.tokens is None else (self.config.tokens,), len(call.query)
        if marks is None or batch % len(marks):
            given = "nobody said of which" if marks is None else f"{len(marks)} lists of them are given"
            raise ValueError(
                f'rows="marked" edits tokens of a batch of {batch} sequences, and {given}: give tokens=[...] for all '
                "sequences, or a list for each by `with marked_tokens([[...], ...]):`."
            )
        width = max(map(len, marks))
        table = torch.tensor([[*of_one, *[-2] * (width - len(of_one))] for of_one in marks], dtype=torch.long)
        wanted = table.repeat_interleave(batch // len(marks), dim=0) if len(marks) > 1 else table  # by beams
        return (numbers[..., None] == wanted.to(numbers.device)[:, None]).any(-1)


register_variant(
    VariantInfo(
        name="heads",
        variant=HeadEdit,
        title="Are Sixteen Heads Really Better than One?",
        arxiv_id="1905.10650",
        year=2019,
        code="https://github.com/pmichel31415/are-16-heads-really-better-than-1",
        summary="Chosen heads are masked, scaled or given a vector, on chosen tokens.",
        extra_parameters="none",
        needs_training=False,
        examples=(
            {},
            {"edit": "query", "heads": [[1, 0], [1, 3]], "rows": "from", "first_row": 2},
            {"edit": "value", "gain": -1.0, "rows": "marked", "tokens": [1, 3]},
        ),
    )
)
