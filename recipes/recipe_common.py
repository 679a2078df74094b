"""What the recipes share: settings, patching, LoRA, checkpoints that survive a kill, and one result file.

A recipe is started by its path (`accelerate launch recipes/<recipe>.py CONFIG.yaml`), which puts this folder on
`sys.path`; so recipes say `from recipe_common import ...`. A recipe subclasses `TrainingSettings` with its own fields
and defines `run(settings)`:

    def run(settings: MySettings) -> dict[str, Any]:
        if (done := finished(settings)) is not None:
            return done
        arguments = begin(settings)  # claims the output folder
        model = prepare(AutoModelFor....from_pretrained(settings.model), settings, heads=["classifier"])
        trainer = PatchedTrainer.of(model, settings, arguments, train_dataset=..., eval_dataset=..., ...)
        return train(trainer, settings)

    if __name__ == "__main__":
        command(MySettings, run)
"""

import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import accelerate
import peft
import torch
import transformers
import typer
from peft import LoraConfig, get_peft_model
from recipe_checkpoints import CompleteCheckpoints, last_checkpoint
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import patchattn
from patchattn import Settings, Variant, option, variant_info
from patchattn.files.documents import as_json, quoted, read_json_object, write_json
from patchattn.training import PatchedTrainerMixin, RoutingCallback
from patchattn.variants.routing.moh.callback import ActiveRatioCallback

SETTINGS_FILE = "settings.json"  # written when a run begins
METRICS_FILE = "metrics.json"  # written when it has ended
_NEVER = 10**9

# Settings that do something only with a variant that defines this member of the contract
EFFECT = {"balance_weight": "routes", "active_ratio_steps": "anneal", "scale_learning_rate": "fast_parameters"}


def configured(variants: Any) -> Any:
    """Variants with all their settings, checked and with their defaults, so that settings.json says all."""
    if not isinstance(variants, dict):
        return variants
    return {name: variant_info(name).configure(given).to_dict() for name, given in variants.items()}


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """Settings that all recipes have.

    Raises:
        TypeError, ValueError: when made, whatever is wrong with them; no model is loaded for that.
    """

    output: str = option(help="Folder for checkpoints, the trained model, settings.json and metrics.json.")
    variants: dict[str, dict[str, Any]] = option(
        {},
        parse=configured,
        help="Name of a variant to its settings, outermost first; empty trains the unpatched model alike.",
    )
    lora_rank: int = option(0, help="Rank of LoRA; 0 trains every parameter.", minimum=0)
    lora_alpha: float | None = option(None, help="LoRA's scale; None: twice the rank.", minimum=0.0)
    lora_dropout: float = option(0.0, help="Dropout before LoRA.", minimum=0.0, maximum=0.99)
    lora_targets: str | tuple[str, ...] = option(
        "all-linear", help="Names of the layers LoRA goes on, a regular expression, or all-linear."
    )
    steps: int | None = option(None, help="Optimizer steps. Give either this or epochs.", minimum=1)
    epochs: float | None = option(None, help="Passes over the training data.", minimum=0.0)
    batch: int = option(8, help="Rows per step, process and accumulation.", minimum=1)
    eval_batch: int = option(16, help="Rows per step and process of an evaluation.", minimum=1)
    accumulation: int = option(1, help="Forwards per optimizer step.", minimum=1)
    learning_rate: float = option(1e-3, help="Peak, after the warm-up; it then falls linearly to zero.", minimum=0.0)
    scale_learning_rate: float | None = option(
        None, help="Learning rate of variants' scales, such as SSA's alpha; None: that of all else.", minimum=0.0
    )
    weight_decay: float = option(0.0, help="AdamW's decay of matrices.", minimum=0.0)
    warmup_ratio: float = option(0.1, help="Share of the steps in which the rate rises.", minimum=0.0, maximum=0.99)
    balance_weight: float = option(0.0, help="Weight of MoH's load-balance loss; the paper: 0.01.", minimum=0.0)
    balance_definition: Literal["paper", "released"] = option("paper", help="Which form of that loss.")
    active_ratio_steps: int = option(
        0, help="Steps over which MoH's active heads fall from all to their budget; 0: at once.", minimum=0
    )
    gradient_checkpointing: bool = option(False, help="Compute activations again instead of keeping them.")
    bf16: bool = option(False, help="Train in bfloat16 mixed precision.")
    seed: int = option(0, help="Seed of data order, adapters, routers, heads and dropout.", minimum=0)
    save_steps: int | None = option(None, help="Steps between checkpoints; None: one at the end.", minimum=1)
    eval_steps: int | None = option(
        None, help="Steps between evaluations; None: before the first and after the last step.", minimum=1
    )
    log_steps: int = option(10, help="Steps between entries of the log.", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"Give either steps or epochs, got steps={self.steps} and epochs={self.epochs}.")
        if self.steps is not None and self.active_ratio_steps > self.steps:
            raise ValueError(f"active_ratio_steps must be at most steps, {self.steps}, got {self.active_ratio_steps}.")
        for field, member in EFFECT.items():
            given = getattr(self, field) != getattr(type(self), field)
            if given and not any(defines(name, member) for name in self.variants):
                able = ", ".join(name for name in patchattn.list_variants() if defines(name, member))
                got = ", ".join(self.variants) or "none"
                raise ValueError(f"{field} has no effect on the variants given ({got}); it needs one of: {able}.")

    @property
    def has_router(self) -> bool:
        """Whether a variant chooses heads."""
        return any(defines(name, "routes") for name in self.variants)

    def arguments(self, **more: Any) -> TrainingArguments:
        """What transformers' Trainer takes; `more` adds to it."""
        length = {"num_train_epochs": self.epochs} if self.steps is None else {"max_steps": self.steps}
        if self.gradient_checkpointing:
            more |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        return TrainingArguments(
            output_dir=self.output,
            **length,
            per_device_train_batch_size=self.batch,
            per_device_eval_batch_size=self.eval_batch,
            gradient_accumulation_steps=self.accumulation,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_ratio,  # below 1 it is a share of the steps
            bf16=self.bf16,
            seed=self.seed,
            logging_steps=self.log_steps,
            eval_strategy="steps",
            eval_steps=self.eval_steps or _NEVER,  # the Trainer evaluates after the last step in any case
            save_strategy="steps",
            save_steps=self.save_steps or _NEVER,
            save_total_limit=2,  # the older one must be there while the newer one is written
            use_cpu=not torch.accelerator.is_available(),  # several processes then find each other over gloo
            dataloader_pin_memory=torch.accelerator.is_available(),
            report_to=[],
            **more,
        )


