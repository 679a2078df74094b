"""FSDP2 on two CPU processes: a patched model trains, with the load-balance loss where it routes; its full state is
that of one process, and is saved and loaded as any other."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import patchattn
from patchattn.core.variant import Variant
from patchattn.training import balance_loss

from .behaviour import Case, accepted, variant_parameters
from .families import FAMILIES, outputs


def chosen() -> list[Case]:
    """First examples: of every variant with parameters, and of each mechanism one without."""
    first = [case for case in accepted("llama") if case.example == 0]
    bare = {case.info.variant.__module__.split(".")[2]: case for case in first if case.info.extra_parameters == "none"}
    return [case for case in first if case.info.extra_parameters != "none" or case in bare.values()]


CASES = chosen()

WORKER = """
import sys
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from safetensors.torch import save_file
import patchattn
from tests.test_distributed import CASES, build, train

dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (2,))
for index in range(len(CASES)):
    model = build(index)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, [dist.get_rank()])
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        save_file({k: v.clone() for k, v in state.items()}, f"{sys.argv[1]}/{index}.safetensors")
        whole = build(index)
        whole.load_state_dict(state)
        patchattn.save_pretrained(whole, f"{sys.argv[1]}/{index}")
dist.destroy_process_group()
"""


def build(index: int) -> torch.nn.Module:
    return CASES[index].patch(FAMILIES["llama"].make()).double().train()


def train(model: torch.nn.Module, rows: list[int]) -> None:
    """Three steps of SGD on the mean loss of some rows, each a forward of its own; FSDP averages over processes."""
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for row in rows:
            (_loss(model, tokens[row : row + 1]) / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    if not any(isinstance(module, Variant) and module.routes for module in model.modules()):
        return model(tokens).logits.pow(2).mean()
    with balance_loss(model, 0.5) as balance:
        loss = model(tokens).logits.pow(2).mean()
    return loss + balance()


def test_fsdp2_trains_saves_and_loads_like_one_process(tmp_path: Path) -> None:
    """All variants in one test: the two processes start once."""
    script, root = tmp_path / "worker.py", Path(__file__).parent.parent
    script.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    subprocess.run([*command, str(tmp_path)], cwd=root, env=environment, check=True, timeout=300)
    for index, case in enumerate(CASES):
        try:
            model = check_training(index, tmp_path)
            check_what_was_saved(index, tmp_path, model)
        except AssertionError as error:
            error.add_note(f"This was {case}.")
            raise


def check_training(index: int, folder: Path) -> torch.nn.Module:
    """The model as one process trains it; AssertionError if two gave something else."""
    model = build(index)
    before = {name: p.detach().clone() for name, p in variant_parameters(model).items()}
    train(model, [0, 1])
    state, got = model.state_dict(), load_file(folder / f"{index}.safetensors")
    assert set(got) == set(state)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-8, atol=1e-10)
    for name, value in before.items():
        assert not torch.equal(got[name], value), name
    return model


def check_what_was_saved(index: int, folder: Path, model: torch.nn.Module) -> None:
    """AssertionError if what two processes saved computes something else than the model."""
    inputs = FAMILIES["llama"].inputs()
    expected = outputs(model.eval(), **inputs)
    found = [patchattn.from_pretrained(folder / str(index)).eval()]
    if CASES[index].info.kind != "surgery":  # whose trained weights fit no base model
        base = FAMILIES["llama"].make().double()
        weights = load_file(folder / f"{index}.safetensors")
        base.load_state_dict({name: value for name, value in weights.items() if ".patchattn." not in name})
        found.append(patchattn.load_patch(base, folder / str(index)))
    for loaded in found:
        for got, want in zip(outputs(loaded, **inputs), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
