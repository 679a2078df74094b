"""What a board measures: `board.yaml`, or `full.yaml`, says the work, and a file in `rows/` each row."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core.registry import variant_info
from ...core.settings import Settings, nearest, option
from ...files.documents import quoted
from ...saving.trained import folder_digest
from ..tasks.registry import make_tasks, task_names
from ..tasks.speed import SpeedTask
from ..tasks.task import EvalTask

DENSE = "dense"
OF_THE_RUN = ("limit", "batch")  # settings of a task that are the runner's


@dataclass(frozen=True, kw_only=True)
class BoardPlan(Settings):
    """The work that is the same for all rows.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    model: str = option(help="Folder or Hub id of a causal language model, unless the command names another.")
    tasks: dict[str, Any] = option(
        help="Name of a task to its settings; limit among them takes the first so many samples, batch answers so many "
        "at once, and data is a place in the folder with data that the command names."
    )
    speed: dict[str, Any] = option({}, help="Settings of the task speed, by which rows are timed in turn with dense.")
    dtype: Literal["checkpoint", "float32", "bfloat16", "float16"] = option("checkpoint", help="Type of the weights.")
    seed: int = option(0, help="Seed of what a new patch starts from, and of what draws in the model.", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "speed" in self.tasks:
            raise ValueError("speed is no task of a board: it is measured for every row; see the setting speed.")
        for name, given in self.tasks.items():
            for key in OF_THE_RUN:
                number = self.settings_of(name).get(key)
                if number is not None and (type(number) is not int or number < 1):
                    raise ValueError(
                        f"{key} of {name} must be a whole number of samples, at least 1, got {quoted(given)}."
                    )
        if groups := [name for name in self.tasks if task_names([name]) != [name]]:
            raise ValueError(f"{groups[0]} is a benchmark of several tasks: name them one by one.")

    def settings_of(self, task: str) -> dict[str, Any]:
        """The settings of one task, `limit` and `batch` among them."""
        given = self.tasks[task]
        if given is None:
            return {}
        if not isinstance(given, dict):
            raise TypeError(f"The settings of {task} must map names to values, got {quoted(given)}.")
        return given

    def limit(self, task: str) -> int | None:
        """How many samples of a task are taken; None: all."""
        limit: int | None = self.settings_of(task).get("limit")
        return limit

    def batch(self, task: str) -> int:
        """How many samples of a task are answered at once."""
        batch: int = self.settings_of(task).get("batch") or 1
        return batch

    @property
    def work(self) -> dict[str, Any]:
        """What scores depend on: all but how rows are timed."""
        return {key: value for key, value in self.to_dict().items() if key != "speed"}

    def made_tasks(self, data: Path | None) -> list[EvalTask]:
        """The tasks, their data read and checked.

        Args:
            data: folder that the tasks' `data` lies in; the Hub, or generated, without.
        """
        settings = {}
        for name in self.tasks:
            given = {key: value for key, value in self.settings_of(name).items() if key not in OF_THE_RUN}
            place = given.pop("data", None)
            if data is not None and place is not None:
                given["data"] = str(data / str(place))
            settings[name] = given
        return make_tasks(list(self.tasks), "causal_lm", settings=settings)

    def speed_task(self) -> SpeedTask:
        """One warm run of each combination; how often that is repeated is in `repeats`."""
        return SpeedTask(**{**self.speed, "warmup": 0, "repeats": 1})

    @property
    def repeats(self) -> int:
        """Runs of each combination that count."""
        return SpeedTask(**self.speed).settings.repeats


@dataclass(frozen=True, kw_only=True)
class BoardRow(Settings):
    """One row: variants with their settings, or what was trained and saved.

    Raises:
        TypeError, ValueError: a value of the wrong type, or an unknown variant or setting.
    """

    about: str = option(help="What the row is, in a few words.")
    family: str = option(help="What it is to be compared with: caches, selection, heads, temperature, trained, ...")
    variants: dict[str, Any] = option({}, help="Names of variants to their settings, outermost first.")
    patch: str | None = option(
        None,
        help="Instead, folder of a saved patch, of a LoRA adapter, or of an adapter with the patch beside it that it "
        "was trained on, as a recipe leaves it.",
    )
    beside: str | None = option(
        None, help="Another row that it is compared with, besides dense, such as the model tuned alike without a patch."
    )
    behind_prompt: bool = option(
        False,
        help="Whether nothing changes before the first new token, but for what a prompt's last tokens tell: what the "
        "unpatched model read of a prompt is then taken, and tasks that generate nothing are not asked.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.variants) == (self.patch is not None):
            raise ValueError("A row needs variants or a patch, one of them.")
        for name, settings in self.variants.items():
            variant_info(name).configure(settings or {})

    def identity(self) -> dict[str, Any]:
        """What must not change once it was measured, the files of a folder here among it.

        Raises:
            OSError: they cannot be read.
        """
        values = self.to_dict()
        if self.beside is None:
            del values["beside"]  # as of rows that were measured before there was this setting
        return values if self.patch is None else {**values, "sha256": folder_digest(self.patch)}

    @property
    def run(self) -> dict[str, Any] | str:
        """As `patchattn.evaluation.run.compare.compare` takes a run."""
        return self.patch or {name: settings or {} for name, settings in self.variants.items()}


def read_board(folder: Path, names: Sequence[str] = (), *, full: bool = False) -> tuple[BoardPlan, dict[str, BoardRow]]:
    """The plan of a folder, and its rows by name, in the order of their names; rows that others are beside come first.

    Args:
        folder: with `board.yaml`, maybe `full.yaml`, and `rows/<name>.yaml`.
        names: the rows to take, with those that they are beside; all without.
        full: the plan is that of `full.yaml`, more work on the same rows.

    Raises:
        TypeError, ValueError: a missing or wrong file, the message names it; or a row that is not there, or cannot be
            one to be compared with.
    """
    plan = BoardPlan.from_yaml(folder / ("full.yaml" if full else "board.yaml"))
    files = {path.stem: path for path in sorted((folder / "rows").glob("*.yaml"))}
    if not files:
        raise ValueError(f"{folder} has no rows: expected files rows/<name>.yaml.")
    for name in names:
        if name not in files and name != DENSE:
            raise ValueError(f"{folder} has no row {name!r}{nearest(name, [*files, DENSE])}")
    if odd := [name for name in files if name == DENSE or not re.fullmatch(r"[\w.+=-]+", name)]:
        raise ValueError(f"{files[odd[0]]}: a row has a name of letters, digits and _ . + = -, and is not {DENSE!r}.")
    rows = {name: BoardRow.from_yaml(path) for name, path in files.items() if not names or name in names}
    partners = {}
    for name, row in rows.items():
        if row.beside is None:
            continue
        if row.beside == name or row.beside not in files:
            raise ValueError(
                f"{files[name]}: beside must name another row, got {row.beside!r}{nearest(row.beside, list(files))}"
            )
        partners[row.beside] = BoardRow.from_yaml(files[row.beside])
        if partners[row.beside].beside is not None:
            raise ValueError(f"{files[name]}: {row.beside} is itself measured beside {partners[row.beside].beside}.")
    return plan, {**partners, **rows}
