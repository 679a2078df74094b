"""HDT: sentences, sections and documents attend through their anchors. He et al., arXiv 2407.08330."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.keeping import of_query_heads
from ...core.registry import register_variant
from ...core.selection import require_bidirectional
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantInfo
from ...positions.spans import SpansConfig, SpanVariant, Text

LEVELS = {"sentence": 0, "section": 1, "document": 2}
NONE = 0  # the group of tokens that are not of a level; groups are counted from 1


@dataclass(frozen=True, kw_only=True)
class HDTConfig(SpansConfig):
    """Settings of HDT; every field is described by `patchattn info hdt`."""


def sentences(text: Text, count: int) -> list[int]:
    """Which sentence each of the first tokens of a sequence is of."""
    found = [NONE] * count
    for number, span in enumerate(text, start=1):
        if span.level == 0:
            found[span.start : span.end] = [number] * (span.end - span.start)
    return found


def sections(text: Text, count: int) -> list[int]:
    """Which section each of them stands for or in: anchors of sentences, the first token of each, and of sections."""
    found, section = [NONE] * count, NONE + 1
    for number, span in enumerate(text, start=2):
        if span.level:
            section = number
        if span.level < 2:
            end = span.end if span.level else span.start + 1
            found[span.start : end] = [section] * (end - span.start)
    return found


def documents(text: Text, count: int) -> list[int]:
    """Which document each of them stands for or in: anchors of sections and of documents."""
    found, document = [NONE] * count, NONE + 1
    for number, span in enumerate(text, start=2):
        if span.level == 2:
            document = number
        if span.level:
            found[span.start : span.end] = [document] * (span.end - span.start)
    return found


GROUPS = {"hdt.sentence": sentences, "hdt.section": sections, "hdt.document": documents}


class HDT(SpanVariant):
    """Attention of tokens within their sentence, of sentences' anchors within their section, and of sections' anchors
    within their document."""

    config_class = HDTConfig
    config: HDTConfig
    splits_by_head = True

    @classmethod
    def fit(
        cls, config: HDTConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[HDTConfig, Sequence[AttentionSite]]:
        """Leave out what is not bidirectional self-attention."""
        because = "an anchor stands for what comes after it"
        return config, require_bidirectional(model, sites, by="'hdt'", because=because)

    @property
    def keeps_state(self) -> bool:
        return True

    def check_text(self, text: Text) -> None:
        for span in text:
            if span.level != LEVELS.get(span.kind):
                raise ValueError(
                    "HDT reads spans of sentences at level 0, of sections' anchors at level 1 and of documents' at "
                    f"level 2, got {list(span)}."
                )

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        self.note_tokens(call)
        return {name: self.of_rows(call, of_text).expand(len(call.query), -1) for name, of_text in GROUPS.items()}

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        sees = call.query_positions()[:, None, :, None] == call.key_positions()[:, :, None]
        for name, of_text in GROUPS.items():
            row, key = self.of_rows(call, of_text)[:, None, :, None], call.key_fact(name)[:, :, None]
            sees = sees | ((row == key) & (row != NONE))
        return inner(call.seeing(of_query_heads(sees, call.query.shape[1])))


register_variant(
    VariantInfo(
        name="hdt",
        variant=HDT,
        title="HDT: Hierarchical Document Transformer",
        arxiv_id="2407.08330",
        year=2024,
        code="https://github.com/autonomousvision/hdt",
        summary="Tokens attend within their sentence, and sentences and sections through their anchors.",
        extra_parameters="none",
        needs_training=True,
        capabilities=ALL_CAPABILITIES - {"causal", "cross", "kv_cache", "static_cache"},
        examples=(
            {
                "spans": [
                    ["document", 0, 1, 2],
                    ["section", 1, 2, 1],
                    ["sentence", 2, 4],
                    ["section", 4, 5, 1],
                    ["sentence", 5, 7],
                    ["sentence", 7, 9],
                ]
            },
        ),
    )
)
