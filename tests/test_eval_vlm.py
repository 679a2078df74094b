"""POPE and CHAIR as tasks: through the runner, against the runners that they had before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import patchattn
from patchattn.evaluation.run.compare import compare
from patchattn.evaluation.tasks import shapes
from patchattn.evaluation.tasks.chair import read_objects, run_chair
from patchattn.evaluation.tasks.pope import read_pope, run_pope
from patchattn.evaluation.tasks.registry import make_tasks

from .recipes import recipe

COUNT = 5


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, Any]:
    """An untrained LLaVA and its processor."""
    module = recipe("train_tiny_vlm")
    settings = module.TinyVLMSettings(output="none", steps=1, vision_width=32, text_width=32, patch_size=12)
    processor = module.make_processor(settings)
    torch.manual_seed(0)
    model = module.make_model(settings, processor.tokenizer).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4)
    return model, processor


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Settings of both tasks, on pictures of shapes."""
    scenes = list(shapes.scenes(0, COUNT))
    for index, scene in enumerate(scenes):
        scene.picture().save(tmp_path / f"{index}.png")
    questions = [
        {"question_id": i, "image": f"{i}.png", "text": shapes.question(s.present()), "label": "yes"}
        for i, s in enumerate(scenes)
    ]
    (tmp_path / "pope.json").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "objects.json").write_text(json.dumps({str(i): list(s.objects) for i, s in enumerate(scenes)}))
    (tmp_path / "synonyms.txt").write_text(shapes.synonym_table())
    images = {"images": str(tmp_path), "max_new_tokens": 6}
    return {
        "pope": {"questions": str(tmp_path / "pope.json"), **images},
        "chair": {
            "objects": str(tmp_path / "objects.json"),
            "synonyms": str(tmp_path / "synonyms.txt"),
            "pattern": "{}.png",
            **images,
        },
    }


def test_both_tasks(vlm: tuple[Any, Any], settings: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    tasks = make_tasks(["pope", "chair"], "vision_language", settings=settings)
    runs = {"half": {"moh": {"active_ratio": 0.5}}}
    report = compare(*vlm, tasks, tmp_path / "out", runs, batch=2)
    model, processor = vlm
    questions = read_pope(settings["pope"]["questions"])
    objects = read_objects(settings["chair"]["objects"], "{}.png")
    for name in ("unpatched", "half"):
        if name == "half":
            patchattn.patch_model(model, "moh", active_ratio=0.5)
        try:
            expected = run_pope(model, processor, questions, tmp_path, tmp_path / name / "p", batch=2, max_new_tokens=6)
            table = settings["chair"]["synonyms"]
            more = run_chair(
                model, processor, objects, tmp_path, table, tmp_path / name / "c", batch=2, max_new_tokens=6
            )
        finally:
            if name == "half":
                patchattn.unpatch_model(model)
        found = {task: report["tasks"][task]["runs"][name] for task in ("pope", "chair")}
        assert found["pope"]["scores"] == pytest.approx({key: 100 * value for key, value in expected.items()})
        for key, value in more.items():
            share = key in ("chair_s", "chair_i", "recall")
            assert found["chair"]["scores"][key] == pytest.approx(100 * value if share else value)
        assert found["pope"]["costs"]["first_token_seconds"] > 0
        rows = [json.loads(line) for line in (tmp_path / name / "p").read_text().splitlines()]
        answers = tmp_path / "out" / name / "pope" / "process_0.jsonl"
        kept = [json.loads(line) for line in answers.read_text().splitlines()]
        assert [row["answer"] for row in kept] == [row["answer"] for row in rows]


def test_mistakes(settings: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    def make(task: str, **changes: Any) -> None:
        make_tasks([task], "vision_language", settings={task: {**settings[task], **changes}})

    with pytest.raises(ValueError, match="questions, images must be given"):
        make_tasks(["pope"], "vision_language")
    with pytest.raises(ValueError, match="batch is not a setting of pope"):
        make("pope", batch=2)
    with pytest.raises(ValueError, match="There is no image folder"):
        make("pope", images=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="pope is for a vision-language model, got a causal language model"):
        make_tasks(["pope"], "causal_lm", settings={"pope": settings["pope"]})
    (tmp_path / "objects.json").write_text(json.dumps({"0": ["red circel"]}))
    with pytest.raises(ValueError, match="did you mean 'red circle'"):
        make("chair")
    (tmp_path / "objects.json").write_text(json.dumps({"77": ["red circle"]}))
    with pytest.raises(ValueError, match="lacks 1 of the 1 images"):
        make("chair")
