"""Sinks and recent keys (StreamingLLM, arXiv 2309.17453) against loops."""

import pytest
import torch

import patchattn

from .behaviour import close, text
from .families import FAMILIES, outputs
from .reference import tiny_llama
from .selecting import assert_reads

TOKENS = torch.arange(3, 15)[None]


@pytest.mark.parametrize(("sinks", "recent"), [(1, 3), (4, 2), (0, 5), (2, 1)])
def test_a_token_reads_sinks_and_recent_keys(sinks: int, recent: int) -> None:
    model = patchattn.patch_model(tiny_llama(), "streaming", sinks=sinks, recent=recent)
    assert_reads(model, TOKENS, lambda head, i, j: j < sinks or i - j < recent)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize(("sinks", "recent"), [(1, 3), (2, 2), (3, 1)])
def test_every_packed_text_has_sinks_of_its_own(family: str, sinks: int, recent: int) -> None:
    """Also where a sliding window of four keys hides the start of a text from its later tokens."""
    model, tokens = FAMILIES[family].make_exact(), text(8)
    patchattn.patch_model(model, "streaming", sinks=sinks, recent=recent)
    packed = torch.cat([tokens[:1], tokens[1:]], dim=1)
    positions = torch.arange(8).repeat(2)[None]
    together = outputs(model, input_ids=packed, position_ids=positions, use_cache=False)[0]
    close(together[:, :8], outputs(model, input_ids=tokens[:1])[0])
    close(together[:, 8:], outputs(model, input_ids=tokens[1:])[0])


def test_long_texts_are_computed_without_the_keys_between(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchattn.reading import selection

    model, tokens = FAMILIES["llama"].make(), text(40)
    patchattn.patch_model(model, "streaming", sinks=2, recent=9)
    masked = outputs(model, input_ids=tokens)[0]
    skipped, original = [], selection.block_sparse_attention

    def watched(*arguments: object) -> torch.Tensor:
        skipped.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(selection, "_PAYS_FROM", 1)
    monkeypatch.setattr(selection, "block_sparse_attention", watched)
    torch.testing.assert_close(outputs(model, input_ids=tokens)[0], masked, rtol=1e-4, atol=1e-4)
    assert len(skipped) == 2


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="recent must lie between 1"):
        patchattn.patch_model(tiny_llama(), "streaming", recent=0)
    with pytest.raises(NotImplementedError, match="does not support bidirectional or cross"):
        patchattn.patch_model(FAMILIES["bert"].make(), "streaming")


def test_only_causal_self_attention_is_patched() -> None:
    model = patchattn.patch_model(FAMILIES["llava"].make(), "streaming", sinks=1, recent=2)
    (patch,) = patchattn.patch_info(model).patches
    assert patch["sites"]
    assert all("language_model" in name for name in patch["sites"])
