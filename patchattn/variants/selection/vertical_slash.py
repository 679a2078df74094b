"""MInference's vertical-slash heads: a prompt reads the columns and diagonals that its end does. arXiv 2407.02490."""

from dataclasses import dataclass
from typing import Any

import torch

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.lines import along_diagonals, lines_of, ranked, texts_of
from ...reading.selection import CAPABILITIES
from ...reading.whole import WholeSelection, keys_so_far


@dataclass(frozen=True, kw_only=True)
class VerticalSlashConfig(VariantConfig):
    """Settings of vertical-slash heads."""

    columns: int | None = option(
        1000,
        help="Keys that all tokens of a text read, those of `sinks` among them. None: all.",
        source="released code, where nothing was searched for a head",
        unit="keys",
        minimum=1,
    )
    diagonals: int = option(
        6096,
        help="Distances at which every token reads a key, those of `recent` among them.",
        source="released code, where nothing was searched for a head",
        unit="keys",
        minimum=1,
    )
    window: int = option(
        64,
        help="Last tokens of a call whose attention chooses columns and diagonals.",
        source="released code",
        unit="tokens",
        minimum=1,
    )
    sinks: int = option(
        30, help="First keys of a text that are read anyhow.", source="released code", unit="keys", minimum=0
    )
    recent: int = option(
        100,
        help="Last keys that are read anyhow, a token's own among them.",
        source="released code",
        unit="keys",
        minimum=1,
    )
    block: int = option(
        64,
        help="Tokens that read the union of what diagonals give each of them. 1: diagonals alone.",
        source="released code: its kernel",
        unit="tokens",
        minimum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, forced in (("columns", "sinks"), ("diagonals", "recent")):
            count, least = getattr(self, name), getattr(self, forced)
            if count is not None and count < least:
                raise ValueError(f"{name} counts those of {forced} among them: expected at least {least}, got {count}.")


class VerticalSlash(WholeSelection):
    """Attention of a prompt to columns of keys and to keys at some distances, which its last tokens choose."""

    config_class = VerticalSlashConfig
    config: VerticalSlashConfig
    splits_by_head = True

    @property
    def is_identity(self) -> bool:
        return self.config.columns is None

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"columns": None}

    def select(self, call: AttentionCall) -> torch.Tensor | None:
        self.check(call)
        config, mask = self.config, call.mask
        if config.columns is None or call.decodes or mask.columns <= max(config.columns, config.diagonals):
            return None
        texts, hidden = texts_of(mask), ~keys_so_far(mask)
        columns, diagonals = lines_of(call, texts, config.window)
        columns = columns.masked_fill(mask.key_places() <= config.sinks, float("inf"))
        diagonals = diagonals.masked_fill((texts.behind_keys < config.recent)[:, None], float("inf"))
        in_column, on_diagonal = (
            (ranked(scores.masked_fill(hidden, float("-inf")), texts.of_keys).rank < count) & ~hidden
            for scores, count in ((columns, config.columns), (diagonals, config.diagonals))
        )
        return in_column[:, :, None] | along_diagonals(on_diagonal, texts, mask, config.block)


register_variant(
    VariantInfo(
        name="vertical_slash",
        variant=VerticalSlash,
        title="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        arxiv_id="2407.02490",
        year=2024,
        code="https://github.com/microsoft/MInference",
        summary="A prompt reads the keys, and keys at the distances, that its last tokens attend to.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES,
        examples=(
            {"columns": 2, "diagonals": 2, "window": 3, "sinks": 1, "recent": 1, "block": 1},
            {"columns": 1, "diagonals": 1, "window": 2, "sinks": 0, "recent": 1, "block": 2},
        ),
    )
)
