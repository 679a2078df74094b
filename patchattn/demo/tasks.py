"""What the demo trains on: associative recall, which needs nothing, and SST-2, for real encoders."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from ..core.settings import nearest
from ..evaluation.tasks.glue import download_glue, read_glue
from ..saving.pretrained import load_pretrained

Batch = dict[str, torch.Tensor]
Example = tuple[str, int]
TASKS = ("recall", "sst2")
_POOL = 16  # batches that are sorted by length together


class Task(ABC):
    """Data, model and training settings of one demonstration.

    Attributes:
        name: as the command line calls it.
        model_name: the model, for the report.
        steps, batch_size: of the fine-tuning of every variant.
        learning_rate: of LoRA, of vectors that a variant adds and of a new head.
        rank: of LoRA.
        base_steps: steps that train the base model before it is patched; 0 for a model that is loaded.
        base_learning_rate: of these steps.
    """

    name: ClassVar[str]
    model_name: str
    steps: int
    batch_size: int
    learning_rate: float
    rank: int
    base_steps: int
    base_learning_rate: float = 0.0

    @abstractmethod
    def new_model(self, seed: int) -> nn.Module:
        """The model before any training of ours."""

    @abstractmethod
    def train_batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Exactly `steps` batches; the same ones for the same seed."""

    @abstractmethod
    def test_batches(self) -> list[Batch]:
        """Batches that are never trained on; the same ones every time."""

    @abstractmethod
    def score(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
        """Right answers and all answers of a batch."""

    @abstractmethod
    def head(self, model: nn.Module) -> list[str]:
        """Children of the model that the task needs trained whole, beside LoRA."""


class RecallTask(Task):
    """Associative recall: key-value pairs, then every key again in another order, to be answered with its value.

    A tiny Llama, trained from scratch in about a minute, does it by looking keys up: attention does all the work.

    Args:
        quick: train for a few steps only.
    """

    name = "recall"
    model_name = "tiny Llama, random start"
    rank = 8
    learning_rate = 2e-3
    base_learning_rate = 3e-3
    batch_size = 64
    pairs, keys, values = 4, 16, 16

    def __init__(self, quick: bool = False) -> None:
        self.base_steps = 5 if quick else 800
        self.steps = 3 if quick else 100
        self.test_size = 64 if quick else 1024

    def new_model(self, seed: int) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=self.keys + self.values,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=4 * self.pairs,
            # What makes this quick to learn: large weights, rotary frequencies fast enough to tell neighbours apart,
            # and one matrix for reading and writing a token, so that copying comes easily.
            initializer_range=0.05,
            rope_parameters={"rope_type": "default", "rope_theta": 10.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config)

    def train_batches(self, seed: int, steps: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield self._batch(self.batch_size, generator)

    def test_batches(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(2**31)  # no training seed of anyone
        return [self._batch(self.batch_size, generator) for _ in range(self.test_size // self.batch_size)]

    def score(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
        labels = labels[:, 1:]
        asked = labels != -100
        right = (logits[:, :-1].argmax(-1) == labels) & asked
        return int(right.sum()), int(asked.sum())

    def head(self, model: nn.Module) -> list[str]:
        return []

    def _batch(self, size: int, generator: torch.Generator) -> Batch:
        keys = torch.rand(size, self.keys, generator=generator).argsort(-1)[:, : self.pairs]
        values = torch.randint(self.values, (size, self.pairs), generator=generator) + self.keys
        order = torch.rand(size, self.pairs, generator=generator).argsort(-1)
        told = torch.stack([keys, values], -1).flatten(1)
        asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
        ids = torch.cat([told, asked], dim=1)
        labels = torch.full_like(ids, -100)
        labels[:, 2 * self.pairs + 1 :: 2] = ids[:, 2 * self.pairs + 1 :: 2]
        return {"input_ids": ids, "labels": labels}


class Sst2Task(Task):
    """SST-2: is a sentence of a film review positive or negative?

    Args:
        model: folder or Hub id of an encoder.
        data: folder with `train.tsv` and `dev.tsv` in the layout of GLUE; loaded from the Hub without one.
        quick: train for a few steps only, test on a few sentences.

    Raises:
        ValueError: model or data cannot be loaded.
    """

    name = "sst2"
    base_steps = 0
    rank = 16
    learning_rate = 1e-3
    batch_size = 32
    max_length = 64

    def __init__(self, model: str, data: Path | None = None, quick: bool = False) -> None:
        from transformers import AutoTokenizer

        self.model_id = model
        self.model_name = Path(model).name
        self.train, self.test = load_sst2(data)
        self.steps = 3 if quick else 300
        if quick:
            self.test = self.test[:32]
        self.tokenizer = load_pretrained(AutoTokenizer, model)
        if self.tokenizer.pad_token is None:
            raise ValueError(f"The tokenizer of {model} has no padding token: choose an encoder, such as BERT.")

    def new_model(self, seed: int) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)  # for the new head
        return load_pretrained(AutoModelForSequenceClassification, self.model_id, num_labels=2)

    def train_batches(self, seed: int, steps: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        needed, order = steps * self.batch_size, torch.empty(0, dtype=torch.long)
        while len(order) < needed:
            order = torch.cat([order, torch.randperm(len(self.train), generator=generator)])
        chosen = [self.train[i] for i in order[:needed].tolist()]
        # Sentences of similar length share a batch: most are short, and a long one makes the whole batch slow.
        pool = _POOL * self.batch_size
        for start in range(0, needed, pool):
            batches = self._by_length(chosen[start : start + pool])
            for i in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[i]

    def test_batches(self) -> list[Batch]:
        return self._by_length(self.test)

    def score(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
        return int((logits.argmax(-1) == labels).sum()), len(labels)

    def head(self, model: nn.Module) -> list[str]:
        body = model.base_model_prefix
        return [
            name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())
        ]

    def _by_length(self, examples: list[Example]) -> list[Batch]:
        ordered, size = sorted(examples, key=lambda example: len(example[0])), self.batch_size
        return [self._batch(ordered[start : start + size]) for start in range(0, len(ordered), size)]

    def _batch(self, examples: list[Example]) -> Batch:
        texts, labels = zip(*examples, strict=True)
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {**encoded, "labels": torch.tensor(labels)}


def make_task(name: str | None = None, model: str | None = None, data: Path | None = None, quick: bool = False) -> Task:
    """The task that the command line asks for.

    Raises:
        ValueError: unknown task, an option that the task has no use for or lacks, or unreadable model or data.
    """
    name = name or ("recall" if model is None else "sst2")
    if name not in TASKS:
        raise ValueError(f"Unknown task {name!r}{nearest(name, list(TASKS))}")
    if name == "recall":
        if model is not None or data is not None:
            raise ValueError("The recall task makes its own model and data: leave out --model and --data, or --task.")
        return RecallTask(quick)
    if model is None:
        raise ValueError("The task sst2 needs a model: give --model with the folder or the Hub id of an encoder.")
    return Sst2Task(model, data, quick)


def load_sst2(folder: Path | None) -> tuple[list[Example], list[Example]]:
    """Training and development sentences of SST-2, from a folder with its files or from the Hub.

    Raises:
        ValueError: a file is missing or not in its layout, `datasets` is not installed, or the Hub cannot be reached.
    """
    try:
        train, test = read_glue(folder, "sst2") if folder else download_glue("sst2")
    except ImportError as error:
        raise ValueError(f"{error}; or give --data, a folder with train.tsv and dev.tsv.") from error
    return [(text, int(label)) for text, _, label in train], [(text, int(label)) for text, _, label in test]
