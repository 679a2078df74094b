"""The recipe that compresses an encoder: its stages, what they start from, what a kill leaves, and what it refuses."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import patchattn
from patchattn.variants.pruning.shrp.variant import SHRP

from .recipes import RECIPES, recipe, sst2_files, tiny_encoder, written

SITES = [f"bert.encoder.layer.{layer}.attention.self" for layer in range(2)]


@pytest.fixture(scope="module")
def compress() -> ModuleType:
    return recipe("compress_encoder")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    sst2_files(folder)
    return folder


@pytest.fixture
def settings(model: str, data: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": model,
        "data": str(data),
        "task": "sst2",
        "output": str(tmp_path / "out"),
        "training": {"steps": 3, "batch": 4, "eval_batch": 3, "max_length": 24, "learning_rate": 5e-3, "save_steps": 1},
        "stages": {"teacher": {"steps": 12}, "specialise": {"steps": 4}},
        "throughput_batches": [1, 2],
        "throughput_length": 8,
        "throughput_repeats": 2,
    }


def run(compress: ModuleType, settings: dict[str, Any]) -> dict[str, Any]:
    return compress.run(compress.CompressSettings.from_dict(settings))


def shrp(model: torch.nn.Module) -> dict[str, SHRP]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, SHRP)}
    return {name.removesuffix(".patchattn.shrp"): variant for name, variant in found.items()}


def test_every_stage_goes_on_from_the_one_before(
    compress: ModuleType, settings: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    metrics = run(compress, settings)
    out = tmp_path / "out"
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert list(metrics["scores"]) == ["teacher", "converted", "balance", "specialise", "compressed", "final"]
    steps = {name: json.loads((out / name / "metrics.json").read_text())["after"]["step"] for name in compress.STAGES}
    assert steps == {"teacher": 12, "balance": 3, "specialise": 4, "final": 3}

    teacher = AutoModelForSequenceClassification.from_pretrained(out / "teacher")
    assert not patchattn.core.patching.is_patched(teacher)
    balanced, specialised = (patchattn.from_pretrained(out / name) for name in ("balance", "specialise"))
    rows = (data / "SST-2" / "train.tsv").read_text().splitlines()[1:]
    assert len(rows) == 21
    for name, variant in shrp(specialised).items():
        assert variant.routes
        assert metrics["usage"][f"{name}.patchattn.shrp"] == variant.usage.tolist()
        assert int(variant.usage.sum()) < 4 * 4 * 24  # of this stage alone
        assert int(shrp(balanced)[name].usage.sum()) > 0
    final = patchattn.from_pretrained(out / "final")
    assert [variant.kept for variant in shrp(final).values()] == [
        (int(np.argmax(metrics["usage"][f"{name}.patchattn.shrp"])),) for name in SITES
    ]
    counts = {"dense": teacher, "compressed": final}
    assert metrics["parameters"] == {name: sum(p.numel() for p in m.parameters()) for name, m in counts.items()}
    assert metrics["parameters"]["compressed"] < metrics["parameters"]["dense"]

    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    lines = [line.split("\t") for line in (data / "SST-2" / "dev.tsv").read_text().splitlines()[1:]]
    for name, one in (("teacher", teacher.eval()), ("final", final.eval())):
        with torch.no_grad():
            right = [
                int(one(**tokenizer(text, return_tensors="pt")).logits.argmax()) == int(label) for text, label in lines
            ]
        assert metrics["scores"][name]["accuracy"] == pytest.approx(np.mean(right))
    assert list(metrics["throughput"]) == ["1", "2"]
    for speed in metrics["throughput"].values():
        assert speed["ratio"] == pytest.approx(speed["compressed"] / speed["dense"])
        assert min(speed.values()) > 0


def test_a_stopped_run_ends_where_one_without_a_stop_does(
    compress: ModuleType, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped in the middle of a stage; stages before it are left alone, and it goes on from its checkpoint."""

    class Stopping(compress.Distiller):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if Path(self.args.output_dir).name == "specialise" and self.state.global_step == 2:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    with monkeypatch.context() as stopped:
        stopped.setattr(compress, "Distiller", Stopping)
        with pytest.raises(KeyboardInterrupt):
            run(compress, settings)
    out = tmp_path / "out"
    assert (out / "balance" / "metrics.json").is_file()
    assert not (out / "specialise" / "metrics.json").exists()
    before = {name: (out / name / "metrics.json").read_text() for name in ("teacher", "balance")}
    continued = run(compress, settings)
    assert {name: (out / name / "metrics.json").read_text() for name in before} == before
    assert json.loads((out / "specialise" / "metrics.json").read_text())["resumed_from"] == "checkpoint-2"
    straight = run(compress, {**settings, "output": str(tmp_path / "straight")})
    assert straight["usage"] == continued["usage"]
    assert {name: score for name, score in straight["scores"].items() if name != "specialise"} == {
        name: score for name, score in continued["scores"].items() if name != "specialise"
    }
    models = [patchattn.from_pretrained(folder / "final").state_dict() for folder in (out, tmp_path / "straight")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())

    def never(*_: Any) -> None:
        raise AssertionError("a finished run is left alone")

    monkeypatch.setattr(compress, "run_stage", never)
    monkeypatch.setattr(compress, "throughput", never)
    assert run(compress, settings) == continued
    with pytest.raises(ValueError, match=r"other settings \(temperature: 2.0 became 3.0\)"):
        run(compress, {**settings, "temperature": 3.0})


