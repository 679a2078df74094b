"""benchmarks/answers.py: forced answers against what `generate` writes, its prompts, and a run that goes on."""

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import DynamicCache

import patchattn

from .long_context import BYTES, tiny_llama

ROOT = Path(__file__).parents[1]
LENGTH = 140
QUESTION = 12


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setattr(torch, "set_num_threads", lambda number: None)
        yield importlib.import_module("answers")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)


def generated(model: Any, prompt: list[int], count: int, known: DynamicCache | None) -> tuple[list[int], float]:
    """What is written, and its nats a token."""
    ids = torch.tensor([prompt])
    how = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if known is not None:
        how["past_key_values"] = known
    found = model.generate(ids, **how, return_dict_in_generate=True, output_logits=True)
    tokens = found.sequences[0, len(prompt) :]
    logits = torch.cat(found.logits).double()
    return tokens.tolist(), float(torch.nn.functional.cross_entropy(logits, tokens))


METHODS = {
    "dense": None,
    "streaming": {"sinks": 2, "recent": 20},
    "hip": {"budget": 16, "queries": 1, "dense_layers": 0},
    "triangle": {"last": 8, "sinks": 1, "recent": 10, "dense_layers": 0},
    "quest": {"budget": 32, "dense_layers": 0},
    "recycled": {"budget": 16},
    "random pages": {"budget": 32, "dense_layers": 0},
    "snapkv": {"budget": 40, "window": 8},
    "random keys": {"budget": 40},
    "think": {"ratio": 0.5, "recent": 4},
    "expected_attention": {"budget": 20},
    "tova": {"budget": 20},
    "h2o": {"budget": 20},
    "streaming_llm": {"sinks": 2, "recent": 20, "slack": 0},
}


@pytest.mark.parametrize("name", METHODS)
def test_forced_answers_are_those_of_generate(script: ModuleType, model: Any, name: str) -> None:
    tokens = torch.randint(3, model.config.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    methods = {each.name: each for each in (*script.selection_methods(), *script.cache_methods({}))}
    method, settings = methods.get(name), METHODS[name]
    with script.baselines(), torch.inference_mode():
        cache = None
        if method is not None:
            patchattn.patch_model(model, method.variant, settings)
            if method.how == "steps":  # which acts behind a prompt but for its last token
                cache = DynamicCache(config=model.config)
                if name == "recycled":  # at which this one reads all
                    cache = None
                else:
                    model(torch.tensor([tokens[:-1]]), past_key_values=cache)
        answer, nats = generated(model, tokens, 6, cache)
        patchattn.unpatch_model(model) if method is not None else None
        found = []
        for expected in (answer, [*answer[:3], answer[3] ^ 1, *answer[4:]]):
            case = script.Case("single", LENGTH, 0, tokens[:-QUESTION], tokens[-QUESTION:], expected)
            known = LENGTH - 1 if method is None or method.how in ("steps", "rows", "prompt") else LENGTH - 64
            prefixes = script.Prefixes(model, case, known=known)
            dense = script.dense(model, case, prefixes)
            found.append(dense if method is None else script.outcome(model, case, prefixes, method, settings))
    assert [each[0] for each in found] == [1.0, 0.0]
    assert found[0][1] == pytest.approx(nats, abs=2e-5)
    if method is not None:
        assert abs(dense[1] - found[1][1]) > 1e-4  # it does something
        assert 0 < found[0][2] < 1


def test_a_cache_is_compressed_before_its_question(script: ModuleType, model: Any) -> None:
    """Once: the question, and the answer, see what is kept of the text and each other."""
    tokens = torch.randint(3, model.config.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(2)).tolist()
    case = script.Case("single", LENGTH, 0, tokens[:-QUESTION], tokens[-QUESTION:], [7, 8, 9])
    method = next(each for each in script.cache_methods({}) if each.name == "knorm")
    prefixes = script.Prefixes(model, case, known=LENGTH - QUESTION - 64)
    found = script.outcome(model, case, prefixes, method, {"budget": 30}, "before")
    stored = 30 + QUESTION + len(case.answer) - 1
    assert found[2] == pytest.approx(stored / (LENGTH + 2))
    with (
        torch.inference_mode(),
        importlib.import_module("answer_parts.scoring").patched(model, "knorm", {"budget": 30, "event": "chunk"}),
    ):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([case.text]), past_key_values=cache)
        rest = torch.tensor([[*case.question, *case.answer[:-1]]])
        logits = model(rest, past_key_values=cache).logits[0, QUESTION - 1 :].double()
    assert found[1] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, torch.tensor([7, 8, 9]))), abs=2e-5
    )


