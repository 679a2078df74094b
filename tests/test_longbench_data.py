"""LongBench's files: the real ones, the Hub's archive, and what is refused."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from patchattn.evaluation.metrics.longbench import LONGBENCH_METRICS, longbench_score
from patchattn.evaluation.tasks import longbench_data as module
from patchattn.evaluation.tasks.longbench_data import LONGBENCH_TASKS, LongBenchSample, load_longbench, read_longbench

ROW = {
    "input": "Who?",
    "context": "It was {Bob}.\u2028He said.",
    "answers": ["Bob"],
    "length": 3,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "x1",
}
MINI = {"0": {"origin_prompt": "Who?", "prediction": "Ann", "gold": ["Bob"]}}


def test_the_table() -> None:
    assert list(LONGBENCH_TASKS) == [
        *("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh", "hotpotqa", "2wikimqa", "musique", "dureader"),
        *("gov_report", "qmsum", "multi_news", "vcsum", "trec", "triviaqa", "samsum", "lsht", "passage_count"),
        *("passage_retrieval_en", "passage_retrieval_zh", "lcc", "repobench-p"),
    ]
    assert set(LONGBENCH_TASKS) == set(LONGBENCH_METRICS)
    tasks = LONGBENCH_TASKS.values()
    assert [task.name for task in tasks if not task.chat] == [
        *("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"),
    ]
    assert all(re.search("[\u4e00-\u9fff]", task.prompt) for task in tasks if task.language == "zh")
    assert all(task.prompt.isascii() for task in tasks if task.language == "en")
    assert sum(task.language == "zh" for task in tasks) == 5
    assert {name for name, metric in LONGBENCH_METRICS.items() if metric == "classification"} == {
        task.name for task in tasks if task.has_classes
    }


def test_prompts_and_lengths_are_the_official_ones(data_dir: Path) -> None:
    folder = data_dir / "longbench" / "config"
    prompts = json.loads((folder / "dataset2prompt.json").read_text())
    lengths = json.loads((folder / "dataset2maxlen.json").read_text())
    assert {name: task.prompt for name, task in LONGBENCH_TASKS.items()} == prompts
    assert {name: task.max_new_tokens for name, task in LONGBENCH_TASKS.items()} == lengths


def test_the_prompts_carry_their_licence() -> None:
    folder = Path(module.__file__).parent
    assert "MIT License" in (folder / "longbench_tasks.LICENSE").read_text()


def test_real_samples_and_their_own_answers(data_dir: Path) -> None:
    """An answer that is right scores 100 in every task of MiniLongBench, without exception."""
    found = load_longbench(folder=data_dir / "longbench" / "mini")
    assert list(found) == list(LONGBENCH_TASKS)
    assert sum(map(len, found.values())) == 237
    for task, samples in found.items():
        for sample in samples:
            assert len(sample.prompt) > 400
            for answer in sample.answers:
                score = longbench_score(task, answer, sample.answers, sample.classes)
                assert score == pytest.approx(1.0), (task, sample.id)


def test_real_official_files(data_dir: Path) -> None:
    tasks = ["passage_retrieval_zh", "multifieldqa_zh"]
    found = load_longbench(tasks, data_dir / "longbench" / "full")
    assert list(found) == tasks
    assert [len(samples) for samples in found.values()] == [200, 200]
    first = found["passage_retrieval_zh"][0]
    assert first.id == "f951c270fb212ec46982cbbe2292ca317478d25e6248e802"
    assert first.answers == ("段落27",)
    assert first.classes == ()
    assert first.prompt.startswith("以下是若干段落文字")
    assert first.prompt.endswith("\n\n答案是\uff1a")
    for task, samples in found.items():
        assert all(longbench_score(task, sample.answers[0], sample.answers) == 1.0 for sample in samples)


def write(folder: Path, content: str | bytes, name: str = "qasper.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_both_layouts(tmp_path: Path) -> None:
    """Braces in a text are text, and so is a break that is none of JSON's."""
    path = write(tmp_path, json.dumps(ROW, ensure_ascii=False) + "\n")
    prompt = LONGBENCH_TASKS["qasper"].prompt.replace("{context}", ROW["context"]).replace("{input}", "Who?")
    assert read_longbench(path, "qasper") == [LongBenchSample("x1", prompt, ("Bob",), ())]
    path = write(tmp_path, json.dumps(MINI), "qasper.json")
    assert read_longbench(path, "qasper") == [LongBenchSample("0", "Who?", ("Bob",), ())]
    gold = {"0": {"origin_prompt": "Type?", "gold": {"answers": ["Food"], "all_classes": ["Food", "Date"]}}}
    path = write(tmp_path, json.dumps(gold), "trec.json")
    assert read_longbench(path, "trec") == [LongBenchSample("0", "Type?", ("Food",), ("Food", "Date"))]
    with pytest.raises(ValueError, match=r"must hold qasper\.jsonl or qasper\.json, and holds both"):
        load_longbench(["trec", "qasper"], tmp_path)
    with pytest.raises(ValueError, match=r"must hold lcc\.jsonl or lcc\.json, and holds neither"):
        load_longbench(["lcc"], tmp_path)


