"""What all recipes share: bad configurations are refused before a model is loaded, checkpoints count once they are
complete, the launcher's configurations parse; and the examples run."""

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from .recipes import RECIPES, ROOT, recipe, written


@pytest.fixture
def common() -> ModuleType:
    return recipe("recipe_common")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Right but for the model, which is never loaded here."""
    (tmp_path / "text.txt").write_text("text")
    files = {name: str(tmp_path / "text.txt") for name in ("train_file", "eval_file")}
    return {"model": "no/model", **files, "output": str(tmp_path / "out"), "steps": 3}


def read(settings: dict[str, Any], folder: Path) -> Any:
    return recipe("finetune_causal_lm").CausalLMSettings.from_yaml(written(settings, folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, r"recipe\.yaml: .* no setting 'stepz'; did you mean 'steps'"),
        ({"steps": "many"}, "steps must be .*int.*, got 'many'"),
        ({"steps": 0}, "steps must lie between 1"),
        ({"steps": None}, "either steps or epochs, got steps=None and epochs=None"),
        ({"epochs": 1}, "either steps or epochs, got steps=3 and epochs=1"),
        ({"learning_rate": True}, "learning_rate must be float"),
        ({"learning_rate": "1e-3"}, "Write numbers like 1.0e-3"),
        ({"lora_targets": 3}, "lora_targets must be"),
        ({"variants": {"mho": {}}}, "did you mean 'moh'"),
        ({"variants": {"moh": {"active_ratio": 2.0}}}, "active_ratio must lie between"),
        ({"variants": {"moh": {"preset": "llama9"}}}, "has no preset 'llama9'"),
        ({"variants": ["moh"]}, "variants must be dict"),
        ({"balance_weight": 0.01}, r"balance_weight has no effect on the variants given \(none\).* moh"),
        ({"balance_weight": 0.01, "variants": {"ssa": {}}}, r"no effect on the variants given \(ssa\)"),
        ({"active_ratio_steps": 2, "variants": {"ssa": {}}}, "active_ratio_steps has no effect"),
        ({"active_ratio_steps": 4, "variants": {"moh": {}}}, "active_ratio_steps must be at most steps, 3, got 4"),
        ({"scale_learning_rate": 0.01, "variants": {"moh": {}}}, "scale_learning_rate has no effect"),
        ({"eval_file": "nowhere.txt"}, "no file 'nowhere.txt'"),
    ],
)
def test_bad_configurations_are_refused(
    settings: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        read({**settings, **changes}, tmp_path)


def test_bad_files_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="There is no configuration"):
        recipe("finetune_causal_lm").CausalLMSettings.from_yaml(tmp_path / "none.yaml")
    path = tmp_path / "bad.yaml"
    for text, message in (
        ("a: [", "not valid YAML"),
        ("- a", "must hold a mapping"),
        ("steps: 3", "output, model.* must be given"),
    ):
        path.write_text(text)
        with pytest.raises((TypeError, ValueError), match=message):
            recipe("finetune_causal_lm").CausalLMSettings.from_yaml(path)
    monkeypatch.setattr(sys, "argv", ["finetune_causal_lm.py", str(path)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(RECIPES / "finetune_causal_lm.py"), run_name="__main__")
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"Error: {path}: ")
    assert error.count("\n") == 1


def test_presets_and_defaults_are_written_out(settings: dict[str, Any], tmp_path: Path) -> None:
    variants = read({**settings, "variants": {"moh": {"preset": "llama3_8b_75"}, "ssa": None}}, tmp_path).variants
    assert list(variants) == ["moh", "ssa"]
    assert variants["moh"]["shared_ratio"] == 0.5
    assert variants["ssa"]["query"] is True


def test_a_run_cannot_be_changed_only_continued(
    common: ModuleType, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**settings, "variants": {"ssa": {}, "moh": {}}, "accumulation": 2}
    common.begin(read({**settings, "steps": 9}, tmp_path))
    common.begin(read(settings, tmp_path))  # nothing had been trained
    (tmp_path / "out" / "checkpoint-1").mkdir()
    assert common.finished(read(settings, tmp_path)) is None
    for changes, message in (
        ({"steps": 4}, r"other settings \(steps: 3 became 4\)"),
        ({"variants": {"ssa": {}, "moh": {"router": "learned"}}}, "variants.moh.router: 'query_norm' became 'learned'"),
        ({"variants": {"moh": {}, "ssa": {}}}, "order: .'ssa', 'moh'. became .'moh', 'ssa'."),
    ):
        with pytest.raises(ValueError, match=message):
            common.finished(read({**settings, **changes}, tmp_path))
    with monkeypatch.context() as environment:
        environment.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="processes x accumulation: 2 became 4"):
            common.finished(read(settings, tmp_path))
        assert common.finished(read({**settings, "accumulation": 1}, tmp_path)) is None  # steps of the same rows
    (tmp_path / "out").rename(tmp_path / "moved")
    assert common.finished(read({**settings, "output": str(tmp_path / "moved")}, tmp_path)) is None
    (tmp_path / "moved" / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"a run without settings\.json"):
        common.finished(read({**settings, "output": str(tmp_path / "moved")}, tmp_path))


def test_processes_that_do_not_work_together_are_refused(
    common: ModuleType, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = read(settings, tmp_path)
    arguments = given.arguments()
    monkeypatch.setattr(type(given), "arguments", lambda self, **more: arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but accelerate sees 1"):
        common.begin(given)


def test_a_finished_run_is_left_alone(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = recipe("finetune_causal_lm")
    read_back = read(settings, tmp_path)
    recipe("recipe_common").begin(read_back)
    metrics = {"before": {"step": 0, "perplexity": 20.0}, "after": {"step": 3, "perplexity": 10.0}}
    (tmp_path / "out" / "metrics.json").write_text(json.dumps(metrics))
    assert module.run(read_back) == metrics  # there is no such model, so it was not loaded
    monkeypatch.setattr(sys, "argv", ["recipe.py", str(written(settings, tmp_path))])
    with pytest.raises(SystemExit) as end:
        module.command(module.CausalLMSettings, module.run)
    assert not end.value.code
    assert capsys.readouterr().out.splitlines() == [
        f"{settings['output']} holds this run, finished: nothing to do.",
        "before: perplexity 20",
        "after: perplexity 10",
    ]


def test_the_last_checkpoint_is_the_newest_complete_one(common: ModuleType, tmp_path: Path) -> None:
    assert common.last_checkpoint(tmp_path / "nowhere") is None
    for step in (8, 9, 10, 11, 12, 13, 14):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 14}))
        (folder / "files.json").write_text(json.dumps({"model.safetensors": 7}))
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-13" / "files.json").unlink()  # killed before the end
    (tmp_path / "checkpoint-12" / "files.json").write_text('{"model.saf')
    (tmp_path / "checkpoint-11" / "model.safetensors").write_bytes(b"wei")
    (tmp_path / "checkpoint-10" / "model.safetensors").unlink()
    assert common.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


CONFIGURATIONS = [*sorted((RECIPES / "configs").glob("*.yaml")), *sorted((ROOT / "benchmarks").glob("*/*.yaml"))]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_the_shipped_language_model_configurations_are_right(path: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    if "train_file" not in content:
        pytest.skip("of another recipe, which has a test of its own")
    with pytest.raises(ValueError, match=f"There is no file '{content['train_file']}'"):
        read(content, tmp_path)  # all else in it is right
    (tmp_path / "text.txt").write_text("text")
    read({**content, **{name: str(tmp_path / "text.txt") for name in ("train_file", "eval_file")}}, tmp_path)


def launched(name: str) -> Any:
    """What `accelerate launch` makes of one of our configurations and its defaults."""
    given = ["--config_file", str(RECIPES / "accelerate" / f"{name}.yaml"), "--main_process_port", "0", "recipe.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    return arguments


def test_accelerate_takes_the_configuration_for_two_cpu_processes() -> None:
    """accelerate would start one process under MULTI_CPU; so that they find each other is the recipe's `use_cpu`."""
    arguments = launched("ddp_cpu")
    assert arguments.multi_gpu  # the branch that starts several
    assert arguments.num_processes == 2
    assert prepare_multi_gpu_env(arguments)["ACCELERATE_MIXED_PRECISION"] == "no"


