"""The benchmark of claims of vision-language methods: what is asked and kept, that it goes on, and the page."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from patchattn.evaluation.tasks import collages

from .photo_vlm import parts
from .recipes import ROOT, recipe
from .test_train_photo_vlm import TINY

SETTINGS = ["dense", "a grey picture", "random third", "decore"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import vlm_claims

    return vlm_claims


@pytest.fixture(scope="module")
def measured(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A trained model, and a folder with rows of it."""
    folder = tmp_path_factory.mktemp("claims")
    given, module = parts(folder), recipe("train_photo_vlm")
    module.run(module.PhotoVLMSettings(output=str(folder / "model"), **{**TINY, **given, "steps": 1}))
    (folder / "heads.json").write_text("[[0, 0], [1, 1]]")
    script.claim(folder / "model", folder / "rows")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    processor, photos = AutoProcessor.from_pretrained(folder / "model"), collages.Photos(given["eval_photos"])

    def measure(most: int) -> None:
        script.measure(
            model, processor, photos, folder / "heads.json", folder / "rows", 1e9, 2, [*SETTINGS, "hiprune 1/3"], most
        )

    measure(2)
    return {"folder": folder, "photos": photos, "measure": measure, "model": model, "processor": processor}


def test_answers_are_those_of_one_prompt_after_the_other(script: ModuleType, measured: dict[str, Any]) -> None:
    rows = script.read_rows(measured["folder"] / "rows" / "answers.jsonl")
    model, processor = measured["model"], measured["processor"]
    yes, no = processor.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    for index in range(2):
        scene = measured["photos"].scene(script.PICTURES_SEED, index)
        names = [scene.present(), *(scene.absent(kind) for kind in ("random", "popular", "adversarial"))]
        for place, name in enumerate(names):
            content = [{"type": "image"}, {"type": "text", "text": collages.question(name)}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(images=scene.picture(56), text=text, return_tensors="pt")
            with torch.inference_mode():
                logits = model(**inputs).logits[0, -1]
            row = rows[f"dense/{index}"]
            assert row["margin"][place] == pytest.approx(float(logits[yes] - logits[no]), abs=0.011)
            assert row["said"][place] == {yes: "Y", no: "N"}.get(int(logits.argmax()), "?")
    assert set(rows) == {f"{name}/{i}" for name in SETTINGS for i in range(2)} | {"hiprune 1/3/refused"}
    assert "set middle_layer" in rows["hiprune 1/3/refused"]["why"]  # eight layers are more than two
    assert rows["a grey picture/0"]["margin"] != rows["dense/0"]["margin"]


def test_it_goes_on_and_writes_the_page(script: ModuleType, measured: dict[str, Any]) -> None:
    file = measured["folder"] / "rows" / "answers.jsonl"
    before = file.read_text()
    measured["measure"](2)
    assert file.read_text() == before
    measured["measure"](4)
    assert file.read_text().startswith(before)
    page = "\n".join(script.page(measured["folder"] / "rows", measured["photos"]))
    assert "\n4 pictures, each of" in page
    assert "| VCD: more answers are right | vcd | dense | | | | not measured |" in page
    assert "Refused: hiprune 1/3: HiPrune finds no attention" in page


def test_rows_of_another_training_are_refused(script: ModuleType, measured: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="holds rows of another training"):
        script.claim(tmp_path, measured["folder"] / "rows")


def test_measures_by_hand(script: ModuleType, measured: dict[str, Any]) -> None:
    """One picture of a cat and a dog: right are yes and two of three no; the caption invents a ship, twice."""
    from vlm_parts.page import Captions, accuracy

    scene = collages.Scene(measured["photos"], ("cat", "dog"), (0, 1), (0, 0), (0, 0))
    row = {"said": "YNY?", "caption": "There is a cat, a ship and a ship."}
    captions = Captions(measured["photos"])
    assert accuracy(row, scene) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert captions.invented(row, scene) == 2
    assert captions.mentions(row, scene) == 3
    assert captions.recall(row, scene) == 0.5
    assert captions.f1(row, scene) == pytest.approx(2 * 1 / (2 + 2))
    assert captions.words(row, scene) == 9


def test_verdicts(script: ModuleType) -> None:
    """More right in every picture is shown; fewer inventions by saying nothing are shown at a loss of F1."""
    from vlm_parts.page import claims_table

    def values(accuracy: float, invented: float, f1: float) -> dict[str, list[float]]:
        wobble = [0.0, 0.01, -0.01, 0.02]
        return {
            "accuracy": [accuracy + each for each in wobble],
            "invented": [invented + each for each in wobble],
            "f1": [f1 + each for each in wobble],
        }

    lines = claims_table({"dense": values(0.5, 1.0, 0.8), "vhr": values(0.7, 0.2, 0.3), "vcd": values(0.4, 1.0, 0.8)})
    found = {line.split(" | ")[0][2:]: line.rsplit(" | ", 1)[1] for line in lines[2:]}
    assert found["VHR: more answers are right"] == "shown |"
    assert found["VHR: captions invent less"] == "shown, at a loss of F1 |"
    assert found["VCD: more answers are right"] == "not shown |"
    assert found["VCD: captions invent less"] == "not shown, all pairs alike |"


def test_a_quarter() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from vlm_parts.asking import quarter

    grid = torch.zeros(4, 4)
    grid[0, 3], grid[3, 3] = 3.0, 1.0
    assert [quarter(grid, cell) for cell in range(4)] == [0.0, 0.75, 0.0, 0.25]
