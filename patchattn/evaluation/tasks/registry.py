"""The tasks of `patchattn eval` by name; a task's module is imported when it is made."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.settings import nearest
from .glue import GLUE_TASKS
from .longbench_data import LONGBENCH_TASKS
from .task import EvalTask, ModelKind


@dataclass(frozen=True)
class TaskEntry:
    """Where a task is.

    Attributes:
        classes: kind of model to module and class, `module:Class` in this package.
        argument: that comes before the settings, such as the name of GLUE's task.
        takes_data: whether it has the setting `data`, files to read instead of what it would load or generate.
    """

    classes: Mapping[ModelKind, str]
    argument: str | None = None
    takes_data: bool = True


_SPELT: Mapping[ModelKind, str] = {
    "causal_lm": "causal language model",
    "classifier": "classifier",
    "vision_language": "vision-language model",
}
_GLUE: Mapping[ModelKind, str] = {
    "classifier": "glue_tasks:GlueClassification",
    "causal_lm": "glue_tasks:GlueLikelihood",
}
TASKS: dict[str, TaskEntry] = {
    **{f"glue/{name}": TaskEntry(_GLUE, name) for name in GLUE_TASKS},
    **{f"longbench/{name}": TaskEntry({"causal_lm": "longbench:LongBenchEval"}, name) for name in LONGBENCH_TASKS},
    "needle": TaskEntry({"causal_lm": "needle:NeedleTask"}),
    "ruler/niah_single": TaskEntry({"causal_lm": "ruler:NiahSingle"}),
    "ruler/niah_multikey": TaskEntry({"causal_lm": "ruler:NiahMultikey"}),
    "ruler/niah_multivalue": TaskEntry({"causal_lm": "ruler:NiahMultivalue"}),
    "ruler/vt": TaskEntry({"causal_lm": "ruler:VariableTracking"}),
    "perplexity": TaskEntry({"causal_lm": "perplexity:PerplexityTask"}),
    "speed": TaskEntry({"causal_lm": "speed:SpeedTask"}, takes_data=False),
    "pope": TaskEntry({"vision_language": "vlm_tasks:PopeTask"}, takes_data=False),
    "chair": TaskEntry({"vision_language": "vlm_tasks:ChairTask"}, takes_data=False),
}
GROUPS = {
    group: [name for name in TASKS if name.startswith(f"{group}/")]
    for group in dict.fromkeys(name.split("/")[0] for name in TASKS if "/" in name)
}


def task_names(names: Sequence[str]) -> list[str]:
    """Names of tasks in order, each once; a benchmark's name, such as `glue`, stands for all its tasks.

    Raises:
        ValueError: no name, or one that there is no task of; the message gives the nearest one.
    """
    found: list[str] = []
    for name in names:
        if name not in TASKS and name not in GROUPS:
            # for a name with a benchmark the others' would only make the message long
            known = GROUPS.get(name.split("/")[0], [*GROUPS, *(task for task in TASKS if "/" not in task)])
            raise ValueError(f"There is no task {name!r}{nearest(name, known)}")
        found += GROUPS.get(name, [name])
    if not found:
        raise ValueError("There is nothing to evaluate: give at least one task.")
    return list(dict.fromkeys(found))


def make_tasks(
    names: Sequence[str],
    kind: ModelKind,
    *,
    data: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[EvalTask]:
    """The tasks of these names, their data read and checked; no model is needed for it.

    Args:
        names: of tasks, or of benchmarks for all their tasks.
        kind: of the model.
        data: the setting `data` of every task that has it and is not given it in `settings`.
        settings: name of a task or a benchmark to its settings; a task's come before its benchmark's.

    Raises:
        ValueError: an unknown name, settings for a task that is not asked for, a task for another kind of model, `data`
            that no task takes, or what the tasks themselves refuse.
        TypeError: a setting of the wrong type.
        ImportError: a package of `patchattn[eval]` is missing.
    """
    asked = task_names(names)
    known = [*asked, *dict.fromkeys(name.split("/")[0] for name in asked if "/" in name)]
    for name, values in (settings or {}).items():
        if name not in known:
            raise ValueError(f"There are settings for the task {name!r}, which is not asked for{nearest(name, known)}")
        if not isinstance(values, Mapping):
            raise TypeError(f"The settings of {name} must map names to values, got {values!r}.")
    if data is not None and not any(TASKS[name].takes_data for name in asked):
        raise ValueError(f"{', '.join(asked)} reads no data: leave out data.")
    for name in asked:
        if kind not in TASKS[name].classes:
            kinds = " or a ".join(_SPELT[other] for other in TASKS[name].classes)
            raise ValueError(f"The task {name} is for a {kinds}, got a {_SPELT[kind]}.")
    return [_make(name, kind, data, settings or {}) for name in asked]


def _make(name: str, kind: ModelKind, data: str | None, settings: Mapping[str, Mapping[str, Any]]) -> EvalTask:
    entry = TASKS[name]
    given = {**settings.get(name.split("/")[0], {}), **settings.get(name, {})}
    if data is not None and entry.takes_data:
        given.setdefault("data", data)
    module, _, found = entry.classes[kind].partition(":")
    made = getattr(importlib.import_module(f".{module}", __package__), found)
    return made(**given) if entry.argument is None else made(entry.argument, **given)
