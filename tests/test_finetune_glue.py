"""The GLUE recipe: every row of its table is trained alike, finished runs are left alone, two processes compute what
one does, and what is wrong is refused before a model is loaded."""

import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

import patchattn

from .recipes import RECIPES, recipe, sst2_files, started, tiny_encoder, written

MOH = {"moh": {"active_ratio": 0.5, "router": "learned"}, "ssa": {}}


@pytest.fixture(scope="module")
def glue() -> ModuleType:
    return recipe("finetune_glue")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SST-2 and STS-B in their layouts, with numbers of rows that fit neither the batches nor two processes."""
    folder = tmp_path_factory.mktemp("glue")
    (folder / "STS-B").mkdir()
    for name, rows in sst2_files(folder).items():
        pairs = [(text, other, 5.0 * (label == same)) for (text, label), (other, same) in pairwise(rows)]
        lines = ["sentence1\tsentence2\tscore", *(f"{a}\t{b}\t{score:.3f}" for a, b, score in pairs)]
        (folder / "STS-B" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def settings(model: str, data: Path, tmp_path: Path) -> dict[str, Any]:
    training = {"steps": 6, "batch": 4, "eval_batch": 3, "max_length": 24, "learning_rate": 5e-3, "lora_rank": 2}
    return {
        "model": model,
        "data": str(data),
        "output": str(tmp_path / "out"),
        "tasks": ["sst2"],
        "runs": {"MoH 50 %": MOH},
        "training": training,
    }


def run(glue: ModuleType, settings: dict[str, Any]) -> dict[str, Any]:
    return glue.run(glue.GlueSettings.from_dict(settings))


def record(glue: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every training starts from and sees, one dictionary per run."""
    seen: list[dict[str, Any]] = []

    class Recording(glue.PatchedTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            weights = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
            seen.append({"batches": [], "weights": weights, "balance": self.balance_weight})

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                seen[-1]["batches"].append(inputs["input_ids"].tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(glue, "PatchedTrainer", Recording)
    return seen


def test_every_row_is_trained_alike_and_stands_in_the_table(
    glue: ModuleType, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = record(glue, monkeypatch)
    training = {**settings["training"], "balance_weight": 0.01}
    results = run(glue, {**settings, "seeds": [3, 5], "training": training})
    assert [len(one["batches"]) for one in seen] == [6] * 4
    assert [one["balance"] for one in seen] == [0.0, 0.01] * 2
    for base, patched in zip(seen[::2], seen[1::2], strict=True):
        assert base["batches"] == patched["batches"]
        head = [name for name in base["weights"] if "classifier" in name]
        assert head
        for name in head:
            assert torch.equal(base["weights"][name], patched["weights"][name])
        assert len(patched["weights"]) > len(base["weights"])
    assert seen[0]["batches"] != seen[2]["batches"]

    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["tasks"]) == ["sst2"]
    rows = results["tasks"]["sst2"]
    assert list(rows) == ["unpatched", "MoH 50 %"]
    for index, (values, folder) in enumerate(zip(rows.values(), ("unpatched", "MoH_50"), strict=True)):
        runs = [tmp_path / "out" / "sst2" / folder / f"seed_{seed}" for seed in (3, 5)]
        each = np.array([json.loads((one / "metrics.json").read_text())["after"]["accuracy"] for one in runs])
        score = values["scores"]["accuracy"]
        assert score["values"] == each.tolist()
        assert score["mean"] == pytest.approx(each.mean())
        assert score["sd"] == pytest.approx(each.std(ddof=1))
        assert values["active_ratio"] == (1.0, 0.5)[index]
        assert (values["train_rows"], values["eval_rows"]) == (21, 14)
        assert values["trained_parameters"] == sum(weight.numel() for weight in seen[index]["weights"].values())
        # without keep_models nothing else stays
        assert {path.name for path in runs[0].iterdir()} == {"settings.json", "metrics.json"}
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert table[0] == "sst2: 21 rows to train on, 14 to evaluate on; seeds 3, 5"
    score = rows["unpatched"]["scores"]["accuracy"]
    assert table[4].startswith(f"| unpatched | {100 * score['mean']:.1f} ± {100 * score['sd']:.1f} | 100.0 | ")
    assert len({line.count("|") for line in table[2:6]}) == 1


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_the_score_is_that_of_the_saved_model_row_by_row(
    glue: ModuleType, settings: dict[str, Any], task: str, data: Path, tmp_path: Path
) -> None:
    """Trained in full; every validation row counts once, whatever the batches."""
    training = {**settings["training"], "lora_rank": 0, "steps": 25}
    results = run(glue, {**settings, "tasks": [task], "training": training, "keep_models": True})
    folder = tmp_path / "out" / task / "MoH_50" / "seed_0"
    trained = patchattn.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (data / {"sst2": "SST-2", "stsb": "STS-B"}[task] / "dev.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    with torch.no_grad():
        logits = [trained(**tokenizer(*row[:-1], return_tensors="pt")).logits[0].double().numpy() for row in rows]
    labels = np.array([float(row[-1]) for row in rows])
    if task == "sst2":
        name, expected = "accuracy", np.mean(np.argmax(logits, axis=1) == labels)
        assert expected > 0.7
    else:
        name, expected = "pearson", np.corrcoef(np.ravel(logits), labels)[0, 1]
    assert results["tasks"][task]["MoH 50 %"]["scores"][name]["values"] == [pytest.approx(expected, rel=1e-4)]


def test_finished_runs_are_left_alone_and_others_done_as_before(
    glue: ModuleType, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stop in the second run stands for a kill: what was finished is on the disk, whole."""
    with monkeypatch.context() as stopped:
        train, calls = glue.train, []

        def once(*args: Any, **kwargs: Any) -> dict[str, Any]:
            if calls:
                raise KeyboardInterrupt
            calls.append(args)
            return train(*args, **kwargs)

        stopped.setattr(glue, "train", once)
        with pytest.raises(KeyboardInterrupt):
            run(glue, settings)
    files = {row: tmp_path / "out" / "sst2" / row / "seed_0" / "metrics.json" for row in ("unpatched", "MoH_50")}
    before = files["unpatched"].read_text()
    assert not files["MoH_50"].exists()
    seen = record(glue, monkeypatch)
    results = run(glue, settings)
    assert len(seen) == 1
    assert files["unpatched"].read_text() == before
    scores = {row: json.loads(path.read_text())["after"] for row, path in files.items()}
    straight = run(glue, {**settings, "output": str(tmp_path / "straight")})
    for row, name in (("unpatched", "unpatched"), ("MoH 50 %", "MoH_50")):
        value = scores[name]["accuracy"]
        assert results["tasks"]["sst2"][row]["scores"] == straight["tasks"]["sst2"][row]["scores"]
        assert straight["tasks"]["sst2"][row]["scores"]["accuracy"]["values"] == [value]

    del seen[:]
    assert run(glue, settings) == results
    more = run(glue, {**settings, "seeds": [0, 1], "runs": {"unpatched": {}}})
    assert len(seen) == 1  # the seed that is new
    assert more["tasks"]["sst2"]["unpatched"]["seeds"] == [0, 1]
    for changes in ({"steps": 7}, {"lora_rank": 4}):
        changed = {**settings, "training": {**settings["training"], **changes}}
        with pytest.raises(ValueError, match=f"other settings \\({next(iter(changes))}: .* became"):
            run(glue, changed)


@pytest.mark.slow  # the same of the recipe for language models is in the default suite
def test_two_processes_compute_what_one_does(glue: ModuleType, settings: dict[str, Any], tmp_path: Path) -> None:
    """Two processes see the batches that one process accumulates; 13 rows to evaluate in batches of 3."""
    given = {**settings, "tasks": ["stsb"], "output": str(tmp_path / "two")}
    done = started(RECIPES / "finetune_glue.py", written(given, tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[2/2] stsb, MoH 50 %, seed 0: pearson") == 1
    assert "| MoH 50 % |" in done.stdout
    one = run(glue, {**settings, "tasks": ["stsb"], "training": {**settings["training"], "accumulation": 2}})
    theirs = json.loads((tmp_path / "two" / "results.json").read_text())
    for row, values in one["tasks"]["stsb"].items():
        for name, score in values["scores"].items():
            ours = theirs["tasks"]["stsb"][row]["scores"][name]["values"]
            assert ours == pytest.approx(score["values"], rel=1e-3), (row, name)


def change(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings with changes; those of `training` are merged."""
    changes = dict(changes)
    training = {**settings["training"], **changes.pop("training", {})}
    return {**settings, "model": "no/model", "training": training, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taks": []}, r"recipe\.yaml: There is no setting 'taks'; did you mean 'tasks'"),
        ({"tasks": ["sst-2"]}, "GLUE has no task 'sst-2'; did you mean 'sst2'"),
        ({"tasks": []}, "tasks must be one or more different ones"),
        ({"tasks": "sst2"}, "tasks must be tuple"),
        ({"seeds": [1, 1]}, r"seeds must be one or more different ones, got \[1, 1\]"),
        ({"seeds": [-1]}, "seeds must lie between 0"),
        ({"runs": ["moh"]}, "runs must map names to variants"),
        ({"runs": {"MoH": "moh"}}, "runs must map names to variants with their settings, got 'MoH': 'moh'"),
        ({"runs": {"MoH": {"mho": {}}}}, "did you mean 'moh'"),
        ({"runs": {"MoH": {"moh": {"active_ratio": 2.0}}}}, "active_ratio must lie between"),
        ({"runs": {"unpatched": {"moh": {}}}}, "'unpatched' has variants"),
        ({"runs": {"MoH 5": {"moh": {}}, "MoH: 5": {"ssa": {}}}}, "'MoH 5' and 'MoH: 5' would share a folder"),
        ({"training": {"stepz": 3}}, "no setting 'stepz'; did you mean 'steps'"),
        ({"training": {"steps": None}}, "either steps or epochs"),
        ({"training": {"max_length": 1}}, "max_length must lie between 4"),
        ({"training": {"seed": 1}}, "training holds seed; give seeds instead"),
        ({"training": {"variants": {}}}, "training holds variants; give runs instead"),
        ({"training": {"output": "x"}}, "output does not belong into training"),
        ({"training": {"balance_weight": 0.1}, "runs": {"SSA": {"ssa": {}}}}, "training.balance_weight has no effect"),
        ({"task_training": {"rte": {}}}, "task_training is for 'rte', but tasks are sst2"),
        ({"task_training": {"sst2": 3}}, "must map 'sst2' to settings"),
        ({"task_training": {"sst2": {"step": 3}}}, "no setting 'step'; did you mean 'steps'"),
        ({"data": "nowhere"}, r"There is no file nowhere/SST-2/train\.tsv"),
    ],
)
def test_bad_configurations_are_refused(
    glue: ModuleType, settings: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        glue.GlueSettings.from_yaml(written(change(settings, changes), tmp_path))


def test_what_is_wrong_is_one_line(glue: ModuleType, settings: dict[str, Any], data: Path, tmp_path: Path) -> None:
    application = typer.Typer()
    application.command()(glue.main)
    broken = tmp_path / "data" / "SST-2"
    broken.mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv"):
        text = (data / "SST-2" / name).read_text()
        (broken / name).write_text(text[:-3] + "\n" if name == "dev.tsv" else text)
    path = written(change(settings, {"data": str(tmp_path / "data")}), tmp_path)
    done = CliRunner().invoke(application, [str(path)])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: {path}: {broken / 'dev.tsv'}, line 15: expected 2 columns")
    assert done.stderr.count("\n") == 1


def test_the_shipped_configuration_is_right(glue: ModuleType) -> None:
    content = yaml.safe_load((RECIPES / "configs" / "glue_lora.yaml").read_text())
    read = glue.GlueSettings.from_dict({**content, "data": None})
    assert len(list(read.trainings())) == 48
    with pytest.raises(ValueError, match="There is no file glue/"):
        glue.GlueSettings.from_dict(content)


@pytest.mark.parametrize("length", [{"steps": 12}, {"steps": None, "epochs": 2.5}])
def test_rows_come_shuffled_in_batches_of_similar_length(
    glue: ModuleType, settings: dict[str, Any], model: str, length: dict[str, Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)

    def rows(seed: int, processes: int = 1) -> list[dict[str, Any]]:
        given = glue.GlueSettings.from_dict({**change(settings, {"training": length}), "seeds": [seed]})
        training = next(training for _, training in given.trainings())
        return glue.Task(training, tokenizer).training_rows(training, processes).to_list()

    first = rows(0)
    assert first == rows(0)
    assert first != rows(1)
    assert len(first) == (48 if length["steps"] else 53)  # 12 batches of 4, or 2.5 times 21 rows
    if length["steps"]:
        assert len(rows(0, processes=2)) == 96
    once = glue.Task(next(iter(glue.GlueSettings.from_dict(settings).trainings()))[1], tokenizer).train.to_list()
    shown = [first.count(row) / once.count(row) for row in once]
    assert min(shown) >= 2
    assert max(shown) <= 3
    lengths = np.array([len(row["input_ids"]) for row in first][:48]).reshape(-1, 4)
    shuffled = np.random.default_rng(0).permutation(lengths.ravel()).reshape(-1, 4)
    assert np.ptp(lengths, axis=1).mean() < np.ptp(shuffled, axis=1).mean() / 2


def test_a_task_may_be_trained_otherwise(glue: ModuleType, settings: dict[str, Any]) -> None:
    given = {**settings, "tasks": ["sst2", "stsb"], "seeds": [0, 1], "task_training": {"stsb": {"steps": 3}}}
    runs = [(row, one.task, one.seed, one.steps) for row, one in glue.GlueSettings.from_dict(given).trainings()]
    assert runs == [
        (row, task, seed, steps)
        for seed in (0, 1)
        for task, steps in (("sst2", 6), ("stsb", 3))
        for row in ("unpatched", "MoH 50 %")
    ]


def test_training_rows_can_be_limited(glue: ModuleType, settings: dict[str, Any], model: str) -> None:
    given = glue.GlueSettings.from_dict({**settings, "training": {**settings["training"], "train_rows": 5}})
    task = glue.Task(next(iter(given.trainings()))[1], AutoTokenizer.from_pretrained(model))
    assert len(task.train) == 5
    assert len(task.evaluation) == 14


def test_a_tokenizer_that_cannot_pad_is_refused(glue: ModuleType, settings: dict[str, Any]) -> None:
    training = next(iter(glue.GlueSettings.from_dict(settings).trainings()))[1]
    with pytest.raises(ValueError, match="has no padding token: choose an encoder"):
        glue.Task(training, SimpleNamespace(pad_token=None))