def test_what_a_stage_adds_to_the_loss(
    compress: ModuleType, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {}
    for name in ("distillation_loss", "specialise_loss"):
        plain = getattr(compress, name)

        def noted(*args: Any, _name: str = name, _plain: Any = plain, **kwargs: Any) -> Any:
            seen.setdefault(_name, []).append((args, kwargs))
            return _plain(*args, **kwargs)

        monkeypatch.setattr(compress, name, noted)
    dropped = {"layers_dropped": [0], "heads": 2}
    metrics = run(compress, {**settings, "shrp": dropped, "specialise_weight": 0.3, "layer_weight": 0.5})
    assert [args[1] for args, _ in seen["specialise_loss"]] == [0.3] * 4
    assert len(seen["distillation_loss"]) == 3 + 4 + 3
    for args, given in seen["distillation_loss"]:
        assert given == {"layers": [(1, 2)], "layer_weight": 0.5, "logit_weight": 1.0, "temperature": 2.0}
        assert [len(output.hidden_states) for output in args[:2]] == [2, 3]
    stages = [compress.CompressSettings.from_dict(settings)] * 4
    weights = [stage.balance_weight for stage in stages[0].trainings()]
    assert weights == [0.0, 0.01, 0.0, 0.0]
    assert list(metrics["usage"]) == [f"{SITES[1]}.patchattn.shrp"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taks": "sst2"}, "no setting 'taks'; did you mean 'task'"),
        ({"task": "sst-2"}, "did you mean 'sst2'"),
        ({"data": "nowhere"}, r"There is no file nowhere/SST-2/train\.tsv"),
        ({"shrp": {"head": 1}}, "did you mean 'heads'"),
        ({"shrp": {"kept": [1]}}, "shrp holds kept"),
        ({"shrp": {"heads": 0}}, "converts nothing"),
        ({"stages": {"train": {}}}, "stages maps teacher, balance, specialise, final"),
        ({"stages": {"final": 3}}, "stages maps teacher"),
        ({"stages": {"final": {"stepz": 3}}}, "did you mean 'steps'"),
        ({"training": {"steps": 1, "lora_rank": 2}}, "lora_rank does not belong into training"),
        ({"training": {"steps": 1, "task": "rte"}}, "task does not belong into training"),
        ({"training": {}, "stages": {}}, "Give either steps or epochs"),
        ({"temperature": 0}, "temperature must lie between"),
        ({"throughput_batches": [0]}, "throughput_batches must lie between"),
    ],
)
def test_bad_configurations_are_refused(
    compress: ModuleType, settings: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        compress.CompressSettings.from_yaml(written({**settings, "model": "no/model", **changes}, tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [2]}, "2"),
        ({"layers": [0], "shrp": {"layers_dropped": [0]}}, "Layer 0 is to be dropped and converted"),
        ({"shrp": {"heads": 5}}, "has 4 heads"),
        ({"throughput_length": 513}, "throughput_length must be at most 512"),
    ],
)
def test_what_does_not_fit_the_model_is_one_line_before_anything_is_trained(
    compress: ModuleType, settings: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    application = typer.Typer()
    application.command()(compress.main)
    done = CliRunner().invoke(application, [str(written({**settings, **changes}, tmp_path))])
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_shipped_configuration_is_right(compress: ModuleType) -> None:
    content = yaml.safe_load((RECIPES / "configs" / "compress_minilm_sst2.yaml").read_text())
    read = compress.CompressSettings.from_dict({**content, "data": None})
    assert [stage.steps for stage in read.trainings()] == [300, 600, 600, 300]
