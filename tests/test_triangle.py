"""TriangleMix (arXiv 2507.21526) against loops: a call's last tokens read all, others sinks and recent keys."""

from typing import Any

import pytest
import torch

import patchattn
from patchattn.reading import selection

from .behaviour import decoded, text
from .families import FAMILIES, outputs
from .reference import tiny_llama
from .selecting import assert_reads, assert_texts_are_apart, recorded

TOKENS = torch.arange(3, 23)[None]


@pytest.mark.parametrize(("last", "sinks", "recent"), [(1, 1, 2), (4, 2, 3), (0, 3, 1), (5, 0, 4)])
def test_the_last_tokens_read_all_keys_and_others_sinks_and_recent_ones(last: int, sinks: int, recent: int) -> None:
    model = patchattn.patch_model(tiny_llama(), "triangle", last=last, sinks=sinks, recent=recent, dense_layers=0)
    assert_reads(model, TOKENS, lambda head, i, j: i >= 20 - last or j < sinks or i - j < recent)


def test_each_chunk_has_last_tokens_and_single_ones_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_llama(), recorded(monkeypatch)
    patchattn.patch_model(model, "triangle", last=2, sinks=1, recent=2, dense_layers=0)
    decoded(model, TOKENS, [7, 9, 2, 1, 1])
    done = 0
    for (_, seen, _), size in zip(calls, [7, 9, 2, 1, 1], strict=True):
        for row in range(size):
            i = done + row
            read = {j for j in range(i + 1) if row >= size - 2 or j < 1 or i - j < 2}
            for head in range(4):
                assert set(seen[0, head, row].nonzero().flatten().tolist()) == read
        done += size


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_are_counted_from_the_ends_of_each_text(side: str) -> None:
    """Beside padding on either side, and in packed texts."""
    model = FAMILIES["llama"].make_exact()
    patchattn.patch_model(model, "triangle", last=3, sinks=2, recent=2, dense_layers=0)
    assert_texts_are_apart(model, side)


@pytest.mark.parametrize("implementation", ["sdpa", "compiled"])
def test_long_prompts_are_computed_in_two_parts(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = FAMILIES["llama"].make(), text(40)
    patchattn.patch_model(model, "triangle", last=5, sinks=2, recent=9, dense_layers=0)
    masked = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [16, 20, 1, 3])
    given: list[Any] = []
    original = selection.block_sparse_attention

    def watched(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
        given.append(query.shape[2])
        return original(query, *arguments)

    monkeypatch.setattr(selection, "_PAYS_FROM", 1)
    monkeypatch.setattr(selection, "block_sparse_attention", watched)
    if implementation == "compiled":
        torch._dynamo.reset()
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(outputs(model, input_ids=tokens)[0], masked[0], rtol=1e-4, atol=1e-4)
        return
    torch.testing.assert_close(outputs(model, input_ids=tokens)[0], masked[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded(model, tokens, [16, 20, 1, 3]), masked[1], rtol=1e-4, atol=1e-4)
    assert given == [35, 35, 11, 11]  # later chunks come with a mask of rows


def test_half_of_the_layers_stay_dense_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_llama(num_hidden_layers=5), recorded(monkeypatch)
    patchattn.patch_model(model, "triangle")
    outputs(model, input_ids=TOKENS)
    assert [call.site.layer_index for call, _, _ in calls] == [2, 3, 4]


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="recent must lie between 1"):
        patchattn.patch_model(tiny_llama(), "triangle", recent=0)
    with pytest.raises(NotImplementedError, match="does not support bidirectional or cross"):
        patchattn.patch_model(FAMILIES["vit"].make(), "triangle")
