"""Task vectors: the residual stream at the end of demonstrations, put in place of a prompt's. arXiv 2310.15916."""

from dataclasses import dataclass
from typing import Literal

from ...core.layer_vectors import LayerVectorConfig, LayerVectorVariant
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantInfo


@dataclass(frozen=True, kw_only=True)
class TaskVectorsConfig(LayerVectorConfig):
    """Settings of task vectors; every field is described by `patchattn info task_vectors`."""

    gain: float = option(
        0.0,
        help="Factor of what is there before; 0 puts the vector in its place.",
        source="paper and released code: in its place",
        minimum=-1e6,
        maximum=1e6,
    )
    rows: Literal["all", "last", "from", "marked"] = option(
        "last",
        help="Which tokens are edited: all; the last one that a call brings of each sequence (last); from the one with "
        "the number first_row on (from); those that tokens names (marked).",
        source="paper and released code: the prompt's last token",
    )
    phase: Literal["both", "prompt", "decoding"] = option(
        "prompt",
        help="In which calls: all (both), those that begin a text (prompt), or those that go on with one (decoding).",
        source="paper and released code: the prompt",
    )


class TaskVectors(LayerVectorVariant):
    """The residual stream behind a layer with a task vector in its place at the prompt's last token."""

    config_class = TaskVectorsConfig
    splits_by_head = True


register_variant(
    VariantInfo(
        name="task_vectors",
        variant=TaskVectors,
        title="In-Context Learning Creates Task Vectors",
        arxiv_id="2310.15916",
        year=2023,
        code="https://github.com/roeehendel/icl_task_vectors",
        summary="A vector takes the place of the residual stream behind a layer, at the prompt's last token.",
        extra_parameters="none",
        needs_training=False,
        examples=(
            {"vectors": {1: [0.5, -0.25] * 16}, "rows": "from", "first_row": 2, "phase": "both"},
            {"vectors": {1: [0.5, -0.25] * 16}},
        ),
    )
)
