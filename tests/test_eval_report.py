"""What a report says: costs from rows, differences, tables, the page, pictures, and a model card."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from matplotlib.colors import to_hex

import patchattn
from patchattn.evaluation.report.errors import standard_error
from patchattn.evaluation.report.report import (
    all_scores,
    make_report,
    number,
    read_report,
    summary,
    table,
    to_markdown,
    write_report,
)
from patchattn.evaluation.report.report_figures import plot_costs, plot_scores
from patchattn.evaluation.tasks.figures import plot_positions
from patchattn.evaluation.tasks.perplexity import PositionLoss
from patchattn.evaluation.tasks.task import EvalTask, Row
from patchattn.plotting.style import run_styles

from .saving import base, patch


class Given(EvalTask):
    """Scores that are given."""

    main_score = "accuracy"

    def __init__(self, name: str, unit: str = "%", higher_is_better: bool = True) -> None:
        self.name, self.unit, self.higher_is_better = name, unit, higher_is_better

    def __len__(self) -> int:
        return 4

    def identity(self) -> Mapping[str, Any]:
        return {"rows": "digest"}

    def answer(self, model: Any, tokenizer: Any, indices: Sequence[int]) -> list[Row]:
        raise AssertionError

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        return {"accuracy": 100 * sum(row["right"] for row in rows) / len(rows), "undefined": float("inf")}

    def values(self, rows: Sequence[Row]) -> list[float]:
        return [100 * row["right"] for row in rows]


def batch(rights: Sequence[int], **costs: Any) -> list[Row]:
    return [{"right": right, **costs} for right in rights]


def test_scores_and_costs_of_a_task() -> None:
    batches = [
        [
            {
                "right": 1,
                "prompt_tokens": 10,
                "new_tokens": 5,
                "seconds": 3.0,
                "first_token_seconds": 1.0,
                "peak_memory": 7,
            },
            {
                "right": 0,
                "prompt_tokens": 20,
                "new_tokens": 3,
                "seconds": 3.0,
                "first_token_seconds": 1.0,
                "peak_memory": 7,
            },
        ],
        [
            {
                "right": 1,
                "prompt_tokens": 30,
                "new_tokens": 1,
                "seconds": 6.0,
                "first_token_seconds": 5.0,
                "peak_memory": 9,
            }
        ],
    ]
    found = summary(Given("a"), batches)
    assert found["scores"] == {"accuracy": pytest.approx(200 / 3), "undefined": None}
    assert found["costs"] == {
        "prompt_tokens": 20,
        "new_tokens": 3,
        "first_token_seconds": 3.0,  # the median of 1 and 5
        "tokens_per_second": (4 + 2 + 0) / (2 + 1),
        "samples_per_second": 3 / 9,
        "peak_memory": 9,
    }
    assert summary(Given("a"), [batch([1, 1])])["costs"] == {}
    forgetful = [
        batch([1], cache_bytes=30, cache_dense_bytes=100),
        batch([1, 1], cache_bytes=20, cache_dense_bytes=300),
    ]
    assert summary(Given("a"), forgetful)["costs"] == {"cache_ratio": 50 / 400}
    nothing = batch([1], seconds=2.0, first_token_seconds=None, peak_memory=None)
    assert summary(Given("a"), [nothing])["costs"] == {"samples_per_second": 0.5}


@pytest.fixture
def report() -> dict[str, Any]:
    """Two tasks of one benchmark and a third that is better when lower, of a patched model and itself unpatched."""
    tasks = [Given("glue/sst2"), Given("glue/rte"), Given("loss", "nats", higher_is_better=False)]
    rights = {"unpatched": (2, 4, 1), "ssa+moh": (3, 1, 1)}
    rows = {
        task.name: {
            run: batch([1] * counts[place] + [0] * (4 - counts[place]), seconds=2.0, peak_memory=2**30)
            for run, counts in rights.items()
        }
        for place, task in enumerate(tasks)
    }
    found = {
        run: {task.name: {"samples": 4, **summary(task, [rows[task.name][run]])} for task in tasks} for run in rights
    }
    model = base()
    plain = {**patchattn.patch_info(model), "parameters": 100}
    patch(model)
    model.config._name_or_path = "someone/base"
    patches = {"unpatched": plain, "ssa+moh": {**patchattn.patch_info(model), "parameters": 123}}
    return make_report(model, tasks, found, patches, {"batch": 4, "seed": 0, "limit": None, "processes": 1}, rows)


def test_a_run_has_one_colour_in_all_pictures_of_a_report(report: dict[str, Any]) -> None:
    names = ["unpatched", "moh 0.5", "ssa", "act"]
    report["runs"] = dict.fromkeys(names, report["runs"]["unpatched"])
    for task in report["tasks"].values():
        task["runs"] = dict.fromkeys(names, task["runs"]["unpatched"])
    scores = {line.get_label(): line.get_color() for line in plot_scores(report).axes[0].get_lines()}
    costs = plot_costs(report)
    assert costs is not None
    bars = {bar.get_label(): bar.patches[0].get_facecolor() for bar in costs.axes[0].containers}
    losses = {name: [PositionLoss(0, 4, 2.0, 8)] for name in names}
    lines = {line.get_label(): line.get_color() for line in plot_positions(losses).axes[0].get_lines()}
    found = [{name: to_hex(colours[name]) for name in names} for colours in (scores, bars, lines)]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].values())) == len(names)
    # a picture of fewer runs, in another order, is of the same runs
    assert run_styles(["ssa", "unpatched"])["unpatched"] == run_styles(names)["unpatched"]


def test_differences_and_averages(report: dict[str, Any]) -> None:
    runs = {name: task["runs"]["ssa+moh"] for name, task in report["tasks"].items()}
    assert [run["scores"]["accuracy"] for run in runs.values()] == [75, 25, 25]
    assert [run["difference"] for run in runs.values()] == [
        {"accuracy": change, "undefined": None} for change in (25, -75, 0)
    ]
    # of (1, 1, 0, 0) and (1, 1, 1, 0): a deviation of 1 / sqrt(3) and of 1 / 2, over the root of four samples
    first = report["tasks"]["glue/sst2"]["runs"]
    assert first["unpatched"]["error"] == pytest.approx(100 / 3**0.5 / 2)
    assert first["ssa+moh"]["error"] == first["ssa+moh"]["difference_error"] == pytest.approx(25)
    assert runs["loss"]["difference_error"] == 0  # though each score alone is far from certain
    assert report["averages"] == {"glue": {"unpatched": 75, "ssa+moh": 50}}
    assert (report["schema_version"], report["model"]["class"]) == (1, "LlamaForCausalLM")


def test_tables(report: dict[str, Any]) -> None:
    head, rows = table(report)
    assert head == ["task", "score", "model", "value", "difference", "throughput, samples/s", "peak memory, GiB"]
    assert rows[0] == ["glue/sst2", "accuracy, %", "unpatched", "50.00 ± 28.87", "", "2.00", "1.00"]
    assert rows[1] == ["glue/sst2", "accuracy, %", "ssa+moh", "75.00 ± 25.00", "+25.00 ± 25.00", "2.00", "1.00"]
    assert rows[5] == [
        "loss",
        "accuracy, nats (lower is better)",
        "ssa+moh",
        "25.00 ± 25.00",
        "+0.00 ± 0.00",
        "2.00",
        "1.00",
    ]
    assert rows[7] == ["glue, mean", "main scores, %", "ssa+moh", "50.00", "-25.00", "", ""]
    assert all_scores(report)[1][1] == ["glue/sst2", "undefined", "-", "-"]
    lines = to_markdown(report).splitlines()
    assert lines[3] == "| glue/sst2 | accuracy, % | ssa+moh | 75.00 ± 25.00 | +25.00 ± 25.00 | 2.00 | 1.00 |"
    text = "\n".join(lines)
    for part in (
        "moh (active_ratio=0.5",
        "123 parameters",
        "batch 4, seed 0, processes 1",
        "glue/sst2 4",
        "someone/base",
    ):
        assert part in text
    assert "limit" not in text


class Root(Given):
    """A score that is no mean of samples."""

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        return {"accuracy": sum(row["right"] for row in rows) ** 0.5}

    def values(self, rows: Sequence[Row]) -> None:
        return None


def test_errors_by_the_bootstrap() -> None:
    draw = np.random.default_rng(0)
    rights = draw.integers(0, 2, 400)
    rows, changed = batch(rights.tolist()), batch([*(1 - rights[:20]).tolist(), *rights[20:].tolist()])
    count, share = rights.sum(), rights.mean()
    expected = (400 * share * (1 - share)) ** 0.5 / (2 * count**0.5)  # d sqrt(c) = dc / (2 sqrt(c))
    alone, apart = standard_error(Root("a"), rows), standard_error(Root("a"), rows, changed)
    assert alone == pytest.approx(expected, rel=0.15)
    assert apart == pytest.approx(20**0.5 / (2 * count**0.5), rel=0.2)  # 20 samples differ, each by one either way
    assert standard_error(Root("a"), rows, rows) == 0
    assert standard_error(Root("a"), rows[:1]) is None
    broken = Given("b")
    broken.main_score, broken.values = "undefined", lambda rows: None  # type: ignore[method-assign]
    assert standard_error(broken, rows) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.345, "12.35"), (0.0, "0.00"), (0.01234, "0.0123"), (-0.5, "-0.500"), (1e-9, "0.000000"), (None, "-")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


class Page(HTMLParser):
    """Texts by tag, and what the page asks the network for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def test_the_page_needs_nothing_else(report: dict[str, Any], tmp_path: Path) -> None:
    report["model"]["name"] = "<script>alert(1)</script>"
    write_report(report, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    page = Page()
    page.feed(text)
    assert [cell for cell in page.texts["td"] if cell == "glue/sst2"] == ["glue/sst2"] * 4
    assert len(page.sources) == 2
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"https?://", text)


