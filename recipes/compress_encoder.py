"""Fine-tune an encoder on a task of GLUE, then compress it with SHRP: teacher, two stages, compression, throughput.

    python recipes/compress_encoder.py recipes/configs/compress_minilm_sst2.yaml

The configuration and local files are checked whole before a model is loaded. Every stage has its own folder in
`output`: started again after a kill, the recipe leaves finished stages alone and goes on in the one that was running.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from finetune_glue import GlueTraining, Task, is_first_process, say
from recipe_common import METRICS_FILE, PatchedTrainer, begin, finished, train
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback

import patchattn
from patchattn import Settings, option, variant_info
from patchattn.evaluation.tasks.glue import glue_task, read_glue
from patchattn.files.documents import as_json, read_json_object, write_json
from patchattn.training import RoutingCallback, distillation_loss, specialise_loss
from patchattn.variants.pruning.shrp import compress, reset_usage

STAGES = ("teacher", "balance", "specialise", "final")
# Keys of all recipes that stand beside `training` here, or have nothing to act on.
NOT_IN_TRAINING = ("output", "variants", "seed", "balance_weight", "balance_definition", "active_ratio_steps")
NOT_IN_TRAINING += ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "scale_learning_rate")


@dataclass(frozen=True, kw_only=True)
class StageTraining(GlueTraining):
    """One stage of the recipe."""

    layers: tuple[int, ...] | None = option(None, help="Layers to convert; None: all.", minimum=0)
    specialise_weight: float = option(0.0, help="Weight of the specialisation loss.", minimum=0.0)
    layer_weight: float = option(0.0, help="Weight of the error of hidden states.", minimum=0.0)
    logit_weight: float = option(0.0, help="Weight of the divergence of logits.", minimum=0.0)
    temperature: float = option(1.0, help="Temperature of the softmaxes that are compared.", minimum=0.01)

    @property
    def distils(self) -> bool:
        """Whether it learns from the teacher."""
        return self.layer_weight > 0 or self.logit_weight > 0


@dataclass(frozen=True, kw_only=True)
class CompressSettings(Settings):
    """Fine-tune an encoder on a task of GLUE, then compress it with SHRP.

    Raises:
        TypeError, ValueError: when made, whatever is wrong with it or with the files in `data`.
    """

    model: str = option(help="Folder or Hub id of an encoder with its tokenizer.")
    data: str | None = option(None, help="Folder with one folder per task (SST-2, ...); None: from the Hub.")
    task: str = option(help="Name of a task, such as sst2.")
    output: str = option(help="Folder for the stages and metrics.json; the compressed model is in its folder final.")
    shrp: dict[str, Any] = option({}, help="Settings of SHRP, but kept.")
    layers: tuple[int, ...] | None = option(None, help="Layers to convert; None: all but dropped ones.", minimum=0)
    seed: int = option(0, help="Seed of data order, head, router and dropout.", minimum=0)
    training: dict[str, Any] = option(
        help="Settings of every stage: max_length, train_rows, and what all recipes have but output, variants, seed "
        "and LoRA."
    )
    stages: dict[str, Any] = option(
        {}, help=f"Name of a stage ({', '.join(STAGES)}) to what differs for it from training."
    )
    balance_weight: float = option(0.01, help="Weight of the load-balance loss in stage balance.", minimum=0.0)
    specialise_weight: float = option(0.01, help="Weight of the entropy of usage in stage specialise.", minimum=0.0)
    layer_weight: float = option(
        1.0, help="Weight of the error of hidden states, after the teacher's stage.", minimum=0.0
    )
    logit_weight: float = option(
        1.0, help="Weight of the divergence of logits, after the teacher's stage.", minimum=0.0
    )
    temperature: float = option(2.0, help="Temperature of the softmaxes that are compared.", minimum=0.01)
    throughput_batches: tuple[int, ...] = option((1, 8, 32), help="Rows of the batches that are timed.", minimum=1)
    throughput_length: int = option(128, help="Tokens per row of the batches that are timed.", minimum=1)
    throughput_repeats: int = option(10, help="Forwards of every form and batch that are timed, in turns.", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "kept" in self.shrp:
            raise ValueError("shrp holds kept; the recipe finds the heads to keep.")
        if variant_info("shrp").configure(self.shrp).to_dict()["heads"] == 0:
            raise ValueError("shrp with heads=0 converts nothing.")
        for name, values in self.stages.items():
            if name not in STAGES or not isinstance(values, dict):
                raise ValueError(f"stages maps {', '.join(STAGES)} to settings, got {name!r}: {values!r}.")
        own = {item.name for item in fields(self)}
        for name in sorted(set(self.training).union(*self.stages.values())):
            if name in NOT_IN_TRAINING or name in own:
                raise ValueError(f"{name} does not belong into training or stages.")
        if self.data is not None:
            read_glue(Path(self.data) / glue_task(self.task).folder, self.task)
        list(self.trainings())  # raises what is wrong with them

    def trainings(self) -> Iterator[StageTraining]:
        """The stages in their order."""
        for name in STAGES:
            values = {**self.training, **self.stages.get(name, {})}
            values |= {"model": self.model, "data": self.data, "task": self.task, "seed": self.seed}
            values |= {"output": str(Path(self.output) / name), "layers": self.layers}
            if name != "teacher":
                values |= {"variants": {"shrp": self.shrp}, "temperature": self.temperature}
                values |= {"layer_weight": self.layer_weight, "logit_weight": self.logit_weight}
            if name == "balance":
                values |= {"balance_weight": self.balance_weight, "balance_definition": "released"}
            if name == "specialise":
                values |= {"specialise_weight": self.specialise_weight}
            yield StageTraining.from_dict(values)


class Distiller(PatchedTrainer):
    """A Trainer whose model also learns from a teacher, and specialises, as the stage says."""

    teacher: Any = None
    stage: StageTraining
    pairs: list[tuple[int, int]]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss; while training with what the stage adds."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        stage, more = self.stage, {"output_hidden_states": True}
        with ExitStack() as stack:
            weight = stage.specialise_weight
            specialise = stack.enter_context(specialise_loss(model, weight)) if weight else None
            loss, outputs = super().compute_loss(
                model, {**inputs, **more}, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if specialise is not None:
            loss = loss + specialise()
        if stage.distils:
            with torch.no_grad():
                wanted = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"}, **more)
            weights = {"layer_weight": stage.layer_weight, "logit_weight": stage.logit_weight}
            loss = loss + distillation_loss(
                outputs,
                wanted,
                inputs["attention_mask"],
                layers=self.pairs,
                **weights,
                temperature=stage.temperature,
            )
        return (loss, outputs) if return_outputs else loss


def convert(model: Any, settings: CompressSettings) -> Any:
    """Put SHRP's training form on a dense model."""
    dropped = settings.shrp.get("layers_dropped", ())
    chosen = settings.layers
    if chosen is None:
        chosen = tuple(index for index in range(model.config.num_hidden_layers) if index not in dropped)
    return patchattn.patch_model(model, "shrp", settings.shrp, layers=chosen)


