"""Continue-tune a causal language model under a variant, with LoRA or in full; perplexity before and after.

    accelerate launch recipes/finetune_causal_lm.py recipes/configs/moh_lora.yaml

The configuration is checked whole before a model is loaded. Paths in it are relative to where the recipe is started.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import patchattn
from patchattn.settings import nearest


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one run.

    Attributes:
        model: folder or Hub id of a causal language model with its tokenizer.
        train_file, eval_file: plain text.
        output: folder for checkpoints, the patched model and `metrics.json`.
        variants: name to settings, outermost first; empty trains the unpatched model alike.
        lora_rank: rank of LoRA on all linear layers; 0 trains every parameter.
        block: tokens per packed row.
        steps: optimiser steps.
        batch: rows per step and process.
        learning_rate: of everything that is trained.
        seed: of data order, adapters and routers.
    """

    model: str
    train_file: str
    eval_file: str
    output: str
    variants: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    lora_rank: int = 0
    block: int = 256
    steps: int = 200
    batch: int = 8
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value, kind = getattr(self, item.name), dict if item.name == "variants" else item.type
            fits = isinstance(value, int | float if kind is float else kind)
            if not fits or isinstance(value, bool):
                raise TypeError(f"{item.name} must be {kind.__name__}, got {value!r}.")
            if kind in (int, float) and item.name not in ("lora_rank", "seed") and value <= 0:
                raise ValueError(f"{item.name} must be positive, got {value!r}.")
        for name, settings in self.variants.items():
            patchattn.variant_info(name).variant.config_class.from_dict(settings or {})
        for path in (self.train_file, self.eval_file):
            if not Path(path).is_file():
                raise ValueError(f"There is no file {path!r}.")


def read_recipe(path: Path) -> Recipe:
    """A recipe from YAML; ValueError or TypeError on whatever is wrong with it."""
    if not path.is_file():
        raise ValueError(f"There is no configuration {str(path)!r}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise TypeError(f"{path} must hold a mapping, got {type(content).__name__}.")
    known = [item.name for item in dataclasses.fields(Recipe)]
    for name in content:
        if name not in known:
            raise ValueError(f"{path} has the unknown key {name!r}{nearest(str(name), known)}")
    required = [f.name for f in dataclasses.fields(Recipe) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in content]:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    return Recipe(**content)


def packed(path: str, tokenizer: Any, block: int) -> list[dict[str, torch.Tensor]]:
    """The text as rows of `block` tokens, one after the other, without padding; a shorter rest is left out."""
    tokens = tokenizer(Path(path).read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    rows = tokens[: len(tokens) // block * block].view(-1, block)
    if not len(rows):
        raise ValueError(f"{path} holds {len(tokens)} tokens, fewer than one block of {block}.")
    return [{"input_ids": row, "labels": row} for row in rows]


def run(recipe: Recipe) -> dict[str, float]:
    """Train, evaluate before and after, and save."""
    set_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    model: Any = AutoModelForCausalLM.from_pretrained(recipe.model)
    arguments = TrainingArguments(
        output_dir=recipe.output,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        save_strategy="no",
        report_to=[],
    )
    evaluation = packed(recipe.eval_file, tokenizer, recipe.block)

    def perplexity() -> float:
        return math.exp(Trainer(model, arguments, eval_dataset=evaluation).evaluate()["eval_loss"])

    metrics = {"perplexity_unpatched": perplexity()}
    if recipe.variants:
        names = list(recipe.variants)
        settings: Any = {name: given or {} for name, given in recipe.variants.items()}
        patchattn.patch_model(model, names, settings if len(names) > 1 else settings[names[0]])
    metrics["perplexity_before"] = perplexity()
    if recipe.lora_rank:
        saved = ["patchattn"] if recipe.variants else None
        lora = LoraConfig(r=recipe.lora_rank, target_modules="all-linear", modules_to_save=saved, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    Trainer(model, arguments, train_dataset=packed(recipe.train_file, tokenizer, recipe.block)).train()
    metrics["perplexity_after"] = perplexity()
    if arguments.process_index == 0:
        if recipe.variants:
            patchattn.save_pretrained(model, recipe.output)
        else:
            model.save_pretrained(recipe.output)
        tokenizer.save_pretrained(recipe.output)
        (Path(recipe.output) / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def main(config: Annotated[Path, typer.Argument(help="YAML file with the settings of a run.")]) -> None:
    """Continue-tune a causal language model under a variant."""
    try:
        recipe = read_recipe(config)
    except (TypeError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    for name, value in run(recipe).items():
        typer.echo(f"{name}: {value:.3f}")


if __name__ == "__main__":
    typer.run(main)
