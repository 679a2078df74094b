"""What the tests of recipes share: importing one, starting one, and a tiny language model to run it on."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .families import FAMILIES, VOCABULARY

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
CHARACTERS = " .,'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n"


def recipe(name: str) -> ModuleType:
    """A module of recipes/, imported as it sees itself when it is started by its path."""
    if str(RECIPES) not in sys.path:
        sys.path.insert(0, str(RECIPES))
    return importlib.import_module(name)


def written(settings: dict[str, Any], folder: Path) -> Path:
    """The settings as a YAML file."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def started(script: Path, *arguments: Path, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """A script run to its end on a CPU, in one process or several that talk over gloo."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), *map(str, arguments)]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(RECIPES)]),
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=540)


def tiny_language_model(folder: Path, **config: Any) -> str:
    """A folder with a random two-layer Llama and a tokenizer of characters; `config` changes its configuration."""
    model = FAMILIES["llama"].make()
    for key, value in config.items():
        setattr(model.config, key, value)
    model.save_pretrained(folder)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *CHARACTERS])}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)
