"""Graph-KV: documents of a prompt are read behind the texts that they draw on. Wang et al., arXiv 2506.07334."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantInfo
from ...positions.pieces import PLACE, PREFIX, QUERY, SEGMENT, PlacedConfig, PlacedVariant, without_prefix
from ...positions.spans import Text
from ...positions.two_queries import with_two_queries


@dataclass(frozen=True, kw_only=True)
class GraphKVConfig(PlacedConfig):
    """Settings of Graph-KV; every field is described by `patchattn info graph_kv`."""

    form: Literal["sequential", "graph"] = option(
        "sequential",
        help="Where texts stand: all one after the other, each document being read right behind the sources "
        "(sequential); or all sources at the same positions, and one document behind the longest (graph).",
        source="released code: gapemp; gapemp_graph",
        choices=("sequential", "graph"),
    )


def segments(text: Text, count: int) -> list[int]:
    """Which segment each of the first tokens of a sequence is of: sources are below the prefix, documents above 0."""
    found = [QUERY] * count
    for number, span in enumerate(text, start=1):
        code = {"prefix": PREFIX, "source": PREFIX - number}.get(span.kind, number)
        found[span.start : span.end] = [code] * (span.end - span.start)
    return found


def sees(row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Whether queries of one segment see keys of another: documents the sources, what follows all."""
    return (row == key) | (row == QUERY) | ((row > QUERY) & (key < PREFIX))


def reading_places(text: Text, count: int) -> list[int]:
    """Sequential: where each of the first tokens stands to the sources, documents all right behind them."""
    found = list(range(count))
    documents = [span for span in text if span.kind == "document"]
    for span in documents:
        first = documents[0].start
        found[span.start : span.end] = range(first, first + span.end - span.start)
    return found


def graph_places(text: Text, count: int) -> list[int]:
    """Graph: where each of the first tokens stands, sources all behind the prefix, and the rest behind the longest."""
    prefix, pieces = without_prefix(text)
    lengths = [span.end - span.start for span in pieces if span.kind == "source"]
    found = [*range(prefix), *(prefix + place for length in lengths for place in range(length))]
    follows = prefix + max(lengths, default=0)
    return [*found, *range(follows, follows + count - len(found))]


class GraphKV(PlacedVariant):
    """Sources are read each by itself, documents behind the sources, what follows reads all."""

    config_class = GraphKVConfig
    config: GraphKVConfig
    name = "graph_kv"
    splits_by_head = True

    @property
    def segments(self) -> Callable[[Text, int], Sequence[int]]:
        return segments

    @property
    def places(self) -> Callable[[Text, int], Sequence[int]]:
        return graph_places if self.config.form == "graph" else reading_places

    def check_text(self, text: Text) -> None:
        super().check_text(text)
        kinds = [span.kind for span in text if span.kind != "prefix"]
        if unknown := [kind for kind in kinds if kind not in ("source", "document")]:
            raise ValueError(f"Graph-KV reads spans of the kinds prefix, source and document, got {unknown[0]!r}.")
        if kinds != sorted(kinds, reverse=True):
            raise ValueError("Graph-KV reads documents behind all sources: put the spans of kind 'source' first.")
        if self.config.form == "graph" and kinds.count("document") > 1:
            raise ValueError(
                f"form='graph' reads one document behind its sources, got {kinds.count('document')}: mark the others "
                "as sources, or use form='sequential'."
            )

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        facts = dict(super().key_facts(call))
        if self.config.form == "sequential":
            facts.pop(PLACE, None)  # keys stay where they are
        return facts

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        call = call.seeing(self.by_pair(call, sees))
        if self.config.form == "graph":
            return inner(self.placed(call))
        if self.rotary is None or not self.rotary.is_rotated:
            return inner(call)
        old = self.rotary.rotated_by(call)
        moved = self.of_rows(call, self.places, counts_on=True) - call.query_positions()
        other = self.rotary.turned(call.query, old, old + moved)
        return inner(with_two_queries(call, other, call.key_fact(SEGMENT) < PREFIX, by="graph_kv"))


_SPANS: list[Any] = [["prefix", 0, 1], ["source", 1, 3], ["document", 3, 4], ["document", 4, 6]]

register_variant(
    VariantInfo(
        name="graph_kv",
        variant=GraphKV,
        title="Graph-KV: Breaking Sequence via Injecting Structural Biases into Large Language Models",
        arxiv_id="2506.07334",
        year=2025,
        code="https://github.com/Graph-COM/GraphKV",
        summary="Documents in a prompt are read behind the texts that they draw on; the question reads all.",
        extra_parameters="none",
        needs_training=False,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "position_bias"},
        examples=(
            {"spans": _SPANS},
            {"spans": [["source", 0, 1], ["source", 1, 3], ["document", 3, 6]], "form": "graph"},
        ),
    )
)
