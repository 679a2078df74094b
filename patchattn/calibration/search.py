"""Which heads a training-free variant helps: the offline search of ACT (arXiv 2406.15765), with far fewer runs.

The released search runs the whole data once per head. Here

- heads are first tried in groups of one layer; a group that does not help is dropped, one that does is halved until
  single heads are left;
- a run computes the layers from the calibrated one on, from kept outputs of the layer below;
- a run by accuracy ends as soon as it can no longer beat the uncalibrated model;
- what was measured is kept in a state file, from which a killed search goes on.

A head is kept if calibrating it alone scores higher than calibrating none, by more than `min_gain`.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from ..core.heads import BaseFacts, HeadList
from ..core.patching import is_patched, patched
from ..core.registry import variant_info
from ..core.selection import base_model, input_device, select_sites
from ..core.sites import AttentionSite
from ..evaluation.tasks.likelihood import ChoiceBatch, ChoiceExample, Normalise, prepare_choices, score_batch
from ..files.documents import as_json, read_json_object, write_json
from ..files.tensors import fingerprint
from .replay import Replay

Metric = Literal["accuracy", "likelihood"]
Progress = Callable[[int, int, str], None]  # runs done, runs known so far, what was found last


@dataclass(frozen=True)
class HeadSearch:
    """What a search found.

    Attributes:
        heads: the kept ones, and for which model.
        gains: layer and head to score above the baseline.
        baseline: score without calibration.
        together: score with all kept heads calibrated.
        runs: passes over the data that were measured, ended early or not.
        metric: `accuracy`, or `likelihood`: mean log-probability of the right choice among the choices.
    """

    heads: HeadList
    gains: dict[tuple[int, int], float]
    baseline: float
    together: float
    runs: int
    metric: Metric

    def save(self, path: str | Path, **about: Any) -> None:
        """Write the list as `patch_model(..., heads=path)` reads it; `about` is noted beside it."""
        gains = {f"{layer}.{head}": gain for (layer, head), gain in self.gains.items()}
        found = {"metric": self.metric, "baseline": self.baseline, "together": self.together, "gains": gains}
        content = {**self.heads.to_dict(), "calibration": {**found, "runs": self.runs, **about}}
        write_json(Path(path), content)


def find_heads(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[ChoiceExample],
    *,
    settings: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    modules: str | Iterable[str] | None = None,
    group_size: int = 4,
    metric: Metric = "accuracy",
    min_gain: float = 0.0,
    normalise: Normalise = "none",
    batch_size: int = 8,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> HeadSearch:
    """Search the heads that ACT is to calibrate.

    Args:
        model: an unpatched causal language model.
        tokenizer: its tokenizer.
        examples: questions with their answers; see `read_choices`.
        settings: of ACT, without `heads`.
        layers: layers to search; by default all but the first two and the last, or all where there are fewer than four.
        modules: which attention modules, where the model has several towers, as in `patch_model`.
        group_size: heads tried together first. 1 tries every head alone, as the paper does; a larger group saves runs
            and misses heads whose gain the others of their group undo.
        metric: what must rise.
        min_gain: by how much more than nothing.
        normalise: of `patchattn.evaluation.tasks.likelihood.score_choices`.
        batch_size: likewise.
        state: file that keeps what was measured; a search with the same data and settings goes on from it. Where a
            search ends without a head, it is removed.
        progress: called after every run.

    Raises:
        ValueError: no head helps, a model that is patched or training, a setting out of range, or a state file of
            another search.
        NotImplementedError: the model's layers are not in one list.
    """
    if is_patched(model) or model.training:
        raise ValueError("The search needs an unpatched model in evaluation mode: unpatch_model(model), model.eval().")
    if metric not in get_args(Metric):
        raise ValueError(f"metric must be one of {get_args(Metric)}, got {metric!r}.")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}.")
    if not examples:
        raise ValueError("There is no example to search on.")
    if settings and "heads" in settings:
        raise ValueError("heads is what is searched: leave it out of the settings.")
    info = variant_info("act")
    info.configure(settings)
    sites = select_sites(base_model(model), layers=layers, modules=modules)
    if len({site.tower for site in sites}) != 1:
        raise ValueError(f"Choose one tower with modules=..., got {sorted({site.tower for site in sites})}.")
    if layers is None:
        sites = [site for site in sites if site.layer_count < 4 or 2 <= site.layer_index <= site.layer_count - 2]
    prompts, choices = [e.prompt for e in examples], [e.choices for e in examples]
    batches = prepare_choices(model, tokenizer, prompts, choices, normalise=normalise, batch_size=batch_size)
    facts = BaseFacts.of(base_model(model), sites[0])
    search = {
        "settings": dict(settings or {}),
        "model": {**vars(facts), "weights": fingerprint(model)},
        "layers": [site.layer_index for site in sites],
        "data": hashlib.sha256(repr(list(examples)).encode()).hexdigest(),
        "how": [metric, normalise, group_size, min_gain],
    }
    notes = _Notes(None if state is None else Path(state), search)
    runner = _Runner(model, batches, [e.label for e in examples], metric, dict(settings or {}))
    return _search(runner, sites, facts, notes, group_size, min_gain, progress or (lambda done, known, found: None))


def _search(
    runner: "_Runner",
    sites: Sequence[AttentionSite],
    facts: BaseFacts,
    notes: "_Notes",
    group_size: int,
    min_gain: float,
    progress: Progress,
) -> HeadSearch:
    baseline = notes.get("baseline", lambda: runner.run(None, {}))
    limit = baseline + min_gain
    replay = Replay(base_model(runner.model), sites[0], runner.inputs)
    gains: dict[tuple[int, int], float] = {}
    todo = sum(-(-(site.query_heads or 0) // group_size) for site in sites)
    done = 0
    for site in sorted(sites, key=lambda site: site.layer_index):
        layer, count = site.layer_index, site.query_heads or 0
        groups = [list(range(start, min(start + group_size, count))) for start in range(0, count, group_size)]
        while groups:
            group = groups.pop(0)

            def measure(layer: int = layer, group: list[int] = group) -> float:
                replay.advance(layer)
                return runner.run(replay, {layer: group}, must_beat=limit)

            score = notes.get(f"{layer}:{','.join(map(str, group))}", measure)
            done += 1
            if score > limit and len(group) == 1:
                gains[layer, group[0]] = score - baseline
            elif score > limit:
                groups[:0] = [group[: len(group) // 2], group[len(group) // 2 :]]
                todo += 2
            progress(done, todo, f"layer {layer}, {len(gains)} heads kept")
    if not gains:
        notes.remove()
        raise ValueError(
            f"No head raises the {runner.metric} above {baseline:.4f} by more than {min_gain:g}: nothing to save. Give "
            "more data, a smaller group size, or metric=likelihood, which sees smaller steps."
        )
    chosen = HeadList.parse(list(gains))
    together = notes.get("together", lambda: runner.run(None, chosen.heads))
    return HeadSearch(HeadList(chosen.heads, facts), gains, baseline, together, done + 2, runner.metric)


class _Runner:
    """Scores the data with some heads calibrated."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[ChoiceBatch],
        labels: list[int],
        metric: Metric,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.batches, self.labels, self.metric, self.settings = model, batches, labels, metric, settings
        device = input_device(model)
        self.inputs: list[Mapping[str, Any]] = [
            {name: tensor.to(device) for name, tensor in batch.inputs.items()} for batch in batches
        ]

    def run(self, replay: Replay | None, heads: Mapping[int, Sequence[int]], must_beat: float = float("-inf")) -> float:
        """The score; by accuracy, a lower bound once it is sure that `must_beat` is not beaten."""
        if not heads:
            return self._score(replay, must_beat)
        with patched(self.model, "act", {**self.settings, "heads": dict(heads)}, layers=list(heads)):
            return self._score(replay, must_beat)

    def _score(self, replay: Replay | None, must_beat: float) -> float:
        total, left = 0.0, len(self.labels)
        for index, batch in enumerate(self.batches):
            if replay is None:
                scores = score_batch(self.model, batch)
            else:
                with replay.below(index):
                    scores = score_batch(self.model, batch)
            for question, score in zip(batch.questions, scores, strict=True):
                label = self.labels[question]
                total += (
                    int(score.argmax()) == label if self.metric == "accuracy" else score.log_softmax(-1)[label].item()
                )
            left -= len(batch.questions)
            if self.metric == "accuracy" and (total + left) / len(self.labels) <= must_beat:
                break
        return total / len(self.labels)


class _Notes:
    """What a search has measured so far, on disk."""

    def __init__(self, path: Path | None, search: dict[str, Any]) -> None:
        self.path, self.content = path, {"search": search, "scores": {}}
        if path is None or not path.exists():
            return
        try:
            found = read_json_object(path)
            scores = found["scores"]
            if not isinstance(scores, dict) or not all(map(_is_score, scores.values())):
                raise ValueError("scores must be numbers by name")
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} holds no state of a search ({error}); delete it to start anew.") from error
        if found.get("search") != as_json(search):
            raise ValueError(f"{path} is of a search with other data, settings or model; delete it to start anew.")
        self.content = found

    def remove(self) -> None:
        """The search is over, and its results are of no use."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def get(self, name: str, measure: Callable[[], float]) -> float:
        """The score of that name, measured if it is not known."""
        scores: dict[str, float] = self.content["scores"]
        if name not in scores:
            scores[name] = measure()
            if self.path is not None:
                write_json(self.path, self.content)
        return scores[name]


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
