"""torch's own `fully_shard` and distributed checkpoints: a patched model with LoRA goes on with another number of
processes, and each of them saves the adapter with its patch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import patchattn

from .families import FAMILIES
from .recipes import ROOT

WORKER = """
import sys
import torch, torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
import patchattn
from tests.test_resharded import adapted, optimizer_of, train

folder, begins = sys.argv[1], sys.argv[2] == "begins"
dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
model = adapted()
for layer in model.get_base_model().model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = optimizer_of(model)
if not begins:
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    checkpoint.load(state, checkpoint_id=f"{folder}/state")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
rows = [0, 1] if dist.get_world_size() == 1 else [dist.get_rank()]
train(model, optimizer, rows, steps=2)
state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
checkpoint.save(state, checkpoint_id=f"{folder}/state")
patchattn.save_pretrained(model, f"{folder}/adapter")
dist.destroy_process_group()
"""


def adapted() -> Any:
    """LoRA beside what a variant learns, which differs from how it is made."""
    torch.manual_seed(3)
    model = patchattn.patch_model(FAMILIES["llama"].make(), ["ssa", "moh"], {"moh": {"router": "learned"}}).double()
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], modules_to_save=["patchattn"], init_lora_weights=False)
    return get_peft_model(model, lora).train()


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: list[int], steps: int) -> None:
    """On the mean loss of some rows, each a forward of its own; FSDP averages over processes."""
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    for _ in range(steps):
        for row in rows:
            (model(tokens[row : row + 1]).logits.pow(2).mean() / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(first: int, second: int, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    for processes, how in ((first, "begins"), (second, "goes on")):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        arguments = [*command, str(script), str(tmp_path), how]
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    alone = adapted()
    train(alone, optimizer_of(alone), [0, 1], steps=4)
    loaded = patchattn.load_patch(FAMILIES["llama"].make().double(), tmp_path / "adapter")
    found = type(alone).from_pretrained(loaded, tmp_path / "adapter").eval()
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    torch.testing.assert_close(found(tokens).logits, alone.eval()(tokens).logits, rtol=1e-7, atol=1e-9)
