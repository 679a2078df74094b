"""Function vectors: what a few heads give at the end of demonstrations, added behind a layer. arXiv 2310.15213."""

from dataclasses import dataclass
from typing import Literal

from ...core.layer_vectors import LayerVectorConfig, LayerVectorVariant
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantInfo


@dataclass(frozen=True, kw_only=True)
class FunctionVectorsConfig(LayerVectorConfig):
    """Settings of function vectors; every field is described by `patchattn info function_vectors`."""

    rows: Literal["all", "last", "from", "marked"] = option(
        "last",
        help="Which tokens are edited: all; the last one that a call brings of each sequence (last); from the one with "
        "the number first_row on (from); those that tokens names (marked).",
        source="paper and released code: the last token, of the prompt and of every decoding step",
    )


class FunctionVectors(LayerVectorVariant):
    """The residual stream behind a layer with a function vector added at the last token."""

    config_class = FunctionVectorsConfig
    splits_by_head = True


register_variant(
    VariantInfo(
        name="function_vectors",
        variant=FunctionVectors,
        title="Function Vectors in Large Language Models",
        arxiv_id="2310.15213",
        year=2023,
        code="https://github.com/ericwtodd/function_vectors",
        summary="A vector is added to the residual stream behind a layer, at the last token.",
        extra_parameters="none",
        needs_training=False,
        examples=(
            {"vectors": {1: [0.5, -0.25] * 16}, "rows": "all"},
            {"vectors": {0: [0.5, -0.25] * 16, 1: [0.25] * 32}, "rows": "marked", "tokens": [1, 3]},
        ),
    )
)
