"""Complementary rotary bases: against a search written out, and what the released code finds for Llama."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from patchattn.calibration.rotary_bases import Wave, complementary_bases, rotary_frequencies, wave_of
from patchattn.cli import main as cli

from .families import FAMILIES
from .long_context import BYTES, tiny_llama

LLAMA = 10000.0 ** (-2 * torch.arange(64, dtype=torch.float64) / 128)


def heights(base: float, dim: int, first: int, last: int) -> dict[int, float]:
    return {m: sum(np.cos(m * base ** (-2 * pair / dim)) for pair in range(dim // 2)) for m in range(first, last + 1)}


def by_loops(base: float, dim: int, first: int, last: int) -> tuple[list[int], list[int]]:
    """Peaks and troughs, from the highest peak on, and from the lowest trough back."""
    height = heights(base, dim, first, last)
    inner = range(first + 1, last)
    high = [m for m in inner if height[m] > max(height[m - 1], height[m + 1])]
    low = [m for m in inner if height[m] < min(height[m - 1], height[m + 1])]
    peaks = [sorted(high, key=height.__getitem__)[-1]]
    while len(peaks) < 6 and (near := [m for m in high if 50 < m - peaks[-1] <= 550]):
        peaks.append(sorted(near, key=height.__getitem__)[-1])
    troughs = [sorted(low, key=height.__getitem__)[0]]
    while len(troughs) < 6 and (before := [m for m in low if troughs[0] - m > 60]):
        troughs.insert(0, sorted(before, key=height.__getitem__)[0])
    return peaks, troughs


@pytest.mark.parametrize("multiple", [1.0, 1.7, 0.4])
def test_a_wave(multiple: float) -> None:
    found = wave_of(LLAMA, multiple, (300, 2300))
    peaks, troughs = by_loops(10000 * multiple, 128, 300, 2300)
    assert found == Wave(tuple(peaks), tuple(troughs))
    assert len(peaks) > 2 < len(troughs)


def greedy(base: float, dim: int, distances: tuple[int, int], candidates: list[float], count: int) -> list[float]:
    """The best of all candidates, again and again, by pairs of places; covered are those within 4 tokens."""
    waves = {each: by_loops(base * each, dim, *distances) for each in (1.0, *candidates)}
    chosen = [1.0]
    for _ in range(count):
        best = None
        for each in candidates:
            if each in chosen:
                continue
            offsets = []
            for kind in (0, 1):
                others = [m for one in chosen for m in waves[one][1 - kind]]
                for place in (m for one in chosen for m in waves[one][kind]):
                    gap = min(abs(place - m) for m in waves[each][1 - kind])
                    if gap <= 4 and min(abs(place - m) for m in others) > 4:
                        offsets.append(gap)
            if offsets and (best is None or (-len(offsets), np.mean(np.square(offsets)), each) < best):
                best = (-len(offsets), np.mean(np.square(offsets)), each)
        if best is None:
            break
        chosen.append(best[2])
    return sorted(chosen[1:])


@pytest.mark.parametrize(("base", "dim"), [(10000.0, 64), (500.0, 32)])
def test_the_search(base: float, dim: int) -> None:
    frequencies = base ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    candidates = [round(1.1 + step / 10, 1) for step in range(12)]
    for count in (1, 3, 12):
        found = complementary_bases(frequencies, count=count, distances=(200, 900), candidates=candidates, within=4)
        assert list(found.bases) == greedy(base, dim, (200, 900), candidates, count)
        assert 0 < found.covered <= found.troughs


def test_what_the_released_code_finds_for_llama() -> None:
    """Run from the base 10000 on, it adds 18000, 20500, 15500, 16000 and 19000."""
    assert complementary_bases(LLAMA).bases == (1.55, 1.6, 1.8, 1.9, 2.05)


def test_frequencies_of_a_model_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(num_hidden_layers=2)
    frequencies, length = rotary_frequencies(model)
    assert length == model.config.max_position_embeddings
    torch.testing.assert_close(frequencies, model.model.rotary_emb.inv_freq.double(), rtol=1e-6, atol=1e-9)
    for part in (model, BYTES):
        part.save_pretrained(tmp_path / "model")
    out = tmp_path / "bases.json"
    command = ["calibrate", "bases", str(tmp_path / "model"), "--count", "2", "--last", "900", "--first", "100"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--highest", "2", "--output", str(out), "--device", "cpu"])
    assert ended.value.code in (0, None)
    candidates = [round(1 + step / 20, 2) for step in range(1, 21)]
    found = complementary_bases(frequencies, count=2, distances=(100, 900), candidates=candidates)
    written = json.loads(out.read_text())
    assert written["bases"] == list(found.bases)
    assert list(written["waves"]) == ["1.0", *map(str, found.bases)]
    assert f"{found.covered} of {found.troughs} troughs" in capsys.readouterr().out


def test_what_is_refused() -> None:
    for settings, says in (
        ({"count": 0}, "count must be"),
        ({"distances": (9, 9)}, "Distances are"),
        ({"candidates": []}, "Candidates are"),
        ({"candidates": [0.0]}, "Candidates are"),
        ({"distances": (5, 7)}, "no peak or no trough"),
    ):
        with pytest.raises(ValueError, match=says):
            complementary_bases(LLAMA, **settings)  # type: ignore[arg-type]
    gemma = FAMILIES["gemma3_text"].make()
    gemma.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="different frequencies"):
        rotary_frequencies(type(gemma)(gemma.config))
    with pytest.raises(NotImplementedError, match="are learned"):
        rotary_frequencies(FAMILIES["gpt2"].make())
