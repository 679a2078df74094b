"""Which implementation runs, with which launch settings, and the masks that kernels take."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchattn_kernels import AttentionRule, backend, tuning
from patchattn_kernels.key_mask import key_mask, unsupported
from patchattn_kernels.tuning import Launch

CPU = torch.zeros(1)
CANDIDATES = [Launch({"BLOCK": 64}), Launch({"BLOCK": 128}, num_warps=8), Launch({"BLOCK": 32}, num_stages=3)]


def test_auto_and_reference_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "auto", "reference"):
        if value is None:
            monkeypatch.delenv("PATCHATTN_KERNELS", raising=False)
        else:
            monkeypatch.setenv("PATCHATTN_KERNELS", value)
        assert not backend.triton_runs(CPU)


def test_triton_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.triton_runs(CPU)
    with pytest.raises(NotImplementedError, match="logits have a softcap"):
        backend.triton_runs(CPU, lacking=unsupported(AttentionRule(scaling=1.0, softcap=30.0)))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(NotImplementedError, match="only Triton's interpreter runs"):
        backend.triton_runs(CPU)
    with pytest.raises(NotImplementedError, match="its tensors are on meta"):
        backend.triton_runs(CPU.to("meta"))
    monkeypatch.setenv("PATCHATTN_KERNELS", "tritn")
    with pytest.raises(ValueError, match="must be reference, triton or auto, got 'tritn'"):
        backend.triton_runs(CPU)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another process."""
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_chosen", {})


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU of which only the name is asked, and times that are given."""
    found: dict[str, Any] = {"device": torch.device("cuda", 0), "timed": [], "file": tmp_path / "kernels"}
    monkeypatch.setenv("PATCHATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(tuning, "_shared_memory", lambda device: (9, 227 * 1024))
    forget(monkeypatch)

    def bench(run: Any, **_: Any) -> float:
        found["timed"].append(run.args[0])
        return {64: 3.0, 128: 1.0, 32: 2.0}[run.args[0].blocks["BLOCK"]]

    monkeypatch.setattr("triton.testing.do_bench", bench)
    return found


def ran(candidates: list[Launch], device: torch.device, shape: dict[str, Any]) -> Launch:
    """What is launched last."""
    launched: list[Launch] = []
    tuning.run_chosen("kernel", shape, candidates, device, launched.append)
    return launched[-1]


def choose(gpu: dict[str, Any], length: int = 1000) -> Launch:
    return ran(CANDIDATES, gpu["device"], {"rows": tuning.bucket(length), "dtype": torch.bfloat16})


def test_nothing_is_tuned_unless_asked(gpu: dict[str, Any]) -> None:
    assert choose(gpu) == CANDIDATES[0]
    assert not gpu["timed"]
    assert not gpu["file"].exists()


def test_what_was_tuned_is_kept(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with tuning.tuning():
        assert choose(gpu) == CANDIDATES[1]
    assert gpu["timed"] == CANDIDATES
    forget(monkeypatch)
    assert choose(gpu) == CANDIDATES[1]
    assert choose(gpu, 513) == CANDIDATES[1]  # of the same bucket
    assert choose(gpu, 512) == CANDIDATES[0]
    assert len(gpu["timed"]) == 3
    (path,) = gpu["file"].iterdir()
    assert path.name.startswith("Some-GPU-triton")
    whole = path.read_text()
    for damaged in ("[", whole[:-5], "3\n", "\x00\n"):  # cut off, say: it is only a cache
        path.write_text(damaged)
        forget(monkeypatch)
        assert choose(gpu) == CANDIDATES[0]
    with tuning.tuning():
        choose(gpu)
    path.write_text(whole[:-5] + path.read_text())  # what comes after a line that is cut off counts
    forget(monkeypatch)
    assert choose(gpu) == CANDIDATES[1]


def test_a_choice_that_is_no_candidate_any_more(gpu: dict[str, Any]) -> None:
    with tuning.tuning():
        choose(gpu)
    tuning._chosen.clear()
    fewer = ran(CANDIDATES[::2], gpu["device"], {"rows": 1024, "dtype": torch.bfloat16})
    assert fewer == CANDIDATES[0]


def test_on_a_cpu_the_first_one_is_taken() -> None:
    with tuning.tuning():
        assert ran(CANDIDATES, torch.device("cpu"), {}) == CANDIDATES[0]


@pytest.mark.parametrize(("length", "power"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_buckets(length: int, power: int) -> None:
    assert tuning.bucket(length) == power


@given(
    st.integers(1, 7),
    st.integers(1, 9),
    st.sampled_from(["none", "padding", "whole"]),
    st.booleans(),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 2**30),
)
@settings(max_examples=80, deadline=None)
def test_masks_of_kernels(
    queries: int, keys: int, kind: str, causal: bool, window: int, packed: bool, seed: int
) -> None:
    """Mask, bounds, causality and window together show what the rule shows, key by key."""
    source = torch.Generator().manual_seed(seed)
    mask = {
        "none": None,
        "padding": torch.rand(2, keys, generator=source) > 0.4,
        "whole": torch.rand(2, 1, queries, keys, generator=source) > 0.4,
    }[kind]
    offset = keys - queries
    sequence = torch.arange(keys) // 3 if packed and kind != "whole" and queries == keys else None
    rule = AttentionRule(scaling=1.0, mask=mask, causal=causal, window=window or None, sequence=sequence)
    if offset < 0 and (window or causal):
        return  # queries before all keys
    found = key_mask(rule, queries, keys, torch.device("cpu"))
    for batch in range(2 if mask is not None else 1):
        shown = rule.visible(slice(0, queries), (queries, keys), torch.device("cpu"))
        shown = shown[min(batch, len(shown) - 1)]
        for row in range(queries):
            for key in range(keys):
                own = row + found.offset
                seen = not found.causal or key <= own
                seen = seen and (found.window == 0 or abs(own - key) < found.window)
                if found.mask is not None and found.first is not None and found.last is not None:
                    place = (min(batch, len(found.mask) - 1), min(row, found.mask.shape[1] - 1))
                    seen = seen and bool(found.mask[(*place, key)])
                    inside = int(found.first[place]) <= key < int(found.last[place])
                    assert inside or not found.mask[(*place, key)]
                assert seen == bool(shown[row, key])
