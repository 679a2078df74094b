"""A recipe under FSDP2 on two CPU processes: what it saves is loaded in one, and a killed run goes on elsewhere.

accelerate takes no FSDP on CPUs and trains with DistributedDataParallel there, without a word; the processes of this
test tell its state otherwise, and all else is its own and torch's.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

import patchattn

from .recipes import recipe, started, tiny_language_model, written
from .test_finetune_causal_lm import BLOCK, TEXT, VARIANTS, run

WORKER = """
import os, signal, sys
import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from finetune_causal_lm import CausalLMSettings, run
from torch.distributed.fsdp import FSDPModule
from recipe_common import PatchedTrainer

if "RANK" not in os.environ:  # one process, for which accelerate makes no group
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
made, save, step = AcceleratorState.__init__, PatchedTrainer.save_model, PatchedTrainer.training_step

def told(self, *args, **kwargs):
    made(self, *args, **kwargs)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap",
        state_dict_type="FULL_STATE_DICT", cpu_ram_efficient_loading=False,
    )
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)

def saved(self, *args, **kwargs):
    assert any(isinstance(module, FSDPModule) for module in self.model_wrapped.modules()), "it is not sharded"
    save(self, *args, **kwargs)

def killed(self, *args, **kwargs):
    if self.state.global_step == 3 and "killed" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

AcceleratorState.__init__, PatchedTrainer.save_model, PatchedTrainer.training_step = told, saved, killed
run(CausalLMSettings.from_yaml(sys.argv[1]))
"""


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Of one process, each of whose steps accumulates what two processes share."""
    for name, size in (("train", 16), ("eval", 5)):
        (tmp_path / f"{name}.txt").write_text((TEXT * 9)[: size * BLOCK])
    (tmp_path / "worker.py").write_text(WORKER)
    return {
        "model": tiny_language_model(tmp_path / "model"),
        "output": str(tmp_path / "out"),
        "variants": VARIANTS,
        "block": BLOCK,
        **{f"{name}_file": str(tmp_path / f"{name}.txt") for name in ("train", "eval")},
        "steps": 4,
        "batch": 2,
        "eval_batch": 2,
        "accumulation": 2,
        "learning_rate": 1e-2,
        "balance_weight": 0.01,
    }


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "lora"])
def test_what_two_processes_shard_is_saved_with_its_patch_and_loaded_in_one(
    settings: dict[str, Any], rank: int, tmp_path: Path
) -> None:
    settings = {**settings, "lora_rank": rank, "accumulation": 1}
    done = started(tmp_path / "worker.py", written(settings, tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
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


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "first", "second"), [(2, 2, 1), (2, 1, 2), (0, 2, 1)])
def test_a_killed_run_goes_on_with_another_number_of_processes(
    settings: dict[str, Any], rank: int, first: int, second: int, tmp_path: Path
) -> None:
    """To where one process comes that was neither sharded nor killed."""
    settings = {**settings, "lora_rank": rank, "save_steps": 2, "eval_steps": 2}
    for processes, more in ((first, [Path("killed")]), (second, [])):
        given = written({**settings, "accumulation": 2 // processes}, tmp_path)
        done = started(tmp_path / "worker.py", given, *more, processes=processes)
        assert (done.returncode == 0) == (not more), done.stderr
    assert run({**settings, "output": str(tmp_path / "alone")})["resumed_from"] is None
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("out", "alone"))
    assert ours["resumed_from"] == "checkpoint-2"
    for here, there in zip(ours["curve"], theirs["curve"], strict=True):
        assert here["step"] == there["step"]
        assert here["perplexity"] == pytest.approx(there["perplexity"], rel=1e-4)
    for name in ("adapter_model", "patchattn_model") if rank else ("model",):
        here, there = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("out", "alone"))
        assert set(here) == set(there)
        for key, value in here.items():
            torch.testing.assert_close(value, there[key], rtol=1e-3, atol=1e-4)
