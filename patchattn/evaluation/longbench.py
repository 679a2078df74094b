"""LongBench (arXiv 2308.14508): scores and speed of a causal language model, plain and patched, on long prompts."""

import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from transformers import StoppingCriteria

from ..patching import is_patched, patch_info, unpatched
from ..selection import evaluating
from ..settings import Settings, option
from .longbench_data import LongBenchSample, LongBenchTask, longbench_task
from .metrics.longbench import LONGBENCH_METRICS, longbench_score
from .results import claim, model_identity, read_done


@dataclass(frozen=True, kw_only=True)
class LongBenchSettings(Settings):
    """How the questions are asked; answers are greedy.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    batch: int = option(1, help="Prompts per call of generate, padded on the left.", minimum=1)
    max_length: int | None = option(
        None,
        help="Longest prompt, without chat template, as LongBench sets it per model, also beyond its positions; None: "
        "what these leave beside template and answer.",
        unit="tokens",
        minimum=2,
    )
    chat_template: Literal["official", "always", "never"] = option(
        "official",
        help="Use the tokenizer's chat template; official: if it has one, but not for few-shot tasks and code.",
    )
    limit: int | None = option(None, help="Only so many samples of each task, the first ones.", minimum=1)
    seed: int = option(0, help="For what draws random numbers in the model, such as a variant.", minimum=0)


@dataclass(frozen=True)
class FittedPrompt:
    """What a model is given.

    Attributes:
        tokens: with special tokens and chat template.
        truncated: whether tokens were left out in the middle.
    """

    tokens: list[int]
    truncated: bool


def fit_prompt(
    tokenizer: Any, prompt: str, *, max_length: int | None = None, room: int | None = None, chat: bool = False
) -> FittedPrompt:
    """Cut a prompt as LongBench does, in the middle, and put it into the chat template.

    Of a prompt of more than `max_length` tokens the first and the last half of so many are decoded, without special
    tokens, and joined. If the result in its template takes more than `room`, less is kept until it does not.

    Args:
        tokenizer: of the model.
        prompt: the whole one.
        max_length: tokens of the prompt to keep, one less if odd; all without.
        room: most tokens that the model can be given; no limit without.
        chat: whether to use the chat template.

    Raises:
        ValueError: there is room for less than two tokens of the prompt.
    """
    tokens = tokenizer(prompt)["input_ids"]
    kept = min(length for length in (len(tokens), max_length, room) if length is not None)
    while kept >= min(2, len(tokens)):
        text, half = prompt, kept // 2
        if kept < len(tokens):
            ends = (tokens[:half], tokens[-half:])
            text = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in ends)
        if chat:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # templates write the special tokens themselves
        found = tokenizer(text, add_special_tokens=not chat)["input_ids"]
        if room is None or len(found) <= room:
            return FittedPrompt(found, kept < len(tokens))
        # characters cut in two can make many tokens: half of what was kept is enough of a step
        kept = max(kept - (len(found) - room), kept // 2)
    raise ValueError(f"There is no room for a prompt: the model can be given {room} tokens.")


def evaluate_longbench(
    model: Any,
    tokenizer: Any,
    samples: Mapping[str, Sequence[LongBenchSample]],
    output: str | os.PathLike[str],
    **settings: Any,
) -> dict[str, Any]:
    """Answers, scores and speed of a model on tasks of LongBench; a run that was killed continues.

    Answers are appended to `<task>.jsonl` in the output folder as they come, in lines that the official evaluation
    reads, with the batch's times beside them. What a file was made with lies beside it in `<task>.jsonl.settings.json`.

    Args:
        model: a causal language model, patched or not; it is put into evaluation mode for the time.
        tokenizer: of the model.
        samples: of `load_longbench`.
        output: folder.
        settings: fields of `LongBenchSettings`, such as batch and max_length.

    Returns:
        `average` of the scores, and under `tasks` per task: `metric`, `score` (0 to 100), `samples`, `truncated` (how
        many), `prompt_tokens` (mean), `first_token_seconds` (median over batches), `tokens_per_second` (all tokens but
        the first ones, over the time after those; None if there are none), and `peak_memory` (bytes allocated on GPUs,
        None without).

    Raises:
        ValueError: no samples, an unknown task, a file of another run (the message names what differs), no padding
            token, no chat template where one is asked for, a model with an encoder, or no limit to the prompt.
        TypeError: a setting of the wrong type.
        ImportError: Chinese tasks without `jieba`.
    """
    given = LongBenchSettings.from_dict(settings)
    tasks = {longbench_task(name): list(found)[: given.limit] for name, found in samples.items()}
    _check(model, tokenizer, tasks, given)
    files = {task: Path(output) / f"{task.name}.jsonl" for task in tasks}
    for task, asked in tasks.items():  # before the first task is run
        claim(files[task], _identity(model, tokenizer, asked, given))
    report = {}
    with evaluating(model):
        for task, asked in tasks.items():
            rows = _answer(model, tokenizer, task, asked, files[task], given)
            report[task.name] = _summary(task, rows, given.batch)
    return {"average": statistics.mean(row["score"] for row in report.values()), "tasks": report}


def compare_longbench(
    model: Any,
    tokenizer: Any,
    samples: Mapping[str, Sequence[LongBenchSample]],
    output: str | os.PathLike[str],
    **settings: Any,
) -> dict[str, Any]:
    """`evaluate_longbench` of a patched model, without its patches and with them.

    Args:
        model: patched; it stays so.
        tokenizer: of the model.
        samples: of `load_longbench`.
        output: folder; answers go into its folders `unpatched` and `patched`, the report into `report.json` and, as the
            table of `longbench_table`, `report.md`.
        settings: of `evaluate_longbench`.

    Returns:
        `patches` (see `patchattn.patch_info`), the reports `unpatched` and `patched`, and `difference`: points of
        `average` and, under `tasks`, of each task that the patched model scores more.

    Raises:
        ValueError: the model is not patched, or what `evaluate_longbench` raises it for.
        TypeError, ImportError: see `evaluate_longbench`.
    """
    if not is_patched(model):
        raise ValueError("compare_longbench expects a patched model; patch it, or use evaluate_longbench for this one.")
    folder = Path(output)
    with unpatched(model):
        before = evaluate_longbench(model, tokenizer, samples, folder / "unpatched", **settings)
    after = evaluate_longbench(model, tokenizer, samples, folder / "patched", **settings)
    difference = {
        "average": after["average"] - before["average"],
        "tasks": {name: row["score"] - before["tasks"][name]["score"] for name, row in after["tasks"].items()},
    }
    patches = patch_info(model)["patches"]
    report = {"patches": patches, "unpatched": before, "patched": after, "difference": difference}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(longbench_table(report), encoding="utf-8")
    return report


def longbench_table(report: Mapping[str, Any]) -> str:
    """The report of `compare_longbench` as a table in Markdown; speed and memory are unpatched / patched."""
    heads = "Task | Metric | Samples | Unpatched | Patched | Difference | First token, s | Tokens/s | Peak memory, GiB"
    lines = [f"| {heads} |", "|---|---" + "|---:" * 7 + "|"]
    before, after, difference = report["unpatched"], report["patched"], report["difference"]
    for name, row in before["tasks"].items():
        runs = (row, after["tasks"][name])
        cells = [name, row["metric"], str(row["samples"]), *(f"{run['score']:.2f}" for run in runs)]
        cells.append(f"{difference['tasks'][name]:+.2f}")
        for key, unit, digits in _SPEED:
            cells.append(" / ".join("-" if run[key] is None else f"{run[key] / unit:.{digits}f}" for run in runs))
        lines.append(f"| {' | '.join(cells)} |")
    averages = f"{before['average']:.2f} | {after['average']:.2f} | {difference['average']:+.2f}"
    lines.append(f"| average | | | {averages} | | | |")
    return "\n".join(lines) + "\n"


_SPEED = (("first_token_seconds", 1, 3), ("tokens_per_second", 1, 1), ("peak_memory", 2**30, 2))  # unit, digits


class _FirstToken(StoppingCriteria):
    """Stops nothing: notes when the first token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if not self.times:  # later ones would make the GPU wait
            self.times.append(_now(input_ids.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[LongBenchTask, Sequence[LongBenchSample]],
    settings: LongBenchSettings,
) -> None:
    """What would otherwise go wrong in the middle of a run."""
    if not tasks or not all(tasks.values()):
        raise ValueError("samples must hold at least one task, and at least one sample of each.")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has an encoder; expected a model with a decoder alone.")
    if tokenizer.pad_token is None:
        raise ValueError("The tokenizer has no padding token: set tokenizer.pad_token, to its eos_token say.")
    if settings.chat_template == "always" and not tokenizer.chat_template:
        raise ValueError("chat_template is 'always', and the tokenizer has no chat template.")
    longest = max(tasks, key=lambda task: task.max_new_tokens)
    if settings.max_length is None and (_room(model, longest) or 0) < 2:
        raise ValueError(
            f"{type(model).__name__} has {_positions(model)} positions, of which {longest.name} needs "
            f"{longest.max_new_tokens} for the answer: give max_length, or leave out tasks with long answers."
        )
    for task, samples in tasks.items():
        for sample in samples:  # answers and classes that the metric cannot take, and packages that it lacks
            longbench_score(task.name, "", sample.answers, sample.classes)


def _positions(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _room(model: Any, task: LongBenchTask) -> int | None:
    """What the answer leaves of the model's positions."""
    positions = _positions(model)
    return None if positions is None else positions - task.max_new_tokens


def _identity(
    model: Any, tokenizer: Any, samples: Sequence[LongBenchSample], settings: LongBenchSettings
) -> dict[str, Any]:
    """What must not change between the starts of one run; the device, for the sake of the times."""
    asked = [[sample.id, sample.prompt, sample.answers, sample.classes] for sample in samples]
    template = [tokenizer.chat_template, tokenizer.special_tokens_map, len(tokenizer)]
    return {
        **model_identity(model),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "tokenizer_sha256": hashlib.sha256(json.dumps(template).encode()).hexdigest(),
        "samples_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        **settings.to_dict(),
        "samples": len(samples),
    }


def _answer(
    model: Any,
    tokenizer: Any,
    task: LongBenchTask,
    samples: Sequence[LongBenchSample],
    path: Path,
    settings: LongBenchSettings,
) -> list[dict[str, Any]]:
    """The rows of a task's file; those that are missing are made."""
    fields = [
        {"id": sample.id, "answers": list(sample.answers), "all_classes": list(sample.classes) or None}
        for sample in samples
    ]
    done = read_done(path, fields, "pred")
    ends = {start: min(start + settings.batch, len(samples)) for start in range(0, len(samples), settings.batch)}
    starts = [start for start, end in ends.items() if end > len(done)]
    with path.open("a", encoding="utf-8") as file:
        for start in track(starts, description=task.name, disable=not sys.stderr.isatty() or not starts):
            batch = samples[start : ends[start]]
            rows = _generate(model, tokenizer, task, batch, settings, settings.seed * 1_000_003 + start)
            for field, row in list(zip(fields[start:], rows, strict=False))[max(len(done) - start, 0) :]:
                done.append({**field, **row})
                file.write(json.dumps(done[-1], ensure_ascii=False) + "\n")
            file.flush()
    return done


def _generate(
    model: Any,
    tokenizer: Any,
    task: LongBenchTask,
    batch: Sequence[LongBenchSample],
    settings: LongBenchSettings,
    seed: int,
) -> list[dict[str, Any]]:
    """Answers to a batch and its times; the caller's random numbers go on as if nothing had been drawn."""
    chats = {"official": task.chat and bool(tokenizer.chat_template), "always": True, "never": False}
    chat = chats[settings.chat_template]
    room = _room(model, task) if settings.max_length is None else None
    prompts = [
        fit_prompt(tokenizer, sample.prompt, max_length=settings.max_length, room=room, chat=chat) for sample in batch
    ]
    width = max(len(prompt.tokens) for prompt in prompts)
    ids = torch.full((len(batch), width), tokenizer.pad_token_id, device=model.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
        mask[row, width - len(prompt.tokens) :] = 1
    ends = _end_tokens(model, tokenizer, task)
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    first = _FirstToken()
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        began = _now(model.device)
        tokens = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=task.max_new_tokens,
            min_new_tokens=1 if task.stops_at_newline else None,
            do_sample=False,
            num_beams=1,
            eos_token_id=ends or None,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=[first],
        )
        ended = _now(model.device)
    times = {
        "first_token_seconds": first.times[0] - began,
        "seconds": ended - began,
        "peak_memory": sum(map(torch.cuda.max_memory_allocated, devices)) if devices else None,
    }
    rows = []
    for prompt, answer in zip(prompts, tokens[:, width:].tolist(), strict=True):
        rows.append(
            {
                "pred": tokenizer.decode(answer, skip_special_tokens=True),
                "prompt_tokens": len(prompt.tokens),
                "truncated": prompt.truncated,
                "new_tokens": next((place for place, token in enumerate(answer, 1) if token in ends), len(answer)),
                **times,
            }
        )
    return rows


def _end_tokens(model: Any, tokenizer: Any, task: LongBenchTask) -> list[int]:
    """The model's and the tokenizer's, and a line break where it ends the answer."""
    known = model.generation_config.eos_token_id
    ends = known if isinstance(known, list) else [known]
    line = tokenizer.encode("\n", add_special_tokens=False)[-1:] if task.stops_at_newline else []
    return sorted({token for token in (*ends, tokenizer.eos_token_id, *line) if token is not None})


def _summary(task: LongBenchTask, rows: Sequence[Mapping[str, Any]], batch: int) -> dict[str, Any]:
    scores = [longbench_score(task.name, row["pred"], row["answers"], row["all_classes"]) for row in rows]
    batches = rows[::batch]  # each row has the times of its whole batch
    after_first = sum(row["seconds"] - row["first_token_seconds"] for row in batches)
    memory = [row["peak_memory"] for row in batches if row["peak_memory"] is not None]
    later = sum(row["new_tokens"] - 1 for row in rows)
    return {
        "metric": LONGBENCH_METRICS[task.name],
        "score": 100 * statistics.mean(scores),
        "samples": len(rows),
        "truncated": sum(row["truncated"] for row in rows),
        "prompt_tokens": statistics.mean(row["prompt_tokens"] for row in rows),
        "first_token_seconds": statistics.median(row["first_token_seconds"] for row in batches),
        "tokens_per_second": later / after_first if later else None,
        "peak_memory": max(memory) if memory else None,
    }
