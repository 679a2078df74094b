"""A recipe under ZeRO-3 on two CPU processes, as `accelerate launch` starts it with the shipped configuration."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, Trainer, TrainingArguments

import patchattn
from patchattn.training import PatchedTrainerMixin

from .families import FAMILIES
from .recipes import RECIPES, ROOT, recipe, tiny_language_model, written
from .test_finetune_causal_lm import BLOCK, TEXT, VARIANTS

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
_KILLED = """
import os, signal, sys
from finetune_causal_lm import CausalLMSettings, run
from recipe_common import PatchedTrainer

step = PatchedTrainer.training_step

def killed(self, *args, **kwargs):
    if self.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

PatchedTrainer.training_step = killed
run(CausalLMSettings.from_yaml(sys.argv[1]))
"""


def launched(script: Path, settings: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """A script run to its end under ZeRO-3, in two processes that talk over gloo."""
    given = ["--config_file", str(RECIPES / "accelerate" / "deepspeed_zero3.yaml")]
    given += ["--num_processes", "2", "--mixed_precision", "no", str(script), str(written(settings, folder))]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(RECIPES), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", *given]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=540)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    for name, size in (("train", 16), ("eval", 5)):
        (tmp_path / f"{name}.txt").write_text((TEXT * 9)[: size * BLOCK])
    return {
        "model": tiny_language_model(tmp_path / "model"),
        "output": str(tmp_path / "out"),
        "variants": VARIANTS,
        "block": BLOCK,
        **{f"{name}_file": str(tmp_path / f"{name}.txt") for name in ("train", "eval")},
        "steps": 4,
        "batch": 2,
        "eval_batch": 2,
        "learning_rate": 1e-2,
        "balance_weight": 0.01,
    }


class _Trainer(PatchedTrainerMixin, Trainer):
    pass


def test_parameters_and_buffers_alone_are_saved_with_the_settings_of_the_patch(tmp_path: Path) -> None:
    """They are what DeepSpeed gathers; PEFT asks for the rest."""
    model = patchattn.patch_model(FAMILIES["llama"].make(), list(VARIANTS), VARIANTS)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["patchattn"])
    adapted: nn.Module = get_peft_model(model, lora)
    trainer = _Trainer(model=adapted, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))
    trainer._save(str(tmp_path), {name: each.detach() for name, each in adapted.named_parameters()})
    found = PeftModel.from_pretrained(patchattn.load_patch(FAMILIES["llama"].make(), tmp_path), tmp_path)
    assert patchattn.patch_info(found)["patches"] == patchattn.patch_info(adapted)["patches"]
    ours, theirs = dict(adapted.named_parameters()), dict(found.named_parameters())
    assert all(torch.equal(theirs[name], each) for name, each in ours.items() if ".patchattn." in name)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "lora"])
def test_what_two_processes_shard_is_saved_with_its_patch_and_loaded_in_one(
    settings: dict[str, Any], rank: int, tmp_path: Path
) -> None:
    settings["lora_rank"] = rank
    done = launched(RECIPES / "finetune_causal_lm.py", settings, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("out/checkpoint-4/global_step4/zero_pp_rank_*_model_states.pt"))) == 2, "not sharded"
    found = patchattn.from_pretrained(tmp_path / "out").eval()
    assert isinstance(found, PeftModel) == bool(rank)
    assert [patch["variant"] for patch in patchattn.patch_info(found)["patches"]] == list(VARIANTS)
    module = recipe("finetune_causal_lm")
    tokens = module.packed(settings["eval_file"], AutoTokenizer.from_pretrained(settings["model"]), BLOCK)
    rows = torch.stack([row["input_ids"] for row in tokens])
    with torch.no_grad():
        loss = module.row_losses(found(rows).logits, rows).sum() / rows[:, 1:].numel()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert math.exp(loss) == pytest.approx(metrics["after"]["perplexity"], rel=1e-5)
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"]


@needs_deepspeed
@pytest.mark.slow
def test_a_killed_run_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**settings, "lora_rank": 2, "save_steps": 2, "eval_steps": 2}
    (tmp_path / "killed.py").write_text(_KILLED)
    assert launched(tmp_path / "killed.py", settings, tmp_path).returncode != 0
    for output in ("out", "whole"):
        settings["output"] = str(tmp_path / output)
        done = launched(RECIPES / "finetune_causal_lm.py", settings, tmp_path)
        assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("out", "whole"))
    assert ours["resumed_from"] == "checkpoint-2"
    assert theirs["resumed_from"] is None
    assert ours["after"]["perplexity"] == pytest.approx(theirs["after"]["perplexity"], rel=1e-4)
