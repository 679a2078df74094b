"""What the tests of training share: a patched model without dropout, rows to train on, and a Trainer."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

import patchattn

from .families import FAMILIES

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13, 4], [8, 2, 41, 6, 6, 30, 11, 17]])
ROUTERS = ["query_norm", "learned"]
LEARNED = {"router": "learned", "active_ratio": 0.75, "shared_ratio": 0.25}


class PatchedTrainer(patchattn.PatchedTrainerMixin, Trainer):
    pass


def patched(settings: dict[str, Any], family: str = "llama") -> torch.nn.Module:
    """A float64 model in training mode, without dropout."""
    model = FAMILIES[family].make_exact()
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    torch.manual_seed(3)
    return patchattn.patch_model(model, "moh", settings).train()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rows(count: int = 8, length: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (count, length), generator=generator)]


def trainer(folder: Path, model: torch.nn.Module, data: Any, callbacks: Any = None, **extra: Any) -> PatchedTrainer:
    own = {key: extra.pop(key) for key in list(extra) if key.startswith(("balance", "scale"))}
    defaults = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            **defaults,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **extra,
        },
    )
    return PatchedTrainer(model, arguments, train_dataset=data, callbacks=callbacks, **own)
