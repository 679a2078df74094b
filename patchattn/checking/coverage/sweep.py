"""The sweep: every model type of the installed transformers, one process each."""

import multiprocessing
import re
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...core.host import find_sites
from ...core.patching import patch_model, unpatch_model
from ...core.registry import list_variants, variant_info
from ...core.selection import select_sites
from ...core.sites import AttentionSite
from .checks import Findings, _line, check, find_runs
from .tiny import SCALES, TooLargeError, default_config, meta_model, model_classes, tiny_config, tiny_model

Status = Literal["patchable", "failed", "refused", "structure only", "not built", "no attention"]

_PATIENCE = 10.0  # seconds of computing after which no other way to build a small model is tried


@dataclass
class Row:
    """What the sweep found of one model type.

    Attributes:
        model_type: as in `AutoConfig`.
        model_class: the class that was built.
        status: `patchable`: a small model ran and every check held. `failed`: it ran and a check did not hold.
            `refused`: every variant raises NotImplementedError, when the model is patched or when it is called.
            `structure only`: sites were found in a model without weights, but no small model ran. `not built`: not
            even that. `no attention`: nothing to patch.
        reason: the error, or what did not hold.
        self_sites, cross_sites: attention sites of the default configuration; of the small one if that fails.
        towers: towers that have sites.
        gate: whether attention is looked up in transformers' registry, or in the own code of its modules.
        ran_sites: sites of the small model.
        findings: what the checks of the small model found, `None` where none ran.
        seconds: how long it took.
    """

    model_type: str
    model_class: str = ""
    status: Status = "not built"
    reason: str = ""
    self_sites: int = 0
    cross_sites: int = 0
    towers: list[str] = field(default_factory=list)
    gate: str = ""
    ran_sites: int = 0
    findings: Findings | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON types."""
        return asdict(self)


def model_types() -> list[str]:
    """All model types of the installed transformers, parts of composite models included."""
    return sorted(CONFIG_MAPPING)


def sweep(
    model_types: Iterable[str] | None = None,
    *,
    timeout: float = 60.0,
    progress: Callable[[Row, int, int], None] | None = None,
) -> list[Row]:
    """Try every model type of the installed transformers.

    Args:
        model_types: which ones; all by default.
        timeout: seconds for one type.
        progress: called as `progress(row, done, total)` after each.

    Raises:
        ValueError: an unknown model type.
    """
    wanted = sorted(CONFIG_MAPPING) if model_types is None else list(model_types)
    for name in wanted:
        if name not in CONFIG_MAPPING:
            raise ValueError(f"transformers {transformers.__version__} has no model type {name!r}.")
    list_variants("attention")  # loads them: what a forked child has not to import costs nothing
    rows = []
    for name in wanted:
        rows.append(_in_a_process(name, timeout))
        if progress is not None:
            progress(rows[-1], len(rows), len(wanted))
    return rows


def _in_a_process(model_type: str, timeout: float) -> Row:
    """One type in a process of its own: a crash, a hang or a full memory costs one row, not the sweep."""
    context = multiprocessing.get_context("fork")  # the child knows what is imported here
    receiver, sender = context.Pipe(duplex=False)
    start = time.perf_counter()
    process = context.Process(target=_work, args=(model_type, sender), daemon=True)
    process.start()
    sender.close()
    try:
        row = receiver.recv() if receiver.poll(timeout) else Row(model_type, reason=f"took more than {timeout:.0f} s")
    except EOFError:
        row = Row(model_type, reason="the process died")
    process.kill()
    process.join()
    row.seconds = time.perf_counter() - start
    return row


def _work(model_type: str, sender: Connection) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)  # a forked process must not use the threads of its parent's pool
    row = Row(model_type)
    try:
        examine(row)
    except Exception as error:  # ours or the model's: one type's finding, not the end of the sweep
        row.status, row.reason = "failed", _line(error)
    sender.send(row)


def examine(row: Row) -> None:
    """Fill the row of one model type, in this process."""
    try:
        classes = model_classes(row.model_type)
    except Exception as error:  # an optional dependency or a broken file of one family
        row.reason = _line(error)
        return
    if not classes:
        row.reason = "no model class of its own: the configuration describes a part of other models"
        return
    _look_at_structure(row, classes)
    if row.status not in ("refused", "no attention"):
        _try_small(row, classes)


def _look_at_structure(row: Row, classes: list[type[PreTrainedModel]]) -> None:
    """Stage 1: the default configuration, without weights."""
    for model_class in classes:
        try:
            model = meta_model(model_class, default_config(row.model_type))
        except Exception as error:  # see examine
            row.reason = row.reason or _line(error)
            continue
        _note_sites(row, model)
        return


def _note_sites(row: Row, model: PreTrainedModel) -> list[AttentionSite]:
    row.model_class = type(model).__name__
    row.reason = ""
    named = any(re.search(r"attention|attn", type(module).__name__, re.I) for module in model.modules())
    if not named and not find_sites(model):
        row.status = "no attention"
        return []
    if refusal := _refusal(model):
        row.status, row.reason = "refused", refusal
        return []
    sites = select_sites(model)
    row.status = "structure only"
    row.cross_sites = sum(site.is_cross for site in sites)
    row.self_sites = len(sites) - row.cross_sites
    gates = {"own code" if site.inline else "registry" for site in sites}
    row.gate = " + ".join(sorted(gates, reverse=True))
    row.towers = list(dict.fromkeys(site.tower for site in sites))
    return sites


def _refusal(model: PreTrainedModel) -> str:
    """Why no variant can be attached to a model; empty if one can."""
    refusal = ""
    for name in list_variants("attention"):
        try:
            patch_model(model, name, variant_info(name).variant.neutral_config())
        except NotImplementedError as error:
            refusal = refusal or str(error)
        else:
            unpatch_model(model)
            return ""
    return refusal


def _try_small(row: Row, classes: list[type[PreTrainedModel]]) -> None:
    """Stage 2: the first small model that can be built and run."""
    errors: list[str] = []
    start = time.process_time()
    for model_class in classes[:2]:
        for scale in SCALES:
            if time.process_time() - start > _PATIENCE:
                break
            try:
                model = tiny_model(model_class, tiny_config(row.model_type, scale))
                sites = select_sites(model) if row.status == "structure only" else _note_sites(row, model)
            except TooLargeError as error:
                errors.append(f"{model_class.__name__}: {error}")
                break  # the next scales are larger
            except Exception as error:  # see examine
                errors.append(f"{model_class.__name__}: {_line(error)}")
                continue
            if row.status != "structure only":
                return
            runs, reached, error_text = find_runs(model, sites)
            if not runs:
                errors.append(error_text)
                continue
            row.model_class, row.ran_sites = model_class.__name__, len(sites)
            row.findings = check(model, sites, runs, reached)
            if row.findings.refusal:
                row.status, row.reason, row.gate, row.findings = "refused", row.findings.refusal, "", None
                return
            row.status = "failed" if row.findings.problems else "patchable"
            row.reason = "; ".join(row.findings.problems)
            if row.status == "patchable" and row.findings.neutral_difference is None:
                row.status, row.reason = "refused", "every variant refuses it, when it is patched or when it is called"
            return
    row.reason = "; ".join(dict.fromkeys(errors[:1] + errors[-1:])) or row.reason
