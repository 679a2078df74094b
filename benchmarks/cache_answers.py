"""What answers lose where a kv cache forgets: the same prompts for the dense model and every method, in pairs.

    python benchmarks/cache_answers.py run DIR --folder runs/caches --text text/test.txt --longbench longbench
    python benchmarks/cache_answers.py page DIR --folder runs/caches --output docs/results/caches.md

`run` takes one prompt after the other through all methods, so that it may be stopped at any time, and goes on where it
was. The dense model reads each prompt once; variants that can compress a cache of its are given a copy.
"""

import copy
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from transformers import AutoTokenizer, DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.evaluation.metrics.longbench import longbench_score
from patchattn.evaluation.report.report import markdown_table
from patchattn.evaluation.tasks.generation import fit_prompt
from patchattn.evaluation.tasks.haystack import read_texts
from patchattn.evaluation.tasks.longbench_data import load_longbench, longbench_task
from patchattn.evaluation.tasks.retrieval import recall
from patchattn.evaluation.tasks.ruler import NiahMultikey, NiahSingle, RulerTask, VariableTracking

sys.path.insert(0, str(Path(__file__).parent))

from caches import SCORED, conditions, loaded, random_gates, settings_of
from paired_rows import append_row, paired, read_rows

app = typer.Typer(add_completion=False)

When = Literal["with the question", "before the question"]
WHEN: tuple[When, ...] = ("with the question", "before the question")
METHODS = ("streaming_llm", *SCORED, "duo (random gates)")
READ_AS_A_WHOLE = (
    "streaming_llm",
    "h2o",
    "expected_attention",
    "duo",
)  # by the patched model: not of a prompt's last tokens alone
SHARES = (0.5, 0.25, 0.1)
TAIL = 64  # last tokens of a text, given to the patched model behind a copied cache
CONTINUED = 256  # tokens whose loss is measured behind a prompt
NEEDLES: dict[str, type[RulerTask]] = {"single": NiahSingle, "multi-key": NiahMultikey, "tracking": VariableTracking}
LONGBENCH = ("lcc", "samsum")
ROWS = "answers.jsonl"


@dataclass(frozen=True)
class Case:
    """One prompt.

    Attributes:
        task: the prompt is of.
        index: of the prompt in it.
        text: tokens that are compressed, the question's left out.
        question: tokens behind them.
        most: new tokens of an answer; 0 where the loss of `question` is measured.
        score: an answer gets, in percent.
        whens: a cache is compressed.
    """

    task: str
    index: int
    text: list[int]
    question: list[int]
    most: int
    score: Any
    whens: Sequence[When] = WHEN


# --- prompts ----------------------------------------------------------------------------------------------------------


def needle(tokenizer: Any, name: str, index: int, length: int, text: str | None) -> Case:
    most = 48 if name == "tracking" else 16
    task = NEEDLES[name](samples=index + 1, lengths=[length], data=text, max_new_tokens=most)
    sample, tokens = task.sample(index), task.prompt(tokenizer, index).tokens
    marker = tokenizer(f"\n\n{sample.frame.question}", add_special_tokens=False)["input_ids"]
    behind = next(n for n in range(len(tokens), 0, -1) if tokenizer.decode(tokens[n:]).count(sample.frame.question))
    if len(tokens) - behind < len(marker) - 1:
        raise ValueError(f"{name}: the question was not found at the end of the prompt.")
    expected = list(sample.expected)
    return Case(
        name,
        index,
        tokens[:behind],
        tokens[behind:],
        most,
        lambda answer: 100.0 * recall({"pred": answer, "expected": expected}),
    )


