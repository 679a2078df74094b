"""benchmarks/longbench.py: what it refuses before a model is loaded, and the report it prints."""

import importlib.util
import json
from pathlib import Path

import typer
from typer.testing import CliRunner, Result

from .test_longbench import BYTES, tiny_model


def test_the_command_line(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "benchmarks" / "longbench.py"
    spec = importlib.util.spec_from_file_location("longbench_benchmark", source)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    app = typer.Typer()
    app.command()(benchmark.main)
    tiny_model().save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    mini = {"0": {"origin_prompt": "How many?", "gold": ["3"]}}
    (tmp_path / "passage_count.json").write_text(json.dumps(mini))

    def call(name: Path | str, *more: str) -> Result:
        usual = ["--output", str(tmp_path / "out"), "--data", str(tmp_path)]
        return CliRunner().invoke(app, [str(name), *usual, *more])

    moh = ["--variant", "moh", "--set", "active_ratio=0.5"]
    for more, message in (
        ([*moh, "--task", "passage_cuont"], "did you mean 'passage_count'"),
        ([*moh, "--task", "lcc"], "holds neither"),
        ([*moh, "--batch", "0"], "batch"),
        (["--variant", "mho"], "mho"),
        (["--variant", "moh", "--set", "active_ratio"], "--set expects name=value"),
        ([], "Give --variant"),
    ):
        refused = call("no model of that name is needed", *more)
        assert refused.exit_code == 2
        assert message in refused.output
    assert not (tmp_path / "out").exists()
    done = call(tmp_path / "model", *moh, "--task", "passage_count")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "report.md").read_text() in done.output
