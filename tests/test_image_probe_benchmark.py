"""benchmarks/image_probe.py: a run that goes on where it stopped, and a page of what there is."""

import importlib.util
import io
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification, Dinov2Model

import patchattn

ROOT = Path(__file__).parents[1]
pytest.importorskip("sklearn")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = ROOT / "benchmarks" / "image_probe.py"
    specification = importlib.util.spec_from_file_location("image_probe", path)
    assert specification is not None
    assert specification.loader is not None
    found = importlib.util.module_from_spec(specification)
    monkeypatch.setattr(sys, "path", [*sys.path])
    specification.loader.exec_module(found)
    forms = {"dense": None, "window 2": ("window", {"size": 2}), "prune 50 %": ("prune", {"sparsity": 0.5})}
    monkeypatch.setattr(found, "FORMS", forms)
    monkeypatch.setattr(found, "CLAIMS", (("half can go", "prune 50 %", "dense", 2),))
    monkeypatch.setattr(found, "SCORED", 1)
    return found


@pytest.fixture
def work(tmp_path: Path) -> dict[str, Any]:
    """A tiny tower, and images of three classes, dark, grey and bright ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 1}
    Dinov2Model(Dinov2Config(**sizes, image_size=16, patch_size=4)).save_pretrained(tmp_path / "model")
    BitImageProcessor().save_pretrained(tmp_path / "model")
    for split, count in (("train", 4), ("test", 3)):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for label, low in (("dark", 0), ("grey", 100), ("bright", 200)):
                for number in range(count):
                    pixels = np.random.default_rng(number).integers(low, low + 55, (8, 8, 3), dtype=np.uint8)
                    file = io.BytesIO()
                    Image.fromarray(pixels).save(file, "jpeg")
                    archive.writestr(f"{split}/{label}/{number}.jpg", file.getvalue())
    files = {split: tmp_path / f"{split}.zip" for split in ("train", "test")}
    return {"model": tmp_path / "model", **files, "folder": tmp_path / "kept", "output": tmp_path / "page.md"}


def test_it_goes_on_and_tells_what_is_shown(
    script: ModuleType, work: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {**work, "pixels": 16, "steps": 3}
    done = iter([0.0] * 7)  # seconds: time for three probes and the first step, and no more
    monkeypatch.setattr(script.time, "process_time", lambda: next(done, 9.0))
    script.main(**how, seconds=1.0)
    rows = (work["folder"] / "answers.jsonl").read_text()
    assert rows.count("\n") == 4
    assert "9 images for training and 3 for testing" in work["output"].read_text()
    monkeypatch.setattr(script.time, "process_time", lambda: 0.0)
    script.main(**how, seconds=1.0)
    assert (work["folder"] / "answers.jsonl").read_text().startswith(rows)
    text = work["output"].read_text()
    assert "9 images for training and 9 for testing" in text
    assert "| dense | 100.0 |  | not measured |" in text  # which are told apart
    (claim,) = [line for line in text.splitlines() if line.startswith("| half can go | prune 50 % | dense |")]
    assert claim.endswith(("| 2 | shown |", "| 2 | not shown |"))
    script.main(**how, speed=True)
    assert "not measured" not in work["output"].read_text()


def test_what_was_trained_is_a_form_too(script: ModuleType, work: dict[str, Any], tmp_path: Path) -> None:
    for name in ("dinov2_cifar10_dense", "dinov2_cifar10_moh75"):
        model = Dinov2ForImageClassification.from_pretrained(work["model"], num_labels=3)
        if "moh" in name:
            patchattn.patch_model(model, "moh", active_ratio=0.75)
        model.save_pretrained(tmp_path / name)
    script.main(**work, pixels=16, steps=3, tuned=tmp_path)
    rows = [line.split(" | ")[0] for line in work["output"].read_text().splitlines()]
    assert [each for each in rows if each.endswith(", tuned")] == ["| dense, tuned", "| moh 75 %, tuned"]
    forms = script.Forms(Dinov2Model.from_pretrained(work["model"]), None, tmp_path)
    for form, patches in (("dense, tuned", 0), ("moh 75 %, tuned", 1)):
        with forms(form) as tower:
            assert len(patchattn.patch_info(tower)["patches"]) == patches


@pytest.mark.parametrize(("right", "verdict"), [([1] * 40, "shown"), ([1] * 20 + [0] * 20, "not shown")])
def test_a_claim_is_shown_by_two_standard_errors(script: ModuleType, right: list[int], verdict: str) -> None:
    line = script.claim({"form": right, "dense": [1] * 40}, "it keeps up", "form", "dense", 2)
    assert line.endswith(f"| 2 | {verdict} |")


def test_other_classes_are_refused(script: ModuleType, work: dict[str, Any]) -> None:
    with zipfile.ZipFile(work["test"], "w") as archive:
        archive.writestr("test/blue/0.jpg", b"")
    with pytest.raises(
        ValueError, match=r"Classes differ: \['bright', 'dark', 'grey'\] to train on, \['blue'\] to test"
    ):
        script.main(**work)