def test_reports_are_read_back(report: dict[str, Any], tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert read_report(tmp_path) == read_report(tmp_path / "report.json") == json.loads(json.dumps(report))
    with pytest.raises(ValueError, match="There is no report"):
        read_report(tmp_path / "nowhere")
    (tmp_path / "report.json").write_text(json.dumps({**report, "schema_version": 2}))
    with pytest.raises(ValueError, match="schema version 2; this patchattn reads 1"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("[")
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        read_report(tmp_path)


def test_pictures_show_the_numbers(report: dict[str, Any]) -> None:
    shares, loss = plot_scores(report).axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in shares.lines}
    assert drawn == {"unpatched": [50, 100], "ssa+moh": [75, 25]}
    assert [label.get_text() for label in shares.get_yticklabels()] == ["glue/sst2", "glue/rte"]
    assert shares.get_xlabel() == "main score, %"
    assert loss.get_xlabel() == "accuracy, nats (lower is better)"
    figure = plot_costs(report)
    assert figure is not None
    speed, memory = figure.axes
    assert [patch.get_width() for patch in speed.patches] == [2.0] * 6
    assert memory.get_xlabel() == "peak memory, GiB"
    assert [patch.get_width() for patch in memory.patches] == [1.0] * 6
    for task in report["tasks"].values():
        for run in task["runs"].values():
            run["costs"] = {}
    assert plot_costs(report) is None


def test_a_report_on_the_model_card(report: dict[str, Any], tmp_path: Path) -> None:
    write_report(report, tmp_path / "report")
    model = patch(base())
    patchattn.save_pretrained(model, tmp_path / "out", report=tmp_path / "report")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    found = {(result.dataset_name, result.metric_type): result for result in card.data.eval_results}
    assert set(found) == {("glue/sst2", "accuracy"), ("glue/rte", "accuracy"), ("loss", "accuracy")}
    result = found["glue/sst2", "accuracy"]
    assert (result.metric_value, result.dataset_type, result.task_type) == (75.0, "glue", "text-generation")
    assert "| glue/sst2 | accuracy, % | ssa+moh | 75.00 ± 25.00 | +25.00 ± 25.00 |" in card.text
    other = patchattn.patch_model(base(), "moh", active_ratio=0.25)
    with pytest.raises(ValueError, match=r"no run with the patches of this model; its runs are unpatched, ssa\+moh"):
        patchattn.save_pretrained(other, tmp_path / "other", report=tmp_path / "report")
    assert not (tmp_path / "other").exists()
