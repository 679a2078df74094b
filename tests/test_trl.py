"""Trainers of TRL on patched models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import patchattn
from patchattn.training import balance_loss

from .recipes import tiny_language_model
from .training import LEARNED, patched, rows


class PatchedSFTTrainer(patchattn.PatchedTrainerMixin, SFTTrainer):
    pass


def trained(folder: Path, model: torch.nn.Module, tokens: list[torch.Tensor], **settings: Any) -> torch.nn.Module:
    """The model after one step of SGD with rate 0.1 on all rows, two of them at a time."""
    own = {key: settings.pop(key) for key in list(settings) if key.startswith("balance")}
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=len(tokens) // 2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **settings,
    )
    data = Dataset.from_dict({"input_ids": [row.tolist() for row in tokens]})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_language_model(folder / "tokenizer"))
    PatchedSFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, **own).train()
    return model


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("label_smoothing_factor", [0.0, 0.1])
def test_sft_adds_the_balance_loss(gradient_checkpointing: bool, label_smoothing_factor: float, tmp_path: Path) -> None:
    """What the weight adds to a step is -rate times the mean over batches of the loss's gradient. With label smoothing
    TRL runs a second forward, without gradients, for its metrics."""
    tokens = [row["input_ids"] for row in rows(4)]
    settings = {"gradient_checkpointing": gradient_checkpointing, "label_smoothing_factor": label_smoothing_factor}
    ends = []
    for weight in (0.0, 5.0):
        model = trained(tmp_path, patched(LEARNED), tokens, balance_weight=weight, **settings)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    model = patched(LEARNED)
    for first in (0, 2):
        with balance_loss(model, 5.0) as balance:
            model(torch.stack(tokens[first : first + 2]))
        (balance() / 2).backward()
    routers = {name: p for name, p in model.named_parameters() if "routed_weight" in name}
    assert len(routers) == 2
    for name, p in routers.items():
        assert p.grad.abs().max() > 1e-4
        torch.testing.assert_close(ends[1][name] - ends[0][name], -0.1 * p.grad, rtol=1e-4, atol=1e-8)
