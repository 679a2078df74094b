"""What the tests of recipes share: importing one, starting one, and a tiny language model to run it on."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from .families import FAMILIES, VOCABULARY

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "no", "very", "and"]
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


def tiny_encoder(folder: Path) -> str:
    """A folder with a random two-layer BERT without dropout, and its tokenizer."""
    words = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"]))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    torch.manual_seed(0)
    config = BertConfig(
        **sizes, vocab_size=len(WORDS), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Word after word, `good` for label 1 and `bad` for label 0, of many lengths."""
    generator = np.random.default_rng(seed)
    made = []
    for label in generator.integers(2, size=count):
        words = list(generator.choice(["a", "film", "no", "very", "and"], size=generator.integers(1, 9)))
        words.insert(int(generator.integers(len(words) + 1)), ["bad", "good"][label])
        made.append((" ".join(words), int(label)))
    return made


def sst2_files(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """SST-2 in its layout, with numbers of rows that fit neither the batches nor two processes; the rows by split."""
    (folder / "SST-2").mkdir()
    splits = {name: sentences(count, seed) for name, count, seed in (("train", 21, 0), ("dev", 14, 1))}
    for name, rows in splits.items():
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        (folder / "SST-2" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return splits
