"""The command line: what each command prints, and that a mistake is one line and exit code 2."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import BertConfig, BertModel

import patchattn
from patchattn import list_variants, variant_info
from patchattn.cli.devices import choose_device
from patchattn.cli.main import main


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command line; returns its exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=64)
    BertModel(config).save_pretrained(folder)
    return str(folder)


def test_list_names_every_variant(run):
    code, out, _ = run("list")
    assert code == 0
    for name in list_variants():
        assert name in out
        assert variant_info(name).summary in out


def test_list_fits_a_narrow_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("list")[1].splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "} == set(list_variants())
    assert len(lines) < 4 * len(list_variants())


def test_programs_read_json(run, bert_folder):
    listed = {row["name"]: row for row in json.loads(run("list", "--json")[1])}
    assert list(listed) == list_variants()
    described = json.loads(run("info", "logn", "--json")[1])
    assert described.items() >= listed["logn"].items()
    assert described["settings"]["train_length"]["takes"] == "at least 2 or None"
    code, out, _ = run("check", bert_folder, "--variant", "logn", "--json")
    checked = json.loads(out)
    assert (code, checked["passed"], checked["sites"]) == (0, True, 2)
    assert {"passed"} <= {each["status"] for each in checked["checks"]} <= {"passed", "not applicable"}
    (row,) = json.loads(run("coverage", "bert", "--json")[1])
    assert (row["model_type"], row["status"]) == ("bert", "patchable")


@pytest.mark.parametrize("name", list_variants())
def test_info_is_json_too(run, name):
    described = json.loads(run("info", name, "--json")[1])
    info = variant_info(name)
    assert described["title"] == info.title
    assert set(described["settings"]) == set(info.config_fields)
    assert described["presets"].keys() == info.presets.keys()


def test_version(run):
    assert run("--version")[:2] == (0, f"patchattn {patchattn.__version__}\n")


@pytest.mark.parametrize("name", list_variants())
def test_info_describes_every_setting(run, name):
    code, out, _ = run("info", name)
    assert code == 0
    info = variant_info(name)
    assert info.arxiv_id in out
    assert (info.code or "none released") in out
    for field, described in info.config_fields.items():
        assert f"{field} = {described['default']}" in out
        assert described["source"].split()[0] in out


def test_info_says_what_a_setting_takes(run):
    out = run("info", "moh")[1]
    assert "active_ratio = None   (0 to 1 or several or None)" in out
    assert "router = query_norm   (query_norm or learned)" in out
    assert "active_heads = None   (at least 1 or several or None)" in out
    assert "train_length = None tokens   (at least 2 or None)" in run("info", "logn")[1]
    assert "router_std = 0.02   (0 to 10)" in out
    pruned = run("info", "prune")[1]
    assert "heads = None   (text or a file or a mapping or several or None)" in pruned
    assert "importance = None   (text or a file or a HeadImportance or None)" in pruned


def test_info_shows_presets(run):
    for name in list_variants():
        out = run("info", name)[1]
        for preset, settings in variant_info(name).presets.items():
            assert f"preset={preset}\n" in out
            for field, value in settings.items():
                assert f"{field}={value!r}" in out


def test_check_takes_a_preset(run, bert_folder):
    code, out, _ = run("check", bert_folder, "--variant", "ssa", "--set", "preset=released")
    assert code == 0, out
    assert "BertModel with ssa on 2 attention modules" in out


def test_check_reports_on_a_folder(run, bert_folder):
    code, out, _ = run("check", bert_folder, "--variant", "moh", "--set", "active_ratio=0.5")
    assert code == 0, out
    assert "BertModel with moh on 2 attention modules" in out
    assert "unpatching restores the model" in out


def test_coverage_of_one_type(run, tmp_path):
    page = tmp_path / "coverage.md"
    code, out, _ = run("coverage", "bert", "--markdown", str(page))
    assert code == 0, out
    assert "patchable" in out
    assert "| bert |" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "mohh"], "did you mean 'moh'"),
        (["check", "BERT", "--variant", "ssaa"], "did you mean 'ssa'"),
        (["check", "BERT", "--variant", "moh", "--set", "active_ration=1"], "did you mean 'active_ratio'"),
        (["check", "BERT", "--variant", "moh", "--set", "ratio=1"], "did you mean 'active_ratio' or 'shared_ratio'?"),
        (["check", "BERT", "--variant", "moh", "--set", "active_ratio=2"], "between 0.0 and 1.0, got 2"),
        (
            ["check", "BERT", "--variant", "moh", "--set", "active_ratio=much"],
            "must be float | tuple[float, ...] | None, got 'much'",
        ),
        (["check", "BERT", "--variant", "moh", "--set", "active_ratio"], "name=value"),
        (
            ["check", "BERT", "--variant", "moh", "--set", "active_ratio=[1"],
            "--set active_ratio=[1: not valid YAML",
        ),
        (["bench", "--suite", "smoke", "--device", "gpu"], "There is no device 'gpu' on this machine"),
        (["check", "BERT", "--variant", "ssa", "--set", "preset=releasd"], "did you mean 'released'"),
        (["check", "nowhere/[at all]", "--variant", "moh"], "Cannot load 'nowhere/[at all]'"),
        (["coverage", "no_such_type"], "no_such_type"),
        (["demo", "--task", "recal"], "did you mean 'recall'"),
        (["demo", "--task", "sst2"], "--model"),
        (["demo", "--task", "recall", "--data", "here"], "--data"),
        (["demo", "--steps", "0", "--quick"], "at least 1, got 0"),
        (["demo", "--seed", "1", "--seed", "1", "--quick"], "different seeds"),
        (["demo", "--model", "BERT", "--data", "no/such/folder"], "train.tsv"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, bert_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run(*(bert_folder if argument == "BERT" else argument for argument in arguments))
    assert code == 2
    assert err.startswith("Error: ")
    assert message in err
    assert err.count("\n") == 1


def test_weights_that_were_cut_off(run, bert_folder, tmp_path):
    shutil.copytree(bert_folder, tmp_path / "bert")
    weights = tmp_path / "bert" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])
    code, _, err = run("check", str(tmp_path / "bert"), "--variant", "ssa")
    assert (code, err.count("\n")) == (2, 1)
    assert f"Cannot load '{tmp_path / 'bert'}'" in err


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        assert choose_device("cuda").index is not None  # torch.cuda.set_device takes no other
    with pytest.raises(ValueError, match="There is no device 'cuda:99' on this machine"):
        choose_device("cuda:99")


def test_an_unknown_command_or_option_is_named(run):
    code, _, err = run("infos")
    assert code == 2
    assert "infos" in err
    assert run("demo", "--stepz", "3")[0] == 2


def test_the_installed_script_runs():
    code = "import sys; from patchattn.cli.main import main; sys.argv = ['patchattn', '--help']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in ("list", "info", "coverage", "check", "demo"):
        assert command in done.stdout