def test_accelerate_takes_the_configuration_for_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = launched("multi_gpu_fsdp2")
    assert arguments.use_fsdp
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()  # as Accelerator makes it in each process
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert arguments.mixed_precision == "bf16"


def test_accelerate_takes_the_configuration_for_zero3() -> None:
    arguments = launched("deepspeed_zero3")
    assert arguments.use_deepspeed
    arguments.deepspeed_fields_from_accelerate_config = ""
    environment = prepare_deepspeed_cmd_env(arguments)[1]
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ViTForImageClassification"])
def test_accumulated_batches_of_a_classifier_are_averaged(name: str, common: ModuleType, tmp_path: Path) -> None:
    """The same batch once or four times a step: one loss, one gradient. BERT's own loss knows of no accumulation."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
    if name.startswith("Bert"):
        config, inputs = transformers.BertConfig(**sizes, vocab_size=50), {"input_ids": torch.arange(5)}
    else:
        config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
        inputs = {"pixel_values": torch.linspace(-1, 1, 192).view(3, 8, 8)}
    row = {**inputs, "labels": torch.tensor(1)}
    logs = []
    for accumulation in (1, 4):
        given = {"output": str(tmp_path / str(accumulation)), "accumulation": accumulation, "log_steps": 1}
        one = common.TrainingSettings.from_dict({**given, "steps": 1, "batch": 2})
        torch.manual_seed(0)
        trainer = common.PatchedTrainer.of(
            getattr(transformers, name)(config),
            one,
            one.arguments(save_only_model=True),
            mean_loss=True,
            train_dataset=[row] * 8,
            eval_dataset=[row],
        )
        trainer.train()
        logs.append(next(entry for entry in trainer.state.log_history if "grad_norm" in entry))
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-5)
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-4)
