"""What was trained, on a board and in `patchattn eval`: an adapter with its patch, beside what was tuned alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import patchattn
from patchattn.evaluation.board.measured import read_rows
from patchattn.evaluation.board.plan import read_board
from patchattn.evaluation.board.sentences import shown
from patchattn.evaluation.board.show import BESIDE, board_page, board_table
from patchattn.evaluation.run.compare import compare
from patchattn.evaluation.tasks.perplexity import PerplexityTask
from patchattn.saving.trained import loaded

from .test_board import PLAN, ROWS, run, write, write_model_and_data
from .test_longbench import BYTES, tiny_model

TUNED: dict[str, dict[str, Any]] = {
    "alone": {"about": "LoRA alone", "family": "trained"},
    "ssa": {"about": "SSA and LoRA", "family": "trained", "beside": "alone"},
    "later": {"about": "was never trained", "family": "trained", "patch": "nowhere", "beside": "alone"},
    "moh": ROWS["moh"],
}
WINDOWS = {"max_length": 32, "parts": 3}


def saved(folder: Path, variant: str | None, seed: int = 3) -> str:
    """A folder with an adapter whose weights are far from zero, and with the patch beside it."""
    model: Any = tiny_model()
    if variant is not None:
        patchattn.patch_model(model, variant)
    own = None if variant is None else ["patchattn"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=own))
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return str(folder)


def perplexity(adapter: str, text: Path, *, patched: bool = False) -> float:
    """Of the model that the adapter is merged into."""
    model = tiny_model()
    if patched:
        patchattn.load_patch(model, adapter)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    task = PerplexityTask(data=str(text), **WINDOWS)
    return task.score(task.answer(merged, BYTES, range(3)))["perplexity"]


@pytest.fixture
def board(tmp_path: Path) -> Path:
    write_model_and_data(tmp_path)
    rows = {name: dict(row) for name, row in TUNED.items()}
    rows["alone"]["patch"] = saved(tmp_path / "alone", None)
    rows["ssa"]["patch"] = saved(tmp_path / "ssa", "ssa", seed=4)
    write(tmp_path / "board", PLAN, rows)
    return tmp_path


def test_rows_that_were_tuned_stand_beside_what_was_tuned_alike(
    board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(board, "--row", "ssa", "--only", "quality") == 0  # what it is beside comes with it, and first
    assert run(board) == 0
    assert "left out, nowhere holds neither a patch nor an adapter" in capsys.readouterr().out
    rows = read_rows(board / "out")
    assert set(rows) == {"dense", "alone", "ssa", "moh"}
    scores = {name: row["tasks"]["perplexity"]["score"] for name, row in rows.items()}
    assert scores["alone"] == pytest.approx(perplexity(str(board / "alone"), board / "text.txt"), rel=1e-4)
    assert scores["ssa"] == pytest.approx(perplexity(str(board / "ssa"), board / "text.txt", patched=True), rel=1e-4)
    assert len({round(score, 3) for score in scores.values()}) == 4
    assert rows["alone"]["parameters"] == rows["dense"]["parameters"]  # LoRA merges
    assert rows["ssa"]["parameters"] - rows["dense"]["parameters"] == rows["ssa"]["extra_parameters"] > 0

    found = rows["ssa"]["tasks"]["perplexity"]
    assert found["difference"] == pytest.approx(scores["ssa"] - scores["dense"])
    assert found["beside"]["difference"] == pytest.approx(scores["ssa"] - scores["alone"])
    assert 0 < found["beside"]["difference_error"] != found["difference_error"]
    assert "beside" not in rows["alone"]["tasks"]["perplexity"]
    assert rows["alone"]["density"] == {}
    assert rows["alone"]["speed"]["as_dense"]
    assert rows["ssa"]["speed"]["ratio"]["decode"]["median"] > 0

    said = shown("ssa", rows["ssa"], rows["dense"])
    assert "**beside alone**: mean of tasks: " in said
    assert f"{found['beside']['difference']:+.2f} ± " in said.split("beside alone")[1]
    head, lines = board_table(rows)
    assert BESIDE in head
    assert {len(line) for line in lines} == {len(head)}
    assert "= dense" in next(line for line in lines if line[0] == "alone")
    assert "against the row in brackets" in board_page(rows)

    saved(board / "alone", None, seed=5)
    assert run(board, "--row", "moh") == 0
    assert run(board, "--row", "alone") == 2
    assert "alone.json was measured by another plan or as another row" in capsys.readouterr().err


def test_the_mean_beside_another_row_is_of_the_same_tasks() -> None:
    dense = {"parameters": 1, "measured": {"row": None}, "speed": None, "density": {}}
    dense["tasks"] = {"a": {"unit": "%", "score": 50.0}, "b": {"unit": "%", "score": 40.0}}
    tasks = {
        "a": {"score": 1.0, "difference": -9.0, "difference_error": 9.0},
        "b": {"score": 1.0, "difference": -9.0, "difference_error": 9.0},
    }
    tasks["a"]["beside"] = {"difference": 4.0, "difference_error": 0.3}
    tasks["b"]["beside"] = {"difference": 2.0, "difference_error": 0.4}
    row = dense | {"tasks": tasks, "measured": {"row": {"family": "x", "about": "y", "beside": "z"}}}
    head, lines = board_table({"dense": dense, "r": row})
    assert lines[1][head.index(BESIDE)] == "+3.00 ± 0.250 (z)"
    assert "**beside z**: mean of tasks: better by +3.00 ± 0.250 points; apart: b +2.00" in shown("r", row, dense)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beside": "alnoe"}, "ssa.yaml: beside must name another row, got 'alnoe'; did you mean 'alone'"),
        ({"beside": "ssa"}, "beside must name another row, got 'ssa'"),
        ({"beside": "later"}, "later is itself measured beside alone"),
        ({"variants": {"moh": {}}}, "variants or a patch, one of them"),
    ],
)
def test_what_a_row_may_be_beside(board: Path, changes: dict[str, Any], message: str) -> None:
    write(board / "board", PLAN, {"ssa": {**TUNED["ssa"], "patch": "x", **changes}})
    with pytest.raises(ValueError, match=message):
        read_board(board / "board", ["ssa"])


def test_an_adapter_does_not_act_behind_a_prompt_alone(board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"about": "", "family": "", "patch": str(board / "alone"), "behind_prompt": True}
    write(board / "board", {"model": "m", "tasks": {"perplexity": {"data": "text.txt", **WINDOWS}}}, {"alone": row})
    assert run(board, "--row", "alone", "--only", "quality") == 2
    assert "alone: is said to act behind a prompt, and has an adapter" in capsys.readouterr().err


def test_a_comparison_with_what_was_trained(board: Path) -> None:
    model, task = tiny_model(), PerplexityTask(data=str(board / "text.txt"), **WINDOWS)
    report = compare(model, BYTES, [task], board / "eval", {"tuned": str(board / "ssa")})
    found = report["tasks"]["perplexity"]["runs"]["tuned"]["scores"]["perplexity"]
    assert found == pytest.approx(perplexity(str(board / "ssa"), board / "text.txt", patched=True), rel=1e-4)
    assert report["runs"]["tuned"]["adapter_parameters"] > report["runs"]["tuned"]["extra_parameters"] > 0
    assert "a LoRA adapter (" in (board / "eval" / "report.md").read_text()
    saved(board / "ssa", "ssa", seed=5)
    with pytest.raises(ValueError, match="adapter_sha256"):
        compare(model, BYTES, [task], board / "eval", {"tuned": str(board / "ssa")})


def snapshot(model: nn.Module) -> Any:
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return modules, parameters, hasattr(model, "peft_config")


def test_a_model_is_as_it_was_after_an_adapter(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = LlamaForSequenceClassification(LlamaConfig(**sizes, vocab_size=32, pad_token_id=0)).eval()
    model.model.embed_tokens.requires_grad_(False)
    copy = get_peft_model(
        patchattn.patch_model(_like(model), "ssa"), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    )
    with torch.no_grad():
        for weight in copy.parameters():
            if weight.requires_grad:
                weight.add_(0.5)
    copy.save_pretrained(tmp_path)
    tokens, before = torch.tensor([[3, 4, 5]]), snapshot(model)
    plain = model(tokens).logits
    with loaded(model, tmp_path):
        torch.testing.assert_close(model(tokens).logits, copy.eval()(tokens).logits)
        assert not torch.equal(model(tokens).logits, plain)
        with pytest.raises(ValueError, match="unpatched model"), loaded(model, tmp_path):
            pass
    after = snapshot(model)
    assert after[0] == before[0]
    assert after[2] is before[2] is False
    for name, (identity, trained, value) in before[1].items():
        assert after[1][name][:2] == (identity, trained)
        assert torch.equal(after[1][name][2], value)
    assert torch.equal(model(tokens).logits, plain)


def _like(model: Any) -> Any:
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "expected a LoRA adapter, got 'IA3'"),
        (
            PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            "expected a LoRA adapter, got 'PROMPT_TUNING'",
        ),
        (
            LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
            "got 'an activated LoRA'",
        ),
    ],
)
def test_other_adapters_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message), loaded(tiny_model(), tmp_path):
        pass


def test_adapters_that_must_be_unpickled_or_come_beside_others_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "alone", None)
    model = tiny_model()
    PeftModel.from_pretrained(model, tmp_path / "alone")
    with pytest.raises(ValueError, match="the model has adapters already: default"), loaded(model, tmp_path / "alone"):
        pass
    (tmp_path / "alone" / "adapter_model.safetensors").rename(tmp_path / "alone" / "adapter_model.bin")
    with pytest.raises(ValueError, match="would have to be unpickled"), loaded(tiny_model(), tmp_path / "alone"):
        pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"patchattn_config\.json"), loaded(tiny_model(), tmp_path / "empty"):
        pass
