"""Settings of Squeezed Attention."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ....core.settings import option
from ....core.variant import VariantConfig
from ....reading.groups import heads_option
from .clusters import PrefixClusters


@dataclass(frozen=True, kw_only=True)
class SqueezedConfig(VariantConfig):
    """Settings of Squeezed Attention."""

    clusters: str | Path | PrefixClusters | None = option(
        None,
        help="A file that `patchattn calibrate squeezed` wrote, or what prefix_clusters returned. A saved patch holds "
        "what is in it.",
    )
    sparsity: float = option(
        0.7,
        help="Share of the clustered keys, over all layers and heads, that the last tokens of the prefix would leave "
        "out. 0: nothing is left out.",
        source="paper: 0.7 and 0.9",
        unit="ratio",
        minimum=0.0,
        maximum=1.0,
    )
    heads: Literal["kv", "query"] = heads_option(
        "kv", source="ours; the paper's models have one query head per kv head"
    )
    length: int = option(0, help="Tokens of the prefix, found when patching.", unit="tokens", minimum=0)
    window: int = option(
        1, help="Last tokens of the prefix, which are in no cluster; found when patching.", unit="tokens", minimum=1
    )
    sizes: tuple[int, ...] = option((), help="Clusters of each level, found when patching.", minimum=1)
    thresholds: tuple[float, ...] = option(
        (), help="Scores that clusters of each level must exceed, found when patching."
    )
    compares: bool = option(False, help="Whether prompts are compared with the prefix, found when patching.")

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() if self.clusters is None else replace(self, clusters=None).to_dict()

    @property
    def looks_ahead(self) -> bool:
        """What is read is chosen for all tokens of a call together."""
        return self.sparsity > 0.0
