"""Continue-tune a causal language model under variants, with LoRA or in full; perplexity before, during and after.

    accelerate launch recipes/finetune_causal_lm.py recipes/configs/moh_lora.yaml

The configuration is checked whole before a model is loaded. Paths in it are relative to where the recipe is started.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from recipe_common import PatchedTrainer, TrainingSettings, begin, command, finished, prepare, train
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction

from patchattn import option
from patchattn.files.documents import read_text


@dataclass(frozen=True, kw_only=True)
class CausalLMSettings(TrainingSettings):
    """Continue-tune a causal language model under variants; perplexity before, during and after."""

    model: str = option(help="Folder or Hub id of a causal language model with its tokenizer.")
    train_file: str = option(help="Plain text to train on.")
    eval_file: str = option(help="Plain text to measure perplexity on.")
    eval_rows: int | None = option(None, help="Rows of eval_file to use, from its start; None: all.", minimum=1)
    block: int = option(256, help="Tokens of a packed row.", minimum=2)
    dtype: Literal["checkpoint", "float32", "bfloat16"] = option(
        "float32", help="Type of the weights; in bfloat16, small steps of what is trained are rounded away."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for path in (self.train_file, self.eval_file):
            if not Path(path).is_file():
                raise ValueError(f"There is no file {path!r}.")


def packed(path: str, tokenizer: Any, block: int, rows: int | None = None) -> list[dict[str, torch.Tensor]]:
    """The text as rows of `block` tokens, one after the other, without padding; a shorter rest is left out."""
    tokens = tokenizer(read_text(path), return_tensors="pt", verbose=False).input_ids[0]
    whole = tokens[: len(tokens) // block * block].view(-1, block)[:rows]
    if not len(whole):
        raise ValueError(f"{path} holds {len(tokens)} tokens, fewer than one block of {block}.")
    return [{"input_ids": row, "labels": row} for row in whole]


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`(B,)` summed negative log-likelihoods of rows `(B, T, V)`, so that evaluation keeps no logits."""
    each = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return each.sum(-1)


def perplexity(evaluation: EvalPrediction) -> dict[str, float]:
    """Over all tokens but the first of each row. The Trainer's own loss counts a short last batch as a full one."""
    tokens = evaluation.label_ids[:, 1:].size
    return {"perplexity": math.exp(evaluation.predictions.sum(dtype="float64") / tokens)}


def run(settings: CausalLMSettings) -> dict[str, Any]:
    """Train and evaluate, or continue a run that was interrupted; returns what `metrics.json` holds."""
    if (done := finished(settings)) is not None:
        return done
    arguments = begin(settings, label_names=["labels"])
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    dtype = "auto" if settings.dtype == "checkpoint" else settings.dtype
    loaded = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype)
    model = prepare(loaded, settings, task_type="CAUSAL_LM")
    trainer = PatchedTrainer.of(
        model,
        settings,
        arguments,
        train_dataset=packed(settings.train_file, tokenizer, settings.block),
        eval_dataset=packed(settings.eval_file, tokenizer, settings.block, settings.eval_rows),
        processing_class=tokenizer,
        compute_metrics=perplexity,
        preprocess_logits_for_metrics=row_losses,
    )
    return train(trainer, settings)


if __name__ == "__main__":
    command(CausalLMSettings, run)