def defines(variant: str, member: str) -> bool:
    """Whether a variant defines an optional member of the contract."""
    kind = variant_info(variant).variant
    return getattr(kind, member, None) is not getattr(Variant, member, None)


# The output folder: one run, which can be continued but not changed.


def finished(settings: TrainingSettings) -> dict[str, Any] | None:
    """The metrics of this run if it has ended, else None; nothing is written.

    Raises:
        ValueError: the output folder holds a run with other settings; the message names the keys that differ.
    """
    folder = Path(settings.output)
    if not any(path.name == METRICS_FILE or path.name.startswith(PREFIX_CHECKPOINT_DIR) for path in folder.glob("*")):
        return None  # whatever was begun here, nothing of it would be continued
    if not (folder / SETTINGS_FILE).is_file():
        raise ValueError(f"{folder} holds a run without {SETTINGS_FILE}; choose another output folder.")
    before, now = _compared(read_json_object(folder / SETTINGS_FILE)), _compared(_identity(settings))
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if keys:
        changes = "; ".join(f"{key}: {quoted(before.get(key))} became {quoted(now.get(key))}" for key in keys)
        raise ValueError(f"{folder} holds a run with other settings ({changes}). Choose another output folder.")
    metrics = folder / METRICS_FILE
    return read_json_object(metrics) if metrics.is_file() else None


def begin(settings: TrainingSettings, **more: Any) -> TrainingArguments:
    """Claim the output folder for this run and seed everything; `more` goes to `TrainingArguments`.

    Raises:
        ValueError: as `finished`, or the processes that were started do not work together.
    """
    finished(settings)
    arguments = settings.arguments(**more)
    if arguments.world_size != _processes():
        raise ValueError(
            f"{_processes()} processes were started, but accelerate sees {arguments.world_size}. On a CPU beside an "
            "accelerator, set ACCELERATE_USE_CPU=1."
        )
    if arguments.process_index == 0:
        Path(settings.output).mkdir(parents=True, exist_ok=True)
        write_json(Path(settings.output) / SETTINGS_FILE, _identity(settings))
    set_seed(settings.seed)
    return arguments


def _processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _identity(settings: TrainingSettings) -> dict[str, Any]:
    """What a run is made with, as JSON gives it back; the folder may move."""
    values = {**settings.to_dict(), "processes": _processes()}
    del values["output"]
    order = list(values["variants"])  # a comparison of dictionaries would not see it
    return as_json({**values, "order": order})


def _compared(values: dict[str, Any]) -> dict[str, Any]:
    """What must not change between the starts of one run. Processes may, where each accumulates as many batches more or
    fewer: a step then sees the rows that it would have seen."""
    flat = _flat(values)
    shares = [flat.pop(key, None) for key in ("processes", "accumulation")]
    return {**flat, "processes x accumulation": math.prod(shares) if None not in shares else None}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, such as `variants.moh.active_ratio`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# The model


def prepare(model: Any, settings: TrainingSettings, *, heads: Sequence[str] = (), task_type: str | None = None) -> Any:
    """Patch a model and put LoRA on it, as the settings say.

    Args:
        model: a transformers model.
        settings: of the run.
        heads: names of modules that are trained whole beside LoRA, such as a new classification head.
        task_type: PEFT's name of the task, such as `CAUSAL_LM`.

    Returns:
        The model, or a PeftModel around it.
    """
    names = list(settings.variants)
    if names:
        patchattn.patch_model(model, names, settings.variants if len(names) > 1 else settings.variants[names[0]])
    if not settings.lora_rank:
        return model
    own = ["patchattn"] if names and patchattn.patch_info(model)["extra_parameters"] else []
    targets = settings.lora_targets
    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=[*heads, *own] or None,
        task_type=task_type,
    )
    return get_peft_model(model, lora)