def test_density_counts_layers_that_stay_dense(script: ModuleType, model: Any) -> None:
    text = torch.randint(3, model.config.vocab_size, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    case = script.Case("text", 60, 0, text[:1], [], text[1:])
    method = next(each for each in script.selection_methods() if each.name == "quest")
    settings = {"budget": 1, "page": 1, "prefill": "selected", "dense_layers": 1}
    found = script.outcome(model, case, script.Prefixes(model, case, known=0), method, settings)
    seen = sum(range(1, 60))  # one key of all that each of 59 tokens sees in the second layer
    assert found[2] == pytest.approx((seen + 59) / (2 * seen), abs=1e-5)
    assert len(found) == 3 + 4
    assert found[1] == pytest.approx(np.average(found[3:], weights=[15, 15, 15, 14]), abs=1e-5)


@pytest.mark.parametrize("name", ["single", "multi-key", "tracking"])
def test_a_prompt_is_cut_before_its_question(script: ModuleType, name: str) -> None:
    module = importlib.import_module("answer_parts.cases")
    case = module.needle(BYTES, name, 700, 1, None)
    task = module.NEEDLES[name](samples=2, lengths=[700])
    assert case.prompt == task.prompt(BYTES, 1).tokens
    question = task.sample(1).frame.question
    assert question in BYTES.decode(case.question)
    assert question not in BYTES.decode(case.text)
    assert BYTES.decode(case.answer).strip() == ", ".join(task.sample(1).expected)


@pytest.mark.parametrize("page", ["selection", "caches"])
def test_a_run_goes_on_where_it_was_stopped(
    script: ModuleType, model: Any, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    tasks = ("single", "text") if page == "selection" else ("single", "continuation")
    stages = (script.Stage(tasks, 480, range(2), (0,)), script.Stage(tasks[:1], 480, range(1), (0, 1)))
    monkeypatch.setattr(script, "STAGES", {page: stages})
    names = ("quest", "streaming", "random pages", "h2o", "snapkv", "random keys")
    for maker in ("selection_methods", "cache_methods"):
        made = getattr(script, maker)
        monkeypatch.setattr(script, maker, lambda *args, m=made: [each for each in m(*args) if each.name in names])
    how = {"folder": tmp_path / "rows", "text": str(text), "longbench": None, "dtype": "float32", "threads": 1}
    script.run(page, tmp_path / "model", **how, minutes=-1.0)
    path = tmp_path / "rows" / "answers.jsonl"
    assert not path.exists()
    script.run(page, tmp_path / "model", **how, minutes=1e9)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    path.write_text("".join(lines[:-1]) + lines[-1][:20])
    script.run(page, tmp_path / "model", **how, minutes=1e9)
    assert path.read_text() == "".join(lines)
    found = script.rows.read(path)
    kept = {"selection": ("quest 0.25", "quest 0.1"), "caches": ("snapkv 0.25 before", "snapkv 0.1 with")}[page]
    assert set(kept) <= set(found["single/480/0"])
    assert kept[1] not in found["single/480/1"]
    script.page(page, tmp_path / "model", tmp_path / "rows", output=tmp_path / "page.md", dtype="float32", threads=1)
    assert (tmp_path / "page.png").exists()
    written = (tmp_path / "page.md").read_text()
    name = "streaming 0.25" if page == "selection" else "snapkv 0.25 with"
    outcomes = [found[f"single/480/{index}"] for index in range(2)]
    nats = [each[name][1] - each["dense"][1] for each in outcomes]
    assert f"{np.mean(nats):+.2f} ± {stats.sem(nats):.2f}" in written


def test_selections_are_trained_from_the_start(script: ModuleType, tmp_path: Path) -> None:
    recall, shown = (importlib.import_module(name) for name in ("recall", "answer_parts.recall_rows"))
    for name in ("dense", "nsa"):
        assert set(recall.trained(name, 0, 2)) == {"right", "loss"}
    right = {"dense": (99.0, 98.0, 97.0), "moba": (98.9, 98.2, 97.0), "streaming": (50.0, 52.0, 51.0)}
    for name, values in right.items():
        for seed, value in enumerate(values):
            recall.append_row(tmp_path / shown.NAME, f"{name}/{seed}/9", {"right": value, "loss": 0.1})
    written = "\n".join(shown.lines(tmp_path))
    assert "| streaming | 51.0 | 50.0 | -47.0 ± 1.0 | 3 |" in written
    assert (
        "- `moba`, trained from the start, recalls as dense attention does: **shown** (+0.0 ± 0.1 points, 3 seeds)."
        in written
    )
    assert shown.lines(tmp_path / "none") == []


def test_claims_are_read_from_rows(script: ModuleType) -> None:
    tables = importlib.import_module("answer_parts.tables")
    pairs = {"dense": [1.0, 1.1, 1.2, 1.0], "worse": [2.0, 2.2, 2.1, 2.1], "alike": [1.01, 1.1, 1.21, 1.0]}
    rows = {f"single/9/{n}": {name: [0.0, nats[n], 0.5] for name, nats in pairs.items()} for n in range(4)}
    assert tables.better(rows, "dense", "worse") == "**shown** -1.03 ± 0.05 (4)"
    assert tables.better(rows, "worse", "dense") == "no, the opposite +1.03 ± 0.05 (4)"
    assert tables.better(rows, "worse", "dense", wants=1) == "**shown** +1.03 ± 0.05 (4)"
    assert tables.better(rows, "alike", "dense").startswith("not shown +0.0")
    assert tables.better(rows, "other", "dense") == "not measured (0)"
    assert tables.near(rows, "alike").startswith("**shown** +0.0")
    assert tables.near(rows, "worse").startswith("no, the opposite")
    count, mean, difference, error = script.rows.differences(rows, "worse", "dense", 1)
    apart = np.subtract(pairs["worse"], pairs["dense"])
    assert (count, mean, difference) == (4, pytest.approx(2.1), pytest.approx(apart.mean()))
    assert error == pytest.approx(stats.sem(apart))
    assert math.isnan(script.rows.differences({}, "worse", "dense", 1)[1])
