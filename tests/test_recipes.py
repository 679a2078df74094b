"""Recipes and examples: they run, what they save loads, and a bad configuration is refused before a model is loaded."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import patchattn

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_causal_lm", ROOT / "recipes" / "finetune_causal_lm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a patch that could be undone. " * 60)
    files = {"train_file": str(text), "eval_file": str(text), "output": str(tmp_path / "out")}
    return {"model": "no/model", **files, "block": 64, "steps": 3, "batch": 2}


def written(settings: dict[str, Any], folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "unknown key 'stepz'; did you mean 'steps'"),
        ({"steps": "many"}, "steps must be int, got 'many'"),
        ({"steps": 0}, "steps must be positive"),
        ({"learning_rate": True}, "learning_rate must be float"),
        ({"variants": {"mho": {}}}, "did you mean 'moh'"),
        ({"variants": {"moh": {"active_ratio": 2.0}}}, "active_ratio must lie between"),
        ({"variants": ["moh"]}, "variants must be dict"),
        ({"eval_file": "nowhere.txt"}, "no file 'nowhere.txt'"),
    ],
)
def test_bad_configurations_are_refused(recipe, settings, changes, message, tmp_path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        recipe.read_recipe(written({**settings, **changes}, tmp_path))


def test_bad_files_are_refused(recipe, settings, tmp_path) -> None:
    with pytest.raises(ValueError, match="There is no configuration"):
        recipe.read_recipe(tmp_path / "none.yaml")
    path = tmp_path / "bad.yaml"
    for text, message in (("a: [", "is no YAML"), ("- a", "must hold a mapping"), ("steps: 3", "lacks model")):
        path.write_text(text)
        with pytest.raises((TypeError, ValueError), match=message):
            recipe.read_recipe(path)
    script = [sys.executable, str(ROOT / "recipes" / "finetune_causal_lm.py"), str(path)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_the_shipped_configurations_name_what_exists(recipe) -> None:
    for path in (ROOT / "recipes" / "configs").glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        with pytest.raises(ValueError, match=f"There is no file '{content['train_file']}'"):
            recipe.read_recipe(path)  # all else in it is right


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_learns_and_what_it_saves_loads(recipe, settings, rank, tmp_path, data_dir) -> None:
    model = str(data_dir / "models" / "stories260K")
    variants = {"ssa": None, "moh": {"active_ratio": 0.5}}
    given = {**settings, "model": model, "variants": variants, "lora_rank": rank, "steps": 8}
    metrics = recipe.run(recipe.read_recipe(written(given, tmp_path)))
    assert metrics["perplexity_after"] < metrics["perplexity_before"]
    assert metrics["perplexity_before"] != metrics["perplexity_unpatched"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    loaded = patchattn.from_pretrained(tmp_path / "out")
    assert [patch["variant"] for patch in patchattn.patch_info(loaded)["patches"]] == ["ssa", "moh"]


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "examples").glob("*.py"))])
def test_examples_run(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    assert done.stdout.count("passed") == 4