def changed(**changes: Any) -> str:
    return json.dumps({**ROW, **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: no samples"),
        (f"{changed()}\n{{", "line 2: not valid JSON"),
        (f"{changed()}\n\n{changed()}", "line 2: not valid JSON"),
        ("[3]", "line 1: expected an object, got [3]"),
        (f"{changed()}\n{changed(_id='x2', input=None)}", "line 2: input must be a text, got None"),
        (changed(context=3), "line 1: context must be a text, got 3"),
        (changed(dataset="lcc"), "line 1: a sample of 'lcc', not of qasper"),
        (changed(answers=[]), "line 1: answers must be a list of texts, at least one, got []"),
        (changed(answers="Bob"), "line 1: answers must be a list of texts, at least one, got 'Bob'"),
        (changed(all_classes="Food"), "line 1: all_classes must be a list of texts or null, got 'Food'"),
        (f"{changed()}\n{changed()}", "the id 'x1' is used 2 times"),
        (changed().encode() + b"\n\xff", "line 2: not UTF-8"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}[,:] {re.escape(message)}"):
        load_longbench(["qasper"], tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n"0": 3,\n}', "line 3: not valid JSON"),
        ("[]", "line 1: expected an object of samples, got a list"),
        ("{}", "line 1: no samples"),
        ('{"0": 3}', "sample '0': origin_prompt must be a text"),
        ('{"0": {"origin_prompt": "?", "prediction": "x"}}', "sample '0': answers must be a list of texts"),
        (
            '{"0": {"origin_prompt": "?", "gold": ["Food"]}}',
            "sample '0': the answer 'Food' is not one of all_classes, []",
        ),
    ],
)
def test_bad_mini_files(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, content, "trec.json")
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        load_longbench(["trec"], tmp_path)


def test_bad_task_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no task 'qaspr'.*qasper"):
        load_longbench(["qaspr"], tmp_path)
    with pytest.raises(ValueError, match="none twice"):
        load_longbench(["lcc", "lcc"], tmp_path)
    with pytest.raises(ValueError, match="at least one task"):
        load_longbench([], tmp_path)
    with pytest.raises(TypeError, match=r"write \['lcc'\]"):
        load_longbench("lcc", tmp_path)
    with pytest.raises(ValueError, match="There is no file"):
        read_longbench(tmp_path / "qasper.jsonl", "qasper")


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive is ours; the names in it are those of the dataset's loading script."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper_e.jsonl", "not read")
        archive.writestr("data/qasper.jsonl", changed() + "\n" + changed(_id="x2") + "\n")
    asked = []

    def download(*args: Any, **kwargs: Any) -> str:
        asked.append((args, kwargs))
        return str(tmp_path / "data.zip")

    monkeypatch.setattr(module, "hf_hub_download", download)
    assert [sample.id for sample in load_longbench(["qasper"])["qasper"]] == ["x1", "x2"]
    assert asked == [(("THUDM/LongBench", "data.zip"), {"repo_type": "dataset"})]
    with pytest.raises(ValueError, match=r"data\.zip holds no lcc\.jsonl"):
        load_longbench(["lcc"])


def test_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("offline mode\nmore")

    monkeypatch.setattr(module, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"from the Hub \(offline mode\)\. Give the folder"):
        load_longbench(["qasper"])
