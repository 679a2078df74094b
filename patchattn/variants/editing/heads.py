"""Edits of heads: what chosen heads give on chosen rows is masked, scaled or replaced. arXiv 1905.10650 masks outputs.

What papers call masking a head is several things; `docs/variants/heads.md` says which setting is which paper's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.chosen_rows import RowConfig
from ...core.head_vectors import HeadVectors, Vectors
from ...core.heads import HeadList, Heads, plain_heads
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.token_numbers import key_numbers
from ...core.variant import Attend, AttentionOutput, Variant, VariantInfo
from ...surgery.folding import fold_factors


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(RowConfig):
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
        parse=plain_heads,
        help="Which query heads: a file, a mapping from layers to heads, or pairs of (layer, head). None: those that "
        "have a vector; without vectors, all.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.edit == "query" and self.vectors is not None:
            raise ValueError('edit="query" multiplies queries by gain alone: leave out vectors.')
        if self.edit == "value" and (self.rows == "last" or self.phase != "both"):
            raise ValueError(
                'edit="value" is of tokens, whatever call reads them: rows is "all", "from" or "marked", phase "both".'
            )


class HeadEdit(Variant):
    """Attention with what chosen query heads give changed to `gain * x + strength * vector`, on chosen rows.

    Tokens are counted along the sequence, without padding and each packed sequence on its own, so that a prefill,
    chunks and decoding steps edit the same ones.
    """

    config_class = HeadsConfig
    config: HeadsConfig
    splits_by_head = True

    def __init__(self, config: HeadsConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        count = site.require("query_heads", by="heads")
        known = None if config.vectors is None else HeadVectors.parse(config.vectors)
        self.vectors = {} if known is None else known.of_site(site)
        self.heads = tuple(range(count))
        if config.heads is not None:
            self.heads = HeadList.parse(config.heads).of_site(site)
        elif known is not None:
            self.heads = known.heads.of_site(site)
        if known is not None and (lacking := [head for head in self.heads if head not in self.vectors]):
            raise ValueError(f"There is no vector for head {lacking[0]} of layer {site.layer_index} ({site.name}).")
        if site.is_cross and self.heads and not config.edits_all:
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
    def needs_groups(self) -> bool:
        return self.config.edit == "value"

    @property
    def keeps_state(self) -> bool:
        """The kv cache tells which token is which, also where the mask does not."""
        return not self.config.edits_all

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if self.config.edit == "query":
            return inner(call.replace(query=self._edited(call.query, self.config.of_call(call))))
        if self.config.edit == "value":
            return inner(call.replace(value=self._edited(call.value, self._keys(call))))
        output, weights = inner(call)
        return self._edited(output.transpose(1, 2), self.config.of_call(call)).transpose(1, 2), weights

    def fold(self, plain: nn.Module) -> None:
        config = self.config
        if not config.edits_all:
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

    def _keys(self, call: AttentionCall) -> torch.Tensor | None:
        """`(B or 1, Tk)` bool: whose values are edited; `None`: all."""
        if self.config.rows == "all":
            return None
        return self.config.among(key_numbers(call.mask), len(call.query)) & call.mask.real_keys()[:, 0]


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
