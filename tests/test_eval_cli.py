"""`patchattn eval`: the command from its options to its files, what it refuses first, and two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import patchattn
from patchattn.cli.main import main
from patchattn.evaluation.run.loading import Source, find_source
from patchattn.evaluation.tasks.registry import GROUPS, TASKS, make_tasks, task_names
from patchattn.evaluation.tasks.results import claim

from .families import FAMILIES
from .test_eval_glue import classifier, encoder_tokenizer
from .test_longbench import BYTES, tiny_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny language model with its tokenizer, and tasks for it."""
    tiny_model().save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    (tmp_path / "SST-2").mkdir()
    lines = [f"{'a good film ' * (1 + index % 3)}\t{index % 2}" for index in range(7)]
    (tmp_path / "SST-2" / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    mini = {str(index): {"origin_prompt": f"How many {'?' * index}", "gold": ["3"]} for index in range(3)}
    (tmp_path / "passage_count.json").write_text(json.dumps(mini))
    return tmp_path


@pytest.fixture
def call(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "250")

    def run(*arguments: str, model: str = "model") -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["eval", str(folder / model), "--data", str(folder), "--output", str(folder / "out"), *arguments])
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err  # type: ignore[return-value]

    return run


MOH = ("--variant", "moh", "--set", "active_ratio=0.5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*MOH, "--tasks", "glue/sst3"), "There is no task 'glue/sst3'; did you mean 'glue/sst2'?"),
        ((*MOH, "--tasks", "gleu"), "did you mean 'glue'?"),
        ((*MOH, "--tasks", "glue/rte"), "There is no file"),
        ((*MOH, "--tasks", "longbench/lcc"), "holds neither"),
        ((*MOH, "--tasks", "speed"), "speed reads no data"),
        ((*MOH, "--tasks", "glue/sst2", "--batch", "0"), "batch"),
        ((*MOH, "--tasks", "glue/sst2", "--task-set", "glue.max_length=9"), "no setting 'max_length'"),
        ((*MOH, "--tasks", "glue/sst2", "--task-set", "needle.lengths=[9]"), "'needle', which is not asked for"),
        ((*MOH, "--tasks", "glue/sst2", "--task-set", "max_length=9"), "expects task.name=value"),
        ((*MOH,), "tasks must be given"),
        (("--tasks", "glue/sst2"), "give --variant or --patch"),
        (("--variant", "mho", "--tasks", "glue/sst2"), "did you mean 'moh'?"),
        (("--variant", "moh", "--set", "active_ratio=2", "--tasks", "glue/sst2"), "active_ratio"),
        (("--variant", "moh", "--set", "ratio", "--tasks", "glue/sst2"), "--set expects name=value"),
        (
            (*MOH, "--tasks", "glue/sst2", "--task-set", "glue.data={"),
            "--task-set glue.data={: not valid YAML",
        ),
        ((*MOH, "--tasks", "glue/sst2", "--device", "gpu"), "There is no device 'gpu'"),
        (("--variant", "moh+ssa", "--set", "active_ratio=1", "--tasks", "glue/sst2"), "needs the name of its variant"),
        ((*MOH, "--set", "ssa.key=true", "--tasks", "glue/sst2"), "there is no --variant ssa"),
        (("--variant", "moh", "--variant", "moh", "--tasks", "glue/sst2"), "The same variants twice"),
        (("--variant", "moh+moh", "--tasks", "glue/sst2"), "--variant moh+moh names a variant twice"),
        (("--patch", ".", "--tasks", "glue/sst2"), "There is no patchattn_config.json"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    call: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    def load(self: Source, *arguments: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(Source, "load", load)
    monkeypatch.setattr(Source, "load_tokenizer", load)
    code, _, err = call(*arguments)
    assert code == 2
    assert message in err
    assert not (folder / "out").exists()


def test_a_run_from_its_options(call: Any, folder: Path) -> None:
    usual = ("--tasks", "glue/sst2,longbench/passage_count", "--batch", "2", "--limit", "3", "--device", "cpu")
    more = ("--variant", "ssa+moh", "--set", "moh.active_ratio=0.5", "--task-set", "longbench.chat_template=never")
    code, out, err = call(*usual, *more)
    assert code == 0, err
    for whole in ("longbench/passage_count", "ssa+moh", "difference", "samples/s", "report.html"):
        assert whole in out  # in 80 columns
    report = json.loads((folder / "out" / "report.json").read_text())
    assert list(report["tasks"]) == ["glue/sst2", "longbench/passage_count"]
    assert report["settings"] == {"batch": 2, "seed": 0, "limit": 3, "processes": 1}
    ssa, moh = report["runs"]["ssa+moh"]["patches"]
    assert (ssa["variant"], moh["variant"], moh["config"]["active_ratio"]) == ("ssa", "moh", 0.5)
    assert report["tasks"]["longbench/passage_count"]["identity"]["chat_template"] == "never"
    assert call(*usual, *more)[0] == 0  # finished, and done again in no time
    code, _, err = call(*usual, *more[:2], "--set", "moh.active_ratio=0.75", *more[4:])
    assert code == 2
    assert "holds a run with other settings (patches:" in err


def test_a_run_from_a_file(call: Any, folder: Path) -> None:
    """Two runs with the same variant, and a saved patch; an option wins over the file."""
    model = patchattn.patch_model(tiny_model(), "moh", active_ratio=0.75)
    patchattn.save_patch(model, folder / "trained")
    runs = {"half": {"moh": {"active_ratio": 0.5}}, "quarter": {"moh": {"active_ratio": 0.25}}}
    content = {"tasks": ["glue/sst2"], "batch": 3, "runs": {**runs, "trained": str(folder / "trained")}}
    (folder / "eval.yaml").write_text(yaml.safe_dump(content))
    code, _, err = call("--config", str(folder / "eval.yaml"), "--batch", "4", "--limit", "2")
    assert code == 0, err
    report = json.loads((folder / "out" / "report.json").read_text())
    ratios = [run["patches"][0]["config"]["active_ratio"] for run in list(report["runs"].values())[1:]]
    assert ratios == [0.5, 0.25, 0.75]
    assert report["settings"]["batch"] == 4
    code, _, err = call("--config", str(folder / "eval.yaml"), *MOH)
    assert code == 2
    assert "has runs: leave out --variant" in err
    (folder / "eval.yaml").write_text("task_settings: {glue: 3}\n")
    code, _, err = call("--config", str(folder / "eval.yaml"), *MOH, "--task-set", "glue.data=x")
    assert "must map names of tasks to settings" in err
    (folder / "eval.yaml").write_text("taskss: [glue]\n")
    code, _, err = call("--config", str(folder / "eval.yaml"), *MOH)
    assert "no setting 'taskss'; did you mean 'tasks'?" in err


def test_an_output_that_is_no_folder(call: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "load", None)
    (folder / "out").write_text("a file")
    code, _, err = call(*MOH, "--tasks", "glue/sst2")
    assert code == 2
    assert "out' cannot be made: File exists" in err


@pytest.mark.parametrize(
    ("content", "message"), [('{"batch": ', "line 1: not valid JSON"), ("[]", "hold a dictionary")]
)
def test_a_note_that_was_damaged(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.settings.json").write_text(content)
    with pytest.raises(ValueError, match=rf"rows.settings.json.*{message}"):
        claim(tmp_path / "rows", {"batch": 1})


def test_a_model_that_was_saved_patched(call: Any, folder: Path) -> None:
    model = patchattn.patch_model(tiny_model(), "moh", active_ratio=0.5)
    patchattn.save_pretrained(model, folder / "whole")
    BYTES.save_pretrained(folder / "whole")
    code, _, err = call("--tasks", "glue/sst2", "--limit", "2", model="whole")
    assert code == 0, err
    report = json.loads((folder / "out" / "report.json").read_text())
    assert [len(run["patches"]) for run in report["runs"].values()] == [0, 1]
    code, _, err = call("--tasks", "glue/sst2", *MOH, model="whole")
    assert code == 2
    assert "was saved patched" in err


def test_a_classifier(call: Any, folder: Path) -> None:
    classifier(2).save_pretrained(folder / "bert")
    encoder_tokenizer().save_pretrained(folder / "bert")
    code, _, err = call("--tasks", "glue/sst2", "--variant", "ssa", model="bert")
    assert code == 0, err
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["tasks"]["glue/sst2"]["kind"] == "classifier"
    code, _, err = call("--tasks", "perplexity", "--variant", "ssa", model="bert")
    assert code == 2
    assert "perplexity is for a causal language model, got a classifier" in err


def test_kinds_of_models(tmp_path: Path, folder: Path) -> None:
    for family, kind in (("llama", "causal_lm"), ("gpt2", "causal_lm")):
        FAMILIES[family].make().save_pretrained(tmp_path / family)
        source = find_source(str(tmp_path / family))
        assert (source.kind, source.is_patched, source.base) == (kind, False, str(tmp_path / family))
    FAMILIES["bert"].make().save_pretrained(tmp_path / "masked")
    with pytest.raises(ValueError, match=r"is a Bert\w+; expected a causal language model"):
        find_source(str(tmp_path / "masked"))
    model = FAMILIES["llama"].make()
    model.config._name_or_path = str(tmp_path / "llama")
    patchattn.save_patch(patchattn.patch_model(model, "moh"), tmp_path / "patch")
    unnamed = patchattn.patch_model(FAMILIES["llama"].make(), "moh")
    patchattn.save_patch(unnamed, tmp_path / "unnamed")
    with pytest.raises(ValueError, match="names no base model: give the base model, and --patch"):
        find_source(str(tmp_path / "unnamed"))
    source = find_source(str(tmp_path / "patch"))
    assert (source.kind, source.is_patched, source.base) == ("causal_lm", True, str(tmp_path / "llama"))
    with pytest.raises(ValueError, match="Cannot load"):
        find_source(str(tmp_path / "nowhere"))


def test_names_of_tasks(folder: Path) -> None:
    assert len(task_names(["glue"])) == 9
    assert len(task_names(["longbench"])) == 21
    assert task_names(["glue/sst2", "glue", "needle"]) == [
        "glue/sst2",
        *(n for n in GROUPS["glue"] if n[-4:] != "sst2"),
        "needle",
    ]
    assert {"needle", "perplexity", "speed", "ruler/vt"} <= set(TASKS)
    with pytest.raises(ValueError, match="at least one task"):
        task_names([])
    settings: dict[str, Any] = {"needle": {"lengths": [300]}, "ruler": {"lengths": [500]}, "ruler/vt": {"samples": 2}}
    tasks = make_tasks(["needle", "ruler", "speed"], "causal_lm", settings=settings)
    assert [task.name for task in tasks] == ["needle", *GROUPS["ruler"], "speed"]
    assert len(tasks[0]) == 5
    assert len(tasks[GROUPS["ruler"].index("ruler/vt") + 1]) == 2


@pytest.mark.slow
def test_two_processes_are_one(call: Any, folder: Path) -> None:
    """Seven samples in batches of two, and a router that starts at random."""
    (folder / "text.txt").write_text("All that is said of the film is that it is good. " * 9)
    routed = ("--variant", "moh", "--set", "active_ratio=0.5", "--set", "router=learned", "--tasks", "perplexity")
    rest = ("--task-set", "perplexity.parts=7", "--task-set", "perplexity.max_length=32", "--batch", "2")
    code, _, err = call(*routed, *rest)
    assert code == 0, err
    # what `accelerate launch` starts with recipes/accelerate/ddp_cpu.yaml, without the time that it takes itself
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "patchattn"]
    arguments = ["eval", str(folder / "model"), "--data", str(folder), "--output", str(folder / "two"), *routed, *rest]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *launch, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote report.json") == 1
    one, two = (json.loads((folder / name / "report.json").read_text()) for name in ("out", "two"))
    assert two["settings"] == {**one["settings"], "processes": 2}
    for run in ("unpatched", "moh"):
        places = [folder / name / run / "perplexity" for name in ("out", "two")]
        answers = [
            {row["index"]: row["nll"] for path in place.iterdir() for row in map(json.loads, path.open())}
            for place in places
        ]
        assert answers[0] == answers[1]
        assert len(answers[0]) == 7
        assert len([*places[1].iterdir()]) == 2
        scores = [report["tasks"]["perplexity"]["runs"][run]["scores"] for report in (one, two)]
        assert scores[0] == scores[1]