class PatchedTrainer(PatchedTrainerMixin, Trainer):
    """A Trainer with what variants need, as `TrainingSettings` say; `of` makes one."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        settings: TrainingSettings,
        arguments: TrainingArguments,
        *,
        mean_loss: bool = False,
        **more: Any,
    ) -> Self:
        """A trainer for a run.

        Args:
            model: of the run.
            settings: of the run.
            arguments: of the run.
            mean_loss: the model's loss is the mean over its batch, as a classifier's, and not a share of all tokens of
                the step. transformers takes any model with keyword arguments for the latter: a BERT classifier's
                gradients would then grow with the number of accumulated batches and of processes.
            more: for `Trainer` (`train_dataset`, `eval_dataset`, `compute_metrics`, ...).
        """
        trainer = cls(
            model=model,
            args=arguments,
            balance_weight=settings.balance_weight,
            balance_definition=settings.balance_definition,
            scale_learning_rate=settings.scale_learning_rate,
            **more,
        )
        if mean_loss:
            trainer.model_accepts_loss_kwargs = False
        trainer.add_callback(CompleteCheckpoints())
        if settings.has_router:
            trainer.add_callback(RoutingCallback(trainer, heads=False))
        if settings.active_ratio_steps:
            trainer.add_callback(ActiveRatioCallback(settings.active_ratio_steps))
        return trainer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model; in a checkpoint under its names in memory.

        `save_pretrained` may write other names, which `from_pretrained` converts (those of a ViT, or of experts), but
        the Trainer reads a checkpoint without converting them: it would go on from the first weights with a warning.
        """
        super()._save(output_dir, state_dict)
        is_checkpoint = output_dir is not None and Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR)
        if is_checkpoint and isinstance(self.model, PreTrainedModel) and self.args.should_save:
            self.model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)


def train(
    trainer: PatchedTrainer, settings: TrainingSettings, *, evaluate_first: bool = True, **more: Any
) -> dict[str, Any]:
    """Train from the last complete checkpoint, or from the start; save the model; write `metrics.json`.

    Args:
        trainer: made by `PatchedTrainer.of`.
        settings: of the run.
        evaluate_first: also evaluate before the first step.
        more: further entries of the metrics.

    Returns:
        What `metrics.json` holds: `curve` (the step and what the Trainer's evaluation gave, without `eval_`: before
        the first step, every `eval_steps` and after the last), `before` (`None` if there was no such evaluation) and
        `after` (its ends), `log` (all else that was logged), parameter counts, seconds of this start, versions, and the
        settings.
    """
    start = time.time()
    checkpoint = last_checkpoint(settings.output)
    trainer.args.eval_on_start = evaluate_first and checkpoint is None
    trainer.train(resume_from_checkpoint=checkpoint)
    save(trainer, settings)
    curve = [_evaluation(entry) for entry in trainer.state.log_history if "eval_loss" in entry]
    metrics = {
        **more,
        "before": curve[0] if evaluate_first else None,
        "after": curve[-1],
        "curve": curve,
        "log": [entry for entry in trainer.state.log_history if "eval_loss" not in entry],
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "seconds": round(time.time() - start, 1),
        "resumed_from": None if checkpoint is None else Path(checkpoint).name,
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (patchattn, torch, transformers, peft, accelerate)},
        },
        "settings": _identity(settings),
    }
    if trainer.args.process_index == 0:
        write_json(Path(settings.output) / METRICS_FILE, metrics)
    return metrics


def _evaluation(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of the Trainer's log without `eval_`, the speed and the epoch."""
    speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
    return {key.removeprefix("eval_"): value for key, value in entry.items() if key not in (*speed, "epoch")}


def save(trainer: PatchedTrainer, settings: TrainingSettings) -> None:
    """Write the model, or the adapter, into the output folder, for `patchattn.from_pretrained`."""
    trainer.save_model(settings.output)  # of a sharded model every process takes part
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if settings.variants and trainer.args.process_index == 0 and not is_sharded:
        patchattn.save_pretrained(trainer.accelerator.unwrap_model(trainer.model), settings.output)


# The command line


def command(settings_class: type[TrainingSettings], run: Callable[[Any], dict[str, Any]]) -> None:
    """The command line of a recipe: one argument, a YAML file. What is wrong with it is one line and exit status 2."""

    def main(config: Annotated[Path, typer.Argument(help="YAML file with the settings of a run.")]) -> None:
        try:
            settings = settings_class.from_yaml(config)
            done = finished(settings)
        except (TypeError, ValueError, NotImplementedError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from error
        if done is not None:
            typer.echo(f"{settings.output} holds this run, finished: nothing to do.")
        metrics = run(settings) if done is None else done
        if int(os.environ.get("RANK", "0")) == 0:
            for when in ("before", "after"):
                values = {key: value for key, value in (metrics[when] or {}).items() if key != "step"}
                typer.echo(f"{when}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))

    main.__doc__ = settings_class.__doc__
    typer.run(main)