def longbench(tokenizer: Any, name: str, index: int, length: int, folder: str) -> Case:
    sample, task = load_longbench([name], folder)[name][index], longbench_task(name)
    tokens = fit_prompt(tokenizer, sample.prompt, max_length=length, chat=False).tokens
    return Case(
        name,
        index,
        tokens[: -TAIL // 2],
        tokens[-TAIL // 2 :],
        min(task.max_new_tokens, 48),
        lambda answer: 100.0 * longbench_score(name, answer, sample.answers, sample.classes),
        WHEN[:1],
    )


def continuation(tokenizer: Any, index: int, length: int, text: str) -> Case:
    tokens = tokenizer(text)["input_ids"]
    start = index * (length + CONTINUED)
    found = tokens[start : start + length + CONTINUED]
    return Case("loss", index, found[:length], found[length:], 0, None, WHEN[1:])


def cases(tokenizer: Any, samples: int, length: int, text: str | None, folder: str | None) -> Iterator[Case]:
    """Those of every task in turn; every fourth prompt is of LongBench, which takes longest."""
    plain = None if text is None else read_texts(text)
    for index in range(samples):
        for name in NEEDLES:
            yield needle(tokenizer, name, index, length, text)
        if plain is not None:
            yield continuation(tokenizer, index, length, plain)
        if folder is not None and index % 2 == 0:
            for name in LONGBENCH:
                yield longbench(tokenizer, name, index // 2, 2 * length, folder)


# --- one answer -------------------------------------------------------------------------------------------------------


def read(model: Any, cache: DynamicCache, tokens: Sequence[int]) -> torch.Tensor:
    """Logits `(T, V)`."""
    ids = torch.tensor([list(tokens)], device=model.device)
    return model(ids, **cache_argument(model, cache)).logits[0]


def answer(model: Any, tokenizer: Any, cache: DynamicCache, logits: torch.Tensor, most: int, line: bool) -> str:
    """Greedy, up to the end of the text, or of a line."""
    found: list[int] = []
    for _ in range(most):
        token = int(logits[-1].argmax())
        text = tokenizer.decode([*found, token])
        if token == tokenizer.eos_token_id or (line and "\n" in text.strip(" ") and text.strip()):
            break
        found.append(token)
        logits = read(model, cache, [token])
    return tokenizer.decode(found, skip_special_tokens=True)


def loss(logits: torch.Tensor, tokens: Sequence[int]) -> float:
    """Mean over tokens, in nats; `logits` of those before each."""
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(tokens, device=logits.device)).item()


def outcome(model: Any, tokenizer: Any, case: Case, when: When, start: DynamicCache, rest: Sequence[int]) -> float:
    """Score of an answer, or a loss; `start` is what has been read of the text but for `rest`, and is used up."""
    if when == "with the question":
        logits = read(model, start, [*rest, *case.question])
    else:
        last = read(model, start, rest)[-1:]
        logits = torch.cat([last, read(model, start, case.question)])
        if not case.most:
            return loss(logits[:-1], case.question)
    return case.score(answer(model, tokenizer, start, logits, case.most, case.task in LONGBENCH))


def patched_outcome(
    model: Any, tokenizer: Any, case: Case, when: When, method: str, share: float, prefix: DynamicCache, gates: Any
) -> float:
    length = len(case.text) + (len(case.question) if when == "with the question" else 0)
    variant, settings = settings_of(method, share, length, gates)
    if variant in SCORED and variant != "h2o":  # which never waits for the end of a prompt
        settings["event"] = "prompt" if when == "with the question" else "chunk"
    patchattn.patch_model(model, variant, settings)
    try:
        if variant in READ_AS_A_WHOLE:
            return outcome(model, tokenizer, case, when, DynamicCache(config=model.config), case.text)
        return outcome(model, tokenizer, case, when, copy.deepcopy(prefix), case.text[-TAIL:])
    finally:
        patchattn.unpatch_model(model)


# --- rows -------------------------------------------------------------------------------------------------------------


def values_of(folder: Path) -> dict[str, float]:
    """Values by key `task/index/when/method/share`."""
    return {key: row["value"] for key, row in read_rows(folder / ROWS).items()}


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="Folder of a causal language model, such as SmolLM2.")],
    folder: Annotated[Path, typer.Option(help="Folder for answers; a run goes on from those that are there.")],
    text: Annotated[str | None, typer.Option(help="Text for needles and losses; generated by default.")] = None,
    longbench: Annotated[str | None, typer.Option(help="Folder with LongBench's files.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1024,
    samples: Annotated[int, typer.Option(help="Prompts of each task.")] = 8,
    method: Annotated[list[str] | None, typer.Option(help="Methods; all by default.")] = None,
    share: Annotated[list[float] | None, typer.Option(help="Shares of the keys that are kept.")] = None,
    minutes: Annotated[float, typer.Option(help="Begin no further prompt after so long.")] = 1e9,
    dtype: Annotated[str, typer.Option(help="Type of weights and cache.")] = "float32",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Answer prompts."""
    base, tokenizer = loaded(model, dtype, threads), AutoTokenizer.from_pretrained(model)
    gates, end, known = random_gates(base), time.time() + 60 * minutes, values_of(folder)
    with torch.inference_mode():
        for case in cases(tokenizer, samples, length, text, longbench):
            asked = [("dense", 1.0), *((name, kept) for name in method or METHODS for kept in share or SHARES)]
            keys = {
                f"{case.task}/{case.index}/{when}/{name}/{kept:g}": (when, name, kept)
                for when in case.whens
                for name, kept in asked
            }
            open_keys = {key: what for key, what in keys.items() if key not in known}
            if not open_keys:
                continue
            if time.time() > end:
                print(f"Time is up before {case.task}, prompt {case.index}: the next start goes on there.")
                break
            prefix = DynamicCache(config=base.config)
            read(base, prefix, case.text[:-TAIL])
            for key, (when, name, kept) in open_keys.items():
                if name == "dense":
                    value = outcome(base, tokenizer, case, when, copy.deepcopy(prefix), case.text[-TAIL:])
                else:
                    value = patched_outcome(base, tokenizer, case, when, name, kept, prefix, gates)
                append_row(folder / ROWS, key, {"value": value})
                print(key, f"{value:.3f}", flush=True)


# --- page -------------------------------------------------------------------------------------------------------------


def compared(found: Mapping[Any, float], dense: Mapping[Any, float]) -> tuple[int, float, float, float]:
    """Prompts that both answered, mean, mean difference to dense and its standard error."""
    shared = sorted(set(found) & set(dense))
    if not shared:
        return 0, math.nan, math.nan, math.nan
    values = [found[key] for key in shared]
    return len(shared), statistics.mean(values), *paired(values, [dense[key] for key in shared])


def select(rows: Mapping[str, float], tasks: Sequence[str], when: When, method: str, share: float) -> dict[Any, float]:
    """Values of these tasks by task and prompt."""
    found = {}
    for key, value in rows.items():
        task, index, moment, name, kept = key.split("/")
        if task in tasks and (moment, name, kept) == (when, method, f"{share:g}"):
            found[task, int(index)] = value
    return found


def table(rows: Mapping[str, float], tasks: Sequence[str], when: When, digits: int) -> list[str]:
    """Of every method and share: each task's mean, that of all, and the difference to dense."""
    head = ["method", "kept", *tasks, *(["all"] if len(tasks) > 1 else []), "minus dense", "error", "prompts"]
    methods = dict.fromkeys((key.split("/")[3], float(key.split("/")[4])) for key in rows)
    dense, lines = select(rows, tasks, when, "dense", 1.0), []
    for name, kept in sorted(methods, key=lambda each: (each[0] != "dense", -each[1], each[0])):
        found = select(rows, tasks, when, name, kept)
        count, mean, difference, error = compared(found, dense)
        if not count:
            continue
        each = [compared(select(rows, [task], when, name, kept), dense)[1] for task in tasks]
        means = [*each, *([mean] if len(tasks) > 1 else [])]
        apart = (
            ["", ""] if name == "dense" else [f"{difference:+.{digits}f}", f"{error:.{digits}f}" if count > 1 else ""]
        )
        numbers = ("" if math.isnan(value) else f"{value:.{digits}f}" for value in means)  # no prompt yet
        lines.append([name, f"{kept:g}", *numbers, *apart, str(count)])
    return markdown_table(head, lines, texts=1)


@app.command()
def page(
    model: Annotated[Path, typer.Argument(help="Folder of the model that answered.")],
    folder: Annotated[Path, typer.Option(help="Folder with answers.")],
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of weights and cache.")] = "float32",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Write what there is into a page."""
    rows = values_of(folder)
    text = ["# What answers lose where a cache forgets", "", conditions(loaded(model, dtype, threads), dtype, threads)]
    needles = list(NEEDLES)
    for title, tasks, when, digits in (
        ("Compressed with the question in sight", needles, WHEN[0], 1),
        ("Compressed before the question is known", needles, WHEN[1], 1),
        ("LongBench", list(LONGBENCH), WHEN[0], 1),
        ("Loss behind a prompt, nats", ["loss"], WHEN[1], 3),
    ):
        text += ["", f"## {title}", "", *table(rows, tasks, when, digits)]
    print("\n".join(text))
    if output is not None:
        output.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
