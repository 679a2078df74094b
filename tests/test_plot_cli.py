"""`patchattn plot`: every kind of picture is written, and a mistake is one line before a model is loaded."""

import json

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import patchattn
from patchattn.cli.main import main
from patchattn.cli.plot_reports import pareto_points
from patchattn.core.heads import BaseFacts
from patchattn.core.importance import HeadImportance, SiteScores
from patchattn.evaluation.report.report import SCHEMA_VERSION

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, texts, and a report."""
    folder = tmp_path_factory.mktemp("plot")
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64))
    model.save_pretrained(folder)
    patchattn.save_patch(patchattn.patch_model(model, "ssa"), folder / "patch")
    (folder / "text.txt").write_text(" ".join(WORDS[:30]))
    scores = {f"model.layers.{i}.self_attn": SiteScores(i, 2, (0.1, 0.2, 0.3, 0.4)) for i in range(2)}
    HeadImportance(scores, "flap", BaseFacts("llama", 2, 4)).save(folder / "importance.json")
    runs = {
        run: {"scores": {"recall": score}, "costs": {"tokens_per_second": speed}}
        for run, score, speed in (("unpatched", 90.0, 20.0), ("moh", 80.0, 30.0))
    }
    task = {"main_score": "recall", "unit": "%", "higher_is_better": True, "runs": runs}
    report = {"schema_version": SCHEMA_VERSION, "runs": {"unpatched": {}, "moh": {}}, "tasks": {"needle": task}}
    (folder / "report").mkdir()
    (folder / "report" / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def run(capsys, monkeypatch, folder, tmp_path):
    """Runs `patchattn plot` in an empty folder, FOLDER standing for the data; exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def call(line):
        with pytest.raises(SystemExit) as left:
            main(["plot", *line.replace("FOLDER", str(folder)).split()])
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