def hidden_state_pairs(config: Any, settings: CompressSettings) -> list[tuple[int, int]]:
    """Which of the student's hidden states are to be like which of the teacher's: the same layers', and the last."""
    count = config.num_hidden_layers
    left = [index for index in range(count) if index not in settings.shrp.get("layers_dropped", ())]
    return [*((place + 1, index + 1) for place, index in enumerate(left[:-1])), (len(left), count)]


def run_stage(
    stage: StageTraining, task: Task, settings: CompressSettings, make: Callable[[], tuple[Any, dict[str, Any]]]
) -> dict[str, Any]:
    """Train and evaluate one stage; returns what its `metrics.json` holds.

    Args:
        stage: of the run.
        task: of the run.
        settings: of the run.
        make: the model to begin with, and further entries of the metrics; called with the stage's seed set.
    """
    arguments = begin(stage, label_names=["labels"], disable_tqdm=True, train_sampling_strategy="sequential")
    arguments.num_train_epochs = 1  # `training_rows` holds all of them
    model, more = make()
    trainer = Distiller.of(
        model,
        stage,
        arguments,
        mean_loss=True,
        train_dataset=task.training_rows(stage, arguments.world_size),
        eval_dataset=task.evaluation,
        data_collator=task.collate,
        processing_class=task.tokenizer,
        compute_metrics=task.metric,
        preprocess_logits_for_metrics=task.answers,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.stage = stage
    is_converted = bool(stage.variants)
    if is_converted:
        trainer.teacher = dense(settings).to(arguments.device)
        trainer.pairs = hidden_state_pairs(model.config, settings)
    if Path(stage.output).name == "final":
        trainer.remove_callback(RoutingCallback)  # no router is left
    return train(trainer, stage, evaluate_first=is_converted, **more)


def dense(settings: CompressSettings) -> Any:
    """The teacher."""
    folder = Path(settings.output) / "teacher"
    return AutoModelForSequenceClassification.from_pretrained(folder).eval().requires_grad_(False)


def first_models(settings: CompressSettings, task: Task) -> dict[str, Callable[[], tuple[Any, dict[str, Any]]]]:
    """By name of a stage, what makes the model that it begins with, and entries for its metrics."""
    output = Path(settings.output)

    def balance() -> tuple[Any, dict[str, Any]]:
        return convert(dense(settings).requires_grad_(True), settings), {}

    def specialise() -> tuple[Any, dict[str, Any]]:
        model = patchattn.from_pretrained(output / "balance")
        reset_usage(model)
        return model, {}

    def final() -> tuple[Any, dict[str, Any]]:
        model = patchattn.from_pretrained(output / "specialise")
        usage = {name: module.usage.tolist() for name, module in model.named_modules() if hasattr(module, "usage")}
        return compress(model), {"usage": usage}

    return {
        "teacher": lambda: (task.model(settings.model), {}),
        "balance": balance,
        "specialise": specialise,
        "final": final,
    }


def throughput(settings: CompressSettings) -> dict[str, dict[str, float]]:
    """Rows per second of the teacher and of the compressed model, in turns in this process; medians of forwards."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    models = {"dense": dense(settings), "compressed": patchattn.from_pretrained(Path(settings.output) / "final")}
    generator = torch.Generator().manual_seed(settings.seed)
    found: dict[str, dict[str, float]] = {}
    for rows in settings.throughput_batches:
        shape = (rows, settings.throughput_length)
        tokens = torch.randint(models["dense"].config.vocab_size, shape, generator=generator).to(device)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(settings.throughput_repeats + 1):
            for name, model in models.items():
                passed = forward_seconds(model.to(device), tokens)
                if turn:  # the first one warms up
                    seconds[name].append(passed)
        speed = {name: rows / statistics.median(values) for name, values in seconds.items()}
        found[str(rows)] = {**speed, "ratio": speed["compressed"] / speed["dense"]}
    return found


@torch.inference_mode()
def forward_seconds(model: Any, tokens: torch.Tensor) -> float:
    """Seconds of one forward."""
    start = time.perf_counter()
    model(input_ids=tokens)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def check_model(settings: CompressSettings) -> None:
    """Convert a model without weights, so that what cannot be converted is refused before anything is trained."""
    config = AutoConfig.from_pretrained(settings.model)
    if settings.throughput_length > getattr(config, "max_position_embeddings", settings.throughput_length):
        raise ValueError(f"throughput_length must be at most {config.max_position_embeddings}, that of the model.")
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    convert(model, settings)


def run(settings: CompressSettings) -> dict[str, Any]:
    """Do every stage that is not finished yet, and measure; returns what `metrics.json` holds.

    Raises:
        ValueError: a stage was begun with other settings.
    """
    stages = dict(zip(STAGES, settings.trainings(), strict=True))
    done: dict[str, Any] = {name: finished(stage) for name, stage in stages.items()}
    path, given = Path(settings.output) / METRICS_FILE, as_json(settings.to_dict())
    if all(done.values()) and path.is_file():
        before = read_json_object(path)
        if before.get("settings") == given:
            return before
    task = Task(stages["teacher"], AutoTokenizer.from_pretrained(settings.model))
    makers = first_models(settings, task)
    for number, (name, stage) in enumerate(stages.items(), 1):
        if done[name] is None:
            done[name] = run_stage(stage, task, settings, makers[name])
        result = done[name]
        before, after = shown(result["before"]), shown(result["after"])
        say(f"[{number}/{len(stages)}] {name}: {before} -> {after}, {result['seconds']} s")
    metrics = {
        "scores": {
            "teacher": done["teacher"]["after"],
            "converted": done["balance"]["before"],
            **{name: done[name]["after"] for name in ("balance", "specialise")},
            "compressed": done["final"]["before"],
            "final": done["final"]["after"],
        },
        "parameters": {
            name: done[stage]["parameters"] for name, stage in (("dense", "teacher"), ("compressed", "final"))
        },
        "usage": done["final"]["usage"],
        "seconds": {name: values["seconds"] for name, values in done.items()},
        "throughput": {},
        "threads": torch.get_num_threads(),
        "versions": done["final"]["versions"],
        "settings": given,
    }
    if is_first_process():
        metrics["throughput"] = throughput(settings)
        write_json(path, metrics)
    return metrics


def shown(evaluation: dict[str, Any] | None) -> str:
    """The official metrics of an evaluation."""
    if evaluation is None:
        return "new"
    return ", ".join(
        f"{name} {100 * value:.1f} %" for name, value in evaluation.items() if name not in ("loss", "step")
    )


def main(config: Annotated[Path, typer.Argument(help="YAML file with the settings.")]) -> None:
    """Fine-tune an encoder on a task of GLUE, then compress it with SHRP."""
    try:
        settings = CompressSettings.from_yaml(config)
        for stage in settings.trainings():
            finished(stage)
        check_model(settings)
    except (TypeError, ValueError, NotImplementedError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    transformers.logging.set_verbosity_error()  # such as what is new in a head
    transformers.logging.disable_progress_bar()
    metrics = run(settings)
    for name, score in metrics["scores"].items():
        say(f"{name}: {shown(score)}")
    parameters = metrics["parameters"]
    say(f"parameters: {parameters['dense']:,} -> {parameters['compressed']:,}")
    for rows, speed in metrics["throughput"].items():
        say(f"{rows} rows: {speed['dense']:.1f} -> {speed['compressed']:.1f} rows per second, {speed['ratio']:.2f} x")


if __name__ == "__main__":
    typer.run(main)
