"""The recipe for language models: it learns, what it saves loads, a killed run goes on exactly, and two processes
compute what one does."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import patchattn

from .recipes import RECIPES, recipe, started, tiny_language_model, written

BLOCK = 16
TEXT = "Once upon a time there was a patch that could be undone, and so it was. "
VARIANTS = {
    "ssa": {},
    "moh": {"router": "learned", "active_ratio": 0.5, "shared_ratio": 0.25},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_language_model(tmp_path_factory.mktemp("model"), attention_dropout=0.1)


@pytest.fixture
def settings(model: str, tmp_path: Path) -> dict[str, Any]:
    """Everything on, and rows that fit neither the batches nor the processes."""
    train, evaluation = tmp_path / "train.txt", tmp_path / "eval.txt"
    train.write_text((TEXT * 9)[: 11 * BLOCK])
    evaluation.write_text((TEXT * 9)[7 : 7 + 5 * BLOCK])
    return {
        "model": model,
        "train_file": str(train),
        "eval_file": str(evaluation),
        "output": str(tmp_path / "out"),
        "variants": VARIANTS,
        "block": BLOCK,
        "steps": 8,
        "batch": 2,
        "eval_batch": 2,
        "accumulation": 2,
        "learning_rate": 1e-2,
        "scale_learning_rate": 5e-2,
        "balance_weight": 0.01,
        "active_ratio_steps": 4,
        "save_steps": 2,
        "eval_steps": 3,
        "log_steps": 2,
    }


def run(settings: dict[str, Any]) -> dict[str, Any]:
    module = recipe("finetune_causal_lm")
    return module.run(module.CausalLMSettings.from_dict(settings))


def perplexity(model: torch.nn.Module, text: str) -> float:
    """By its definition, in float64, row by row."""
    ids = {c: i + 4 for i, c in enumerate(" .,'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n")}
    rows = torch.tensor([ids[character] for character in text]).view(-1, BLOCK)
    total = 0.0
    for row in rows:
        log_probabilities = model.eval()(row[None]).logits[0].detach().double().log_softmax(-1)
        total -= sum(float(log_probabilities[t, row[t + 1]]) for t in range(BLOCK - 1))
    return math.exp(total / (len(rows) * (BLOCK - 1)))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_learns_and_what_it_saves_loads(settings: dict[str, Any], rank: int, tmp_path: Path) -> None:
    metrics = run({**settings, "lora_rank": rank, "gradient_checkpointing": True})
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [entry["step"] for entry in metrics["curve"]] == [0, 3, 6, 8]
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"]
    loaded = patchattn.from_pretrained(tmp_path / "out")
    assert [patch["variant"] for patch in patchattn.patch_info(loaded)["patches"]] == list(VARIANTS)
    expected = perplexity(loaded, Path(settings["eval_file"]).read_text())
    assert metrics["after"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    alphas = [value for name, value in loaded.named_parameters() if "query_alpha" in name]
    assert alphas
    assert len({round(float(alpha), 6) for alpha in alphas}) > 1
    logged = {key for entry in metrics["log"] for key in entry}
    assert "routing/model.layers.1.self_attn/entropy" in logged


def test_without_variants_it_trains_the_model_alike(settings: dict[str, Any], tmp_path: Path) -> None:
    dense = {"variants": {}, "balance_weight": 0.0, "active_ratio_steps": 0, "scale_learning_rate": None, "epochs": 1}
    metrics = run({**settings, **dense, "steps": None})
    base = AutoModelForCausalLM.from_pretrained(settings["model"])
    expected = perplexity(base, Path(settings["eval_file"]).read_text())
    assert metrics["before"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert metrics["after"]["step"] == 3  # 11 rows are 6 batches, two of which make a step
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = perplexity(trained, Path(settings["eval_file"]).read_text())
    assert metrics["after"]["perplexity"] == pytest.approx(expected, rel=1e-5)


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
import finetune_causal_lm as recipe

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if kind == "between" and state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_save(self, args, state, control, **kwargs):
        if kind == "writing" and state.global_step == 6:  # before the checkpoint is whole
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, args, state, control, **kwargs):
        if kind == "done":  # all checkpoints are whole, the result is not written
            os.kill(os.getpid(), signal.SIGKILL)

class Killed(recipe.PatchedTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if kind is not None:
            self.add_callback(Kill())

recipe.PatchedTrainer = Killed

def start(config, how):
    global kind
    kind = how
    process = os.fork()
    if process == 0:
        recipe.run(recipe.CausalLMSettings.from_yaml(config))
        os._exit(0)
    return os.waitpid(process, 0)[1]

for rank, how in (("0", "writing"), ("4", "between")):
    straight, broken = sys.argv[1] + f"/straight{rank}.yaml", sys.argv[1] + f"/broken{rank}.yaml"
    assert start(straight, None) == 0
    assert os.WTERMSIG(start(broken, how)) == signal.SIGKILL
    if how == "between":
        assert os.WTERMSIG(start(broken, "done")) == signal.SIGKILL
    assert not os.path.exists(sys.argv[1] + f"/broken{rank}/metrics.json")
    assert start(broken, None) == 0
"""


def test_a_killed_run_goes_on_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    """In full and with LoRA, with dropout, shuffled rows, accumulation and every schedule; each start a process."""
    for rank in (0, 4):
        for kind in ("straight", "broken"):
            given = {**settings, "lora_rank": rank, "lora_dropout": 0.1, "output": str(tmp_path / f"{kind}{rank}")}
            written(given, tmp_path).rename(tmp_path / f"{kind}{rank}.yaml")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = started(script, tmp_path)
    assert done.returncode == 0, done.stderr
    for rank, resumed in ((0, "checkpoint-4"), (4, "checkpoint-6")):
        straight, broken = (tmp_path / f"{kind}{rank}" for kind in ("straight", "broken"))
        weights = "adapter_model.safetensors" if rank else "model.safetensors"
        assert (broken / weights).read_bytes() == (straight / weights).read_bytes()
        assert (broken / "patchattn_model.safetensors").read_bytes() == (
            straight / "patchattn_model.safetensors"
        ).read_bytes()
        ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (broken, straight))
        assert ours["resumed_from"] == resumed
        assert theirs["resumed_from"] is None
        assert ours["curve"] == theirs["curve"]


@pytest.mark.slow  # by default two processes train in test_distributed.py
def test_two_processes_compute_what_one_does(settings: dict[str, Any], tmp_path: Path) -> None:
    """Two processes see the batches that one process accumulates; 5 rows to evaluate are uneven for both."""
    model = tiny_language_model(tmp_path / "model")  # without dropout: processes draw their own
    Path(settings["train_file"]).write_text((TEXT * 9)[: 16 * BLOCK])
    one = {**settings, "model": model, "steps": 6, "output": str(tmp_path / "one"), "accumulation": 2}
    two = {**one, "output": str(tmp_path / "two"), "accumulation": 1}
    done = started(RECIPES / "finetune_causal_lm.py", written(two, tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    ours = json.loads((tmp_path / "two" / "metrics.json").read_text())
    theirs = run(one)
    assert ours["settings"]["processes"] == 2
    for here, there in zip(ours["curve"], theirs["curve"], strict=True):
        assert here["step"] == there["step"]
        assert here["perplexity"] == pytest.approx(there["perplexity"], rel=1e-4)
    here, there = (load_file(tmp_path / folder / "model.safetensors") for folder in ("two", "one"))
    for name, value in here.items():
        torch.testing.assert_close(value, there[name], rtol=1e-3, atol=1e-4)
