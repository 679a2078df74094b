"""A recipe under FSDP2 on two CPU processes: what it saves is loaded in one.

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
from transformers import AutoTokenizer

import patchattn

from .recipes import recipe, started, tiny_language_model, written
from .test_finetune_causal_lm import BLOCK, TEXT, VARIANTS

WORKER = """
import sys
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from finetune_causal_lm import CausalLMSettings, run
from torch.distributed.fsdp import FSDPModule
from recipe_common import PatchedTrainer

made, save = AcceleratorState.__init__, PatchedTrainer.save_model

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

AcceleratorState.__init__, PatchedTrainer.save_model = told, saved
run(CausalLMSettings.from_yaml(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "lora"])
def test_what_two_processes_shard_is_saved_with_its_patch_and_loaded_in_one(rank: int, tmp_path: Path) -> None:
    model = tiny_language_model(tmp_path / "model")
    for name, size in (("train", 16), ("eval", 5)):
        (tmp_path / f"{name}.txt").write_text((TEXT * 9)[: size * BLOCK])
    settings: dict[str, Any] = {
        "model": model,
        "output": str(tmp_path / "out"),
        "variants": VARIANTS,
        "block": BLOCK,
        **{f"{name}_file": str(tmp_path / f"{name}.txt") for name in ("train", "eval")},
        "lora_rank": rank,
        "steps": 4,
        "batch": 2,
        "eval_batch": 2,
        "learning_rate": 1e-2,
        "balance_weight": 0.01,
    }
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = started(script, written(settings, tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    found = patchattn.from_pretrained(tmp_path / "out").eval()
    assert isinstance(found, PeftModel) == bool(rank)
    assert [patch["variant"] for patch in patchattn.patch_info(found)["patches"]] == list(VARIANTS)
    module = recipe("finetune_causal_lm")
    tokens = module.packed(settings["eval_file"], AutoTokenizer.from_pretrained(model), BLOCK)
    rows = torch.stack([row["input_ids"] for row in tokens])
    with torch.no_grad():
        loss = module.row_losses(found(rows).logits, rows).sum() / rows[:, 1:].numel()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert math.exp(loss) == pytest.approx(metrics["after"]["perplexity"], rel=1e-5)
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"]