@pytest.mark.parametrize(
    "line",
    [
        "heads FOLDER --text FOLDER/text.txt --variant moh --set active_ratio=0.5",
        "temperatures FOLDER --text FOLDER/text.txt --patch FOLDER/patch",
        "temperatures FOLDER --text FOLDER/text.txt --variant ssa+moh --set moh.active_ratio=0.5",
        "importance FOLDER/importance.json",
        "received FOLDER --text FOLDER/text.txt --layer 1",
        "received FOLDER --text FOLDER/text.txt --variant act --set alpha=1.0 --before",
        "grid FOLDER --text FOLDER/text.txt --variant ssa+act --set act.alpha=1.0",
        "map FOLDER --layer 1 --head 2 --prompt w1",
        "grid FOLDER --text FOLDER/text.txt --variant ssa --resolution 4",
        "rollout FOLDER --text FOLDER/text.txt --variant ssa",
        "rollout FOLDER --prompt w1 --flow --layer 0",
        "entropy FOLDER --text FOLDER/text.txt --variant ssa --length 8",
        "directions FOLDER --layer 1 --head 1 --query 4 --key 3 --text FOLDER/text.txt",
        "grid-mask neighborhood --size 12x9 --query 1,8 --set kernel=[3,5] --set several=heads",
        "pareto FOLDER/report --output pareto.svg",
    ],
)
def test_every_kind_of_picture_is_written(run, tmp_path, line):
    code, out, err = run(line)
    assert code == 0, err
    name = f"{line.split()[0]}.{'svg' if 'svg' in line else 'png'}"
    assert f"Wrote {name}" in out
    start = (tmp_path / name).read_bytes()[:5]
    assert start in (b"\x89PNG\r", b"<?xml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("received NOWHERE --prompt w1 --output here.gif", "must end in .pdf, .png, .svg"),
        ("received NOWHERE --prompt w1 --output no/here.png", "There is no folder 'no'"),
        ("received NOWHERE", "either --prompt or --text"),
        ("received NOWHERE --text some_words", "There is no file 'some_words'. Give words by --prompt"),
        ("received NOWHERE --prompt w1 --variant mohh", "did you mean 'moh'"),
        ("received NOWHERE --prompt w1 --variant moh --set active_ration=1", "did you mean 'active_ratio'"),
        ("received NOWHERE --prompt w1 --set active_ratio=1", "needs --variant"),
        ("received NOWHERE --prompt w1 --variant moh --patch here", "not both"),
        ("received FOLDER --prompt w1 --before", "--before needs a patch to compare with"),
        ("received NOWHERE --prompt w1", "Cannot load 'NOWHERE'"),
        ("received FOLDER/patch --prompt w1 --variant moh", "was saved patched"),
        ("received NOWHERE --prompt w1 --patch moh", "'moh' is a variant: give --variant moh"),
        ("heads FOLDER --text nowhere.txt --variant moh", "There is no file 'nowhere.txt'"),
        ("heads FOLDER --text FOLDER/text.txt", "give --variant or --patch, or a model that was saved patched"),
        ("temperatures FOLDER --text FOLDER/text.txt", "give --variant or --patch, or a model that was saved patched"),
        ("image NOWHERE --image nowhere.png --prompt w1", "There is no image"),
        ("image NOWHERE --image nowhere.png --prompt w1 --query first", "last, text or the index"),
        ("image FOLDER --image FOLDER/text.txt --prompt w1", "takes no images"),
        ("importance nowhere.json", "no importance file"),
        ("entropy FOLDER --text nowhere.txt", "There is no file 'nowhere.txt'"),
        ("directions NOWHERE --layer 1 --head 2 --query 3 --key 2", "either --prompt or --text"),
        ("grid-mask ssa", "choose one of axial, halo, maxvit, neighborhood, window"),
        ("grid-mask window --size 16", "--size must be two numbers with 'x' between them, got '16'"),
        ("grid-mask window --size 4x4 --query 4,0", "no patch in row 4 and column 0 of 4 x 4"),
        ("grid-mask maxvit --size 9x9 --query 0,0", "Sizes that fit: 1, 3, 9"),
        ("pareto nowhere", "There is no report"),
        ("pareto FOLDER/report --task needl", "did you mean 'needle'"),
        ("pareto FOLDER/report --cost peak_memory", "no cost 'peak_memory'"),
        ("needle FOLDER/report", "holds no answers"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_is_loaded(run, monkeypatch, line, message):
    monkeypatch.setattr("patchattn.cli.plot_source.Source.load", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run(line)
    assert code == 2
    assert err.startswith("Error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "heads FOLDER --text FOLDER/text.txt --variant ssa",
            "No router has run: no variant of the model chooses heads",
        ),
        ("temperatures FOLDER --text FOLDER/text.txt --variant moh", "No temperature was reported: no variant"),
    ],
)
def test_a_variant_that_has_nothing_to_show_is_told_in_words_of_the_command_line(run, tmp_path, line, message):
    code, _, err = run(line)
    assert code == 2
    assert message in err
    assert "with " not in err  # no advice on Python
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "score", "label"),
    [("needle", "recall", "needle: recall, %"), ("perplexity", "perplexity", "perplexity, %")],
)
def test_a_score_that_is_called_as_its_task_is_named_once(folder, tmp_path, task, score, label):
    report = json.loads((folder / "report" / "report.json").read_text())
    values = report["tasks"].pop("needle")
    values["main_score"] = score
    for run in values["runs"].values():
        run["scores"] = {score: 1.0}
    (tmp_path / "report.json").write_text(json.dumps({**report, "tasks": {task: values}}))
    _, labels = pareto_points([tmp_path], None, None)
    assert labels["score"] == label


def test_a_needle_from_a_report(run, folder, tmp_path, monkeypatch):
    drawn = {}
    plot_needle = __import__("patchattn.evaluation.tasks.figures", fromlist=["plot_needle"]).plot_needle
    monkeypatch.setattr("patchattn.evaluation.tasks.needle.recall", lambda row: row["found"])
    monkeypatch.setattr(
        "patchattn.evaluation.tasks.figures.plot_needle",
        lambda grids, **how: drawn.update(grids) or plot_needle(grids, **how),
    )
    for name, found in (("unpatched", 1.0), ("moh", 0.5)):
        rows = folder / "report" / name / "needle"
        rows.mkdir(parents=True, exist_ok=True)
        lines = [{"index": i, "depth": 50.0 * i, "length": 128, "found": found * i} for i in (1, 0)]
        (rows / "process_0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = run("needle FOLDER/report")
    assert code == 0, err
    assert {name: grid.scores for name, grid in drawn.items()} == {
        "unpatched": [[0.0], [100.0]],
        "moh": [[0.0], [50.0]],
    }
    with Image.open(tmp_path / "needle.png") as picture:
        assert picture.width > 300
