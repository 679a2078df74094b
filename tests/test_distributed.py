"""FSDP2 on two CPU processes: a patched model trains, and its full state dict is that of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .behaviour import cases, variant_parameters
from .families import FAMILIES

WORKER = """
import sys
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from safetensors.torch import save_file
from tests.behaviour import cases
from tests.test_distributed import build, step

dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (2,))
for index in range(len(cases())):
    model = build(index)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model, dist.get_rank())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        save_file({k: v.clone() for k, v in state.items()}, f"{sys.argv[1]}/{index}.safetensors")
dist.destroy_process_group()
"""


def build(index: int) -> torch.nn.Module:
    return cases()[index].patch(FAMILIES["llama"].make()).double().train()


def step(model: torch.nn.Module, rows: int | slice) -> None:
    """Three steps of SGD on this process's rows; FSDP averages the gradients of the processes."""
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    tokens = tokens[rows : rows + 1] if isinstance(rows, int) else tokens[rows]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(tokens).logits.pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the state of every case after training on two processes: one start of processes for all."""
    folder, root = tmp_path_factory.mktemp("fsdp"), Path(__file__).parent.parent
    script = folder / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    subprocess.run([*command, str(folder)], cwd=root, env=environment, check=True, timeout=300)
    return folder


@pytest.mark.parametrize("index", range(len(cases())), ids=[str(case) for case in cases()])
def test_fsdp2_trains_like_one_process(index: int, sharded: Path) -> None:
    model = build(index)
    before = {name: p.detach().clone() for name, p in variant_parameters(model).items()}
    step(model, slice(None))
    state, got = model.state_dict(), load_file(sharded / f"{index}.safetensors")
    assert set(got) == set(state)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-8, atol=1e-10)
    for name, value in before.items():
        assert not torch.equal(got[name], value), name
