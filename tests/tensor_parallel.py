"""What the tests of tensor parallelism run in each of two processes, over gloo, and what it finds."""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as tf
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import patchattn

from .behaviour import Case, cases
from .families import FAMILIES, outputs

ROOT = Path(__file__).parent.parent
KINDS = ("attention", "surgery", "cache", "decoding")
EXACT = 1e-9  # of float64: sums over processes are in another order


def run_in_two(task: Callable[[Path], None], folder: Path, *arguments: str) -> dict[str, Any]:
    """What the first of two processes writes, each of which calls a function of the tests with a folder."""
    script = folder / "worker.py"
    script.write_text(
        f"from tests.tensor_parallel import connected\nfrom {task.__module__} import {task.__name__}\n"
        f"connected({task.__name__})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    done = subprocess.run(
        [*command, str(folder), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[:20000]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def connected(task: Callable[..., dict[str, Any]]) -> None:
    """Run a task in this process, whose folder and arguments the command line names."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    found = task(Path(sys.argv[1]), *sys.argv[2:])
    if dist.get_rank() == 0:
        Path(sys.argv[1], "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def wide() -> nn.Module:
    """A Llama of which each of two processes has several kv heads, so that they can be mixed up."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, head_dim=8, initializer_range=0.2)
    )
    return model.eval()


MAKE: dict[str, Callable[[], Any]] = {"llama": FAMILIES["llama"].make, "wide": wide}


def written(folder: Path, name: str) -> str:
    """A folder with one of these models, written by the first process."""
    path = folder / name
    if dist.get_rank() == 0:
        MAKE[name]().save_pretrained(path)
    dist.barrier()
    return str(path)


def shared(path: str) -> Any:
    """The model of a folder, shared out over all processes, in float64."""
    return AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.float64).eval()


def answers(model: nn.Module) -> list[torch.Tensor]:
    """Logits of a batch, of one whose second row is padded, and of calls on a kv cache."""
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    cache, parts = DynamicCache(config=model.config), []
    for part in tokens.split([6, 1, 1, 1], dim=1):
        parts += outputs(model, input_ids=part, past_key_values=cache, use_cache=True)
    padded = outputs(model, input_ids=tokens, attention_mask=mask)[0][:, 3:]
    return [outputs(model, input_ids=tokens)[0], padded, torch.cat(parts, dim=1)]


def compared(folder: Path, name: str, chosen: Sequence[Case]) -> dict[str, str]:
    """By case: `equal` to one process, the error with which it was refused, or what went wrong."""
    model, found = shared(written(folder, name)), {}
    for case in chosen:
        try:
            alone = case.patch(MAKE[name]().double())
        except (NotImplementedError, ValueError) as error:
            found[str(case)] = f"not for this model: {error}"
            continue
        if dist.get_rank() == 0:
            patchattn.save_patch(alone, folder / "patch")
        dist.barrier()
        try:
            patchattn.load_patch(model, folder / "patch")
        except NotImplementedError as error:
            found[str(case)] = str(error)
            continue
        pairs = zip(answers(model), answers(alone), strict=True)
        worst = torch.stack([(got - want).abs().max() for got, want in pairs]).max()
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        found[str(case)] = "equal" if worst < EXACT else f"differs by {worst:.1e}"
        patchattn.unpatch_model(model)
    pairs = zip(answers(model), answers(MAKE[name]().double()), strict=True)
    found["unpatched"] = "equal" if all((got - want).abs().max() < EXACT for got, want in pairs) else "differs"
    return found


def all_cases() -> list[Case]:
    """Every example of every variant that a Llama takes."""
    return [case for case in cases(*KINDS) if case.refusal("llama") is None]
