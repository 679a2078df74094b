"""From random weights: a Llama of two layers, patched before its first step, on tasks that take minutes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from heads_parts.common import Job
from paired_rows import Row, paired
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.demo.training import fit
from patchattn.evaluation.report.report import markdown_table
from patchattn.training import optimizer_groups

from .common import Claim, Setup, claim
from .toy_tasks import TASKS, Batch, Task

NAME, STAGE = "toys", 0
RATE, NEW_RATE = 3e-3, 1e-2  # of learning: for the model, for what variants add
ASKED = 512  # rows of each test


class Arm(NamedTuple):
    """A model: with rotary embedding or without, and a variant with its settings."""

    rotary: bool = True
    variant: str | None = None
    settings: dict[str, Any] = {}


ROPE = Arm()
_NO_ROPE = Arm(rotary=False)
ARMS: dict[str, dict[str, Arm]] = {
    "counting": {
        "rope": ROPE,
        "no positions": _NO_ROPE,
        "cope": Arm(False, "cope"),
        "rope and cope": Arm(True, "cope"),
    },
    "flip-flop": {
        "rope": ROPE,
        "no positions": _NO_ROPE,
        "cope": Arm(False, "cope"),
        "rope and cope": Arm(True, "cope"),
    },
    "memory": {
        "rope": ROPE,
        "no positions": _NO_ROPE,
        "fox": Arm(False, "fox", {"scaled": False}),
        "rope and fox": Arm(True, "fox"),
    },
    "positions": {"rope": ROPE, "rope and urpe": Arm(True, "urpe", {"span": 32})},
    "blocks": {"rope": ROPE, "rope and mta": Arm(True, "mta")},
}
# What the papers say: of a task, an arm, the test, and the arm that it is better than
CLAIMS = (
    ("counting", "cope", "as trained", "rope", "CoPE counts better than rotary embedding"),
    ("counting", "cope", "longer and sparser", "rope", "CoPE counts better in longer and sparser rows"),
    ("counting", "rope and cope", "longer and sparser", "rope", "So it does beside rotary embedding"),
    ("flip-flop", "cope", "as trained", "rope", "CoPE reads the bit last written better"),
    ("flip-flop", "cope", "sparser", "rope", "CoPE does so where writes are sparser"),
    ("flip-flop", "rope and cope", "sparser", "rope", "So it does beside rotary embedding"),
    (
        "memory",
        "rope and fox",
        "as trained",
        "rope",
        "FoX beside rotary embedding recalls better at the trained length",
    ),
    ("memory", "rope and fox", "4 x longer", "rope", "FoX beside rotary embedding recalls better in longer rows"),
    ("memory", "fox", "4 x longer", "rope", "FoX alone, the paper's form, recalls better in longer rows"),
    ("positions", "rope and urpe", "as trained", "rope", "URPE tells places that rotary embedding alone cannot"),
    ("blocks", "rope and mta", "as trained", "rope", "MTA finds the block that holds both letters better"),
)


def arms(task: str) -> dict[str, Arm]:
    """Of a task, those whose variant is there."""
    known = set(patchattn.list_variants())
    return {name: arm for name, arm in ARMS[task].items() if arm.variant is None or arm.variant in known}


def jobs(setup: Setup) -> list[Job]:
    return [
        (f"{task}/{arm}/{seed}", lambda task=task, arm=arm, seed=seed: trained(TASKS[task], ARMS[task][arm], seed))
        for seed in range(setup.seeds)
        for task in TASKS
        if len(arms(task)) > 1
        for arm in arms(task)
    ]


def new_model(task: Task, arm: Arm, seed: int) -> Any:
    """The model before its first step."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=task.vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    if not arm.rotary:
        model.model.rotary_emb.inv_freq.zero_()  # turned by nothing
    if arm.variant is not None:
        patchattn.patch_model(model, arm.variant, dict(arm.settings))
    return model


def batches(task: Task, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.steps):
        yield task.make(task.rows, task.train, generator)


def trained(task: Task, arm: Arm, seed: int) -> Row:
    """Wrong answers of each test in percent, and the mean loss of the last steps."""
    model = new_model(task, arm, seed)
    found: list[float] = []
    groups = optimizer_groups(model, RATE, scale_learning_rate=NEW_RATE)
    fit(model, batches(task, seed + 1), task.steps, groups, found.append)
    last = found[-50:]
    wrong = {name: round(errors(model, task, name), 3) for name in task.tests}
    return {"wrong": wrong, "loss": round(sum(last) / len(last), 4), "steps": task.steps}


