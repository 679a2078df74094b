"""Timed generation: how many tokens, which prompts, and the scores."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from patchattn.evaluation.tasks.cost import memory_kind
from patchattn.evaluation.tasks.speed import SpeedTask

from .long_context import BYTES, tiny_llama


def test_scores_of_hand_made_times() -> None:
    sizes = {"prompt_tokens": 8, "new_tokens": 5}
    rows = [
        {
            **sizes,
            "batch_size": 1,
            "peaks": [3 * 2**20, 5 * 2**20, 4 * 2**20],
            "first_token_times": [1.0, 3.0, 2.0],
            "times": [2.0, 7.0, 4.0],  # 4, 1 and 2 tokens per second
        },
        {
            **sizes,
            "batch_size": 4,
            "peaks": [8 * 2**20] * 3,
            "first_token_times": [8.0] * 3,
            "times": [10.0] * 3,  # 16 tokens in two seconds
        },
    ]
    expected = {
        "tokens_per_second": 4.0,  # the root of 2 times 8
        "first_token_seconds": 4.0,
        "peak_memory_mib": 8.0,
        "tokens_per_second@prompt=8,new=5,batch=1": 2.0,
        "tokens_per_second@prompt=8,new=5,batch=4": 8.0,
        "first_token_seconds@prompt=8,new=5,batch=1": 2.0,
        "first_token_seconds@prompt=8,new=5,batch=4": 8.0,
        "peak_memory_mib@prompt=8,new=5,batch=1": 4.0,
        "peak_memory_mib@prompt=8,new=5,batch=4": 8.0,
    }
    task = SpeedTask()
    assert task.score(rows) == pytest.approx(expected)
    assert (task.main_score, task.unit, task.higher_is_better) == ("tokens_per_second", "tokens/s", True)
    without = [{**row, "peaks": [None] * 3} for row in rows]
    assert task.score(without) == pytest.approx({name: expected[name] for name in expected if "memory" not in name})


def test_what_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination, as often as asked, and to the last token although nearly every token ends an answer."""
    model = tiny_llama()
    model.generation_config.eos_token_id = list(range(1, len(BYTES) - 1))
    generate, seen = model.generate, []

    def spy(input_ids: torch.Tensor, **given: Any) -> torch.Tensor:
        made = generate(input_ids=input_ids, **given)
        seen.append((input_ids.clone(), made.shape[1] - input_ids.shape[1]))
        return made

    monkeypatch.setattr(model, "generate", spy)
    task = SpeedTask(prompt_lengths=[5, 3], new_tokens=[4, 2], batch_sizes=[1, 3], warmup=2, repeats=3)
    assert len(task) == 8
    task.check_model(model, BYTES)
    rows = [row for start in (0, 5) for row in task.answer(model, BYTES, range(start, min(start + 5, 8)))]
    assert json.loads(json.dumps(rows)) == rows
    sizes = [(prompt, new, batch) for prompt in (5, 3) for new in (4, 2) for batch in (1, 3)]
    assert [(row["prompt_tokens"], row["new_tokens"], row["batch_size"]) for row in rows] == sizes
    assert [(*prompts.shape, new) for prompts, new in seen] == [(b, p, n) for p, n, b in sizes for _ in range(5)]
    assert all(torch.equal(prompts, seen[number // 5 * 5][0]) for number, (prompts, _) in enumerate(seen))
    assert min(int(prompts.min()) for prompts, _ in seen) > 2  # no special token
    for row in rows:
        assert len(row["first_token_times"]) == len(row["times"]) == len(row["peaks"]) == 3
        assert all(0 < first < end for first, end in zip(row["first_token_times"], row["times"], strict=True))
    known = [peak for row in rows[:5] for peak in row["peaks"] if peak is not None]
    assert [row["peak_memory"] for row in rows[:5]] == [max(known, default=None)] * 5
    assert (None in rows[0]["peaks"]) == (memory_kind(model) is None)
    assert task.score(rows)["tokens_per_second"] > 0


def test_prompts_are_drawn_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    draws = [SpeedTask(prompt_lengths=[64], seed=seed)._prompts(model, BYTES, 0) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert len(draws[0].unique()) > 30


def test_a_model_that_stops_early() -> None:
    model = tiny_llama()
    model.generation_config.max_time = 0.0
    with pytest.raises(ValueError, match="LlamaForCausalLM stopped at 1 of 8 tokens: see its generation_config"):
        SpeedTask(prompt_lengths=[4], new_tokens=[8]).answer(model, BYTES, [0])


def test_stories260k(data_dir: Path) -> None:
    folder = data_dir / "models/stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    task = SpeedTask(prompt_lengths=[64], new_tokens=[4], repeats=1)
    task.check_model(model, tokenizer)
    scores = task.score(task.answer(model, tokenizer, [0]))
    assert scores["tokens_per_second"] == pytest.approx(scores["tokens_per_second@prompt=64,new=4,batch=1"])


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model = tiny_llama().cuda()
    (row,) = SpeedTask(prompt_lengths=[16], new_tokens=[4], repeats=2).answer(model, BYTES, [0])
    assert min(row["peaks"]) > sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"new_tokens": [1]}, ValueError, "new_tokens must lie between 2"),
        ({"batch_sizes": []}, ValueError, "batch_sizes must hold at least one value"),
        ({"prompt_lengths": [4, 4]}, ValueError, "none twice"),
        ({"repeats": 0}, ValueError, "repeats must lie between 1"),
        ({"prompt_length": [4]}, ValueError, "did you mean 'prompt_lengths'"),
    ],
)
def test_what_is_refused(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SpeedTask(**wrong)


def test_models_that_are_refused() -> None:
    small = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=300, n_positions=64))
    SpeedTask(prompt_lengths=[60], new_tokens=[4]).check_model(small, BYTES)
    with pytest.raises(ValueError, match="has a table of 64 positions"):
        SpeedTask(prompt_lengths=[60], new_tokens=[5]).check_model(small, BYTES)