@torch.inference_mode()
def errors(model: Any, task: Task, test: str) -> float:
    """Wrong answers in percent, of the same rows for every model."""
    generator = torch.Generator().manual_seed(2**31)  # no seed of training
    count = 1 if task.rows == 1 else ASKED
    wrong = asked = 0
    for start in range(0, count, 64):
        batch = task.make(min(64, count - start), task.tests[test], generator)
        labels = batch["labels"][:, 1:]
        right = model(batch["input_ids"]).logits[:, :-1].argmax(-1) == labels
        is_asked = labels != -100
        asked += int(is_asked.sum())
        wrong += int((is_asked & ~right).sum())
    return 100 * wrong / asked


def _found(setup: Setup) -> dict[tuple[str, str], dict[int, Row]]:
    """Rows by task and arm, and by seed."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for key, row in setup.rows(NAME).items():
        task, arm, seed = key.split("/")
        found.setdefault((task, arm), {})[int(seed)] = row
    return found


def _pairs(
    found: dict[tuple[str, str], dict[int, Row]], task: str, arm: str, other: str, test: str
) -> tuple[list[float], list[float]]:
    own, theirs = (found.get((task, name), {}) for name in (arm, other))
    seeds = sorted(set(own) & set(theirs))
    return [own[seed]["wrong"][test] for seed in seeds], [theirs[seed]["wrong"][test] for seed in seeds]


def claims(setup: Setup) -> list[Claim]:
    found = _found(setup)
    return [
        claim(said, *_pairs(found, task, arm, other, test), "points of wrong answers", wants=-1, of="seeds")
        for task, arm, test, other, said in CLAIMS
    ]


def section(setup: Setup, pictures: Path | None) -> list[str]:
    found = _found(setup)
    lines = ["## From random weights", ""]
    if not found:
        return [*lines, "Not measured yet."]
    lines += [
        "A Llama of two layers, 64 wide, with four heads, patched before its first step; learning rate "
        f"{RATE:g}, of what a variant adds {NEW_RATE:g}. Start and rows of a seed are the same for all. Wrong answers "
        "in percent, the mean of the seeds, and of the differences to rotary embedding in pairs of seeds the mean and "
        "its standard error. Without positions is without rotary embedding, with the causal mask alone.",
        "",
    ]
    for task, each in TASKS.items():
        if any((task, arm) in found for arm in ARMS[task]):
            lines += [f"### {task.capitalize()}", "", f"{each.says}. {each.steps} steps of {each.rows} rows.", ""]
            lines += [*_table(found, task), ""]
    if pictures is not None:
        draw(found, pictures / "trained_toys.png")
        lines += ["![Wrong answers of small models, by task](trained_toys.png)"]
    return lines


def _table(found: dict[tuple[str, str], dict[int, Row]], task: str) -> list[str]:
    tests, table = list(TASKS[task].tests), []
    for arm in ARMS[task]:
        rows = list(found.get((task, arm), {}).values())
        if not rows:
            continue
        cells = [arm, str(len(rows))]
        for test in tests:
            cells.append(f"{sum(row['wrong'][test] for row in rows) / len(rows):.1f}")
            own, theirs = _pairs(found, task, arm, "rope", test)
            cells.append("" if arm == "rope" or len(own) < 2 else "{:+.1f} ± {:.1f}".format(*paired(own, theirs)))
        table.append(cells)
    head = ["", "seeds", *(text for test in tests for text in (f"{test}, %", "difference"))]
    return markdown_table(head, table, texts=1)


def draw(found: dict[tuple[str, str], dict[int, Row]], path: Path) -> None:
    from matplotlib.figure import Figure

    from patchattn.plotting.style import SERIES

    tasks = [task for task in TASKS if any((task, arm) in found for arm in ARMS[task])]
    figure = Figure(figsize=(3.2 * len(tasks), 3.2), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        present = [arm for arm in ARMS[task] if (task, arm) in found]
        tests = list(TASKS[task].tests)
        for test, (colour, marker) in zip(tests, SERIES, strict=False):
            for place, arm in enumerate(present):
                values = [row["wrong"][test] for row in found[task, arm].values()]
                label = test if not place else None
                axis.plot([place] * len(values), values, marker, color=colour, label=label, fillstyle="none")
        axis.set_xticks(range(len(present)), [arm.replace(" and ", "\nand ") for arm in present])
        axis.set(title=task, xlim=(-0.5, len(present) - 0.5), ylim=(-3, None))
        axis.legend(fontsize="small")
    figure.axes[0].set_ylabel("wrong answers, %, each seed")
    figure.savefig(path, dpi=110)
