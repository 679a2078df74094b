"""LongBench's runner: prompts cut and templated, answers, times, continuing after a kill, and the comparison."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import patchattn
from patchattn.evaluation import longbench as module
from patchattn.evaluation.longbench import compare_longbench, evaluate_longbench, fit_prompt, longbench_table
from patchattn.evaluation.longbench_data import LongBenchSample, load_longbench

TEMPLATE = "{{ bos_token }}[{% for m in messages %}{{ m['content'] }}{% endfor %}]"
SPECIAL = ["<pad>", "<s>", "</s>"]


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A token per byte, and one at the beginning."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    fast = Tokenizer(models.BPE(vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    found = PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **names)
    found.chat_template = template
    return found


BYTES, CHAT = byte_tokenizer(), byte_tokenizer(TEMPLATE)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(BYTES),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=160,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model()


def text_samples(*prompts: str, answers: Sequence[str] = ("yes",)) -> list[LongBenchSample]:
    return [LongBenchSample(str(index), prompt, tuple(answers)) for index, prompt in enumerate(prompts)]


SAMPLES = {
    "hotpotqa": text_samples("Who is it?", "A longer question " * 4, "x", "And what about this, then?", "y" * 300),
    "lcc": text_samples("def f(x):\n", "for i in"),
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


# Prompts


def test_the_middle_is_left_out() -> None:
    """Of 1 + 26 tokens the first and last five: the token of the beginning is one of them, and is there once."""
    prompt = "abcdefghijklmnopqrstuvwxyz"
    for length in (10, 11):
        found = fit_prompt(BYTES, prompt, max_length=length)
        assert found.truncated
        assert found.tokens == BYTES("abcdvwxyz")["input_ids"]
    for length in (27, 100, None):
        found = fit_prompt(BYTES, prompt, max_length=length)
        assert (found.tokens, found.truncated) == (BYTES(prompt)["input_ids"], False)


def test_chat_templates_take_room() -> None:
    prompt = "abcdefghijklmnopqrstuvwxyz"
    found = fit_prompt(CHAT, prompt, max_length=10, chat=True)
    assert CHAT.decode(found.tokens) == "<s>[abcdvwxyz]"
    found = fit_prompt(CHAT, prompt, room=11, chat=True)  # with halves of five there would be twelve
    assert CHAT.decode(found.tokens) == "<s>[abcwxyz]"
    with pytest.raises(ValueError, match="no room for a prompt: the model can be given 3 tokens"):
        fit_prompt(CHAT, prompt, room=3, chat=True)
    with pytest.raises(ValueError, match="no room"):
        fit_prompt(CHAT, "", room=2, chat=True)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab é段🙂", max_size=40), st.integers(8, 60), st.booleans())
def test_prompts_fit(prompt: str, room: int, chat: bool) -> None:
    """Also where a cut goes through a character, and the halves make more tokens than they were."""
    found = fit_prompt(CHAT, prompt, room=room, chat=chat)
    whole = 1 + len(prompt.encode()) + 2 * chat
    assert found.truncated == (whole > room)
    assert len(found.tokens) <= room
    text = CHAT.decode(found.tokens)
    assert text.startswith("<s>[" if chat else "<s>")
    assert text.count("<s>") == 1
    if not found.truncated:
        assert text == (f"<s>[{prompt}]" if chat else f"<s>{prompt}")


# Answers


def alone(model: LlamaForCausalLM, prompt: str, new_tokens: int) -> list[int]:
    tokens = BYTES(prompt, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(tokens)
    made = model.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    return made[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_are_those_of_one_prompt_at_a_time(model: LlamaForCausalLM, tmp_path: Path, batch: int) -> None:
    report = evaluate_longbench(model, BYTES, SAMPLES, tmp_path, batch=batch)
    for task, new_tokens in (("hotpotqa", 32), ("lcc", 64)):
        rows = rows_of(tmp_path / f"{task}.jsonl")
        room = 160 - new_tokens
        for row, sample in zip(rows, SAMPLES[task], strict=True):
            half = room // 2  # tokens, one of which is that of the beginning
            prompt, fits = sample.prompt, len(sample.prompt) < room
            expected = alone(model, prompt if fits else prompt[: half - 1] + prompt[-half:], new_tokens)
            assert row["pred"] == BYTES.decode(expected, skip_special_tokens=True)
            assert row["new_tokens"] == len(expected)
            assert row["truncated"] == (not fits)
            assert row["prompt_tokens"] == (1 + len(prompt) if fits else room)
            assert (row["id"], row["answers"], row["all_classes"]) == (sample.id, ["yes"], None)
        found = report["tasks"][task]
        assert (found["samples"], found["truncated"]) == (len(rows), sum(row["truncated"] for row in rows))
        assert found["prompt_tokens"] == pytest.approx(sum(row["prompt_tokens"] for row in rows) / len(rows))
    assert [report["tasks"][task]["metric"] for task in SAMPLES] == ["word_f1", "code_similarity"]


def test_scores_and_their_average(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Right answers are taken from a first run; in the second, half of one task's samples are right."""
    evaluate_longbench(model, BYTES, SAMPLES, tmp_path / "first")
    said = [row["pred"] for row in rows_of(tmp_path / "first" / "hotpotqa.jsonl")]
    right = [
        LongBenchSample(sample.id, sample.prompt, ("nothing", said[index] if index < 2 else "nothing"))
        for index, sample in enumerate(SAMPLES["hotpotqa"][:4])
    ]
    wrong = text_samples("def f(x):\n", answers=["\x00"])
    report = evaluate_longbench(model, BYTES, {"hotpotqa": right, "lcc": wrong}, tmp_path / "second")
    assert {name: task["score"] for name, task in report["tasks"].items()} == pytest.approx({"hotpotqa": 50, "lcc": 0})
    assert report["average"] == pytest.approx(25)


def test_times(model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that is read three times per batch: at the start, at the first token and at the end."""
    clock = iter([0.0, 1.0, 5.0, 10.0, 12.0, 20.0, 30.0, 36.0, 40.0])
    monkeypatch.setattr(module, "_now", lambda device: next(clock))
    found = evaluate_longbench(model, BYTES, {"hotpotqa": SAMPLES["hotpotqa"]}, tmp_path, batch=2)["tasks"]["hotpotqa"]
    assert found["first_token_seconds"] == 2.0  # the median of 1, 2 and 6
    tokens = sum(row["new_tokens"] - 1 for row in rows_of(tmp_path / "hotpotqa.jsonl"))
    assert found["tokens_per_second"] == pytest.approx(tokens / (4 + 8 + 4))
    assert found["peak_memory"] is None  # no GPU


@pytest.mark.gpu
def test_peak_memory(model: LlamaForCausalLM, tmp_path: Path) -> None:
    found = evaluate_longbench(model.cuda(), BYTES, SAMPLES, tmp_path, batch=2)["tasks"]["lcc"]
    try:
        weights = sum(parameter.nbytes for parameter in model.parameters())
        assert weights < found["peak_memory"] < 2**30
        assert found["tokens_per_second"] > 0
    finally:
        model.cpu()


def test_what_is_asked_of_generate(model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As officially: chat templates, but not for few-shot tasks and code; an end of line ends samsum's answers."""
    prompts, calls = [], []
    generate = model.generate

    def spy(**inputs: Any) -> torch.Tensor:
        prompts.append(CHAT.decode(inputs["input_ids"][0]))
        calls.append(inputs)
        return generate(**{**inputs, "max_new_tokens": 1})

    monkeypatch.setattr(model, "generate", spy)
    asked = {"qasper": text_samples("Why?"), "samsum": text_samples("Hi."), "lcc": text_samples("x =")}
    evaluate_longbench(model, CHAT, asked, tmp_path / "official")
    assert prompts == ["<s>[Why?]", "<s>Hi.", "<s>x ="]
    assert [call["max_new_tokens"] for call in calls] == [128, 128, 64]
    line = CHAT.convert_tokens_to_ids("Ċ")
    assert [call["eos_token_id"] for call in calls] == [[2], sorted([2, line]), [2]]
    assert [call["min_new_tokens"] for call in calls] == [None, 1, None]
    assert all(call["do_sample"] is False and call["num_beams"] == 1 for call in calls)
    prompts.clear()
    evaluate_longbench(model, CHAT, asked, tmp_path / "always", chat_template="always")
    assert prompts == ["<s>[Why?]", "<s>[Hi.]", "<s>[x =]"]
    prompts.clear()
    evaluate_longbench(model, CHAT, asked, tmp_path / "never", chat_template="never")
    evaluate_longbench(model, BYTES, asked, tmp_path / "none")
    assert prompts == ["<s>Why?", "<s>Hi.", "<s>x ="] * 2


def test_a_killed_run_continues(model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate_longbench(model, BYTES, SAMPLES, tmp_path / "whole", batch=2)
    generate, calls = model.generate, []

    def killed(**inputs: Any) -> torch.Tensor:
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(**inputs)

    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate_longbench(model, BYTES, SAMPLES, folder, batch=2)
        path = folder / "hotpotqa.jsonl"
        kept = rows_of(path)[:3]
        path.write_bytes(path.read_bytes()[:-5])  # in the middle of a line, and of a batch
        calls.clear()
        calls.extend([0] * 3)
        again = evaluate_longbench(model, BYTES, SAMPLES, folder, batch=2)
        assert calls[3:] == [2, 1, 2]
        assert rows_of(path)[:3] == kept  # times too
    timeless = ("metric", "score", "samples", "truncated", "prompt_tokens")
    for task in SAMPLES:
        found, expected = (rows_of(place / f"{task}.jsonl") for place in (folder, tmp_path / "whole"))
        assert [row["pred"] for row in found] == [row["pred"] for row in expected]
        assert [again["tasks"][task][key] for key in timeless] == [whole["tasks"][task][key] for key in timeless]
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", None)  # finished: nothing is generated, and the report is the same
        assert evaluate_longbench(model, BYTES, SAMPLES, folder, batch=2) == again


def test_another_run_is_not_continued(model: LlamaForCausalLM, tmp_path: Path) -> None:
    one = {"lcc": SAMPLES["lcc"][:1]}
    evaluate_longbench(model, BYTES, one, tmp_path)
    with pytest.raises(ValueError, match=r"lcc\.jsonl holds a run with other settings \(batch: 1 became 2\)"):
        evaluate_longbench(model, BYTES, one, tmp_path, batch=2)
    with pytest.raises(ValueError, match="samples: 1 became 2; samples_sha256"):
        evaluate_longbench(model, BYTES, SAMPLES, tmp_path)
    with pytest.raises(ValueError, match="tokenizer_sha256"):
        evaluate_longbench(model, CHAT, one, tmp_path)
    with patchattn.patched(model, "ssa"), pytest.raises(ValueError, match=r"patches: \[\] became .*'ssa'"):
        evaluate_longbench(model, BYTES, one, tmp_path)
    # the other tasks are refused before the first of them is run
    with pytest.raises(ValueError, match="lcc"):
        evaluate_longbench(model, BYTES, {"qasper": text_samples("x"), **one}, tmp_path, batch=2)
    assert not (tmp_path / "qasper.jsonl").exists()


def test_random_numbers_go_on_and_the_model_is_as_it_was(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    try:
        evaluate_longbench(model, BYTES, SAMPLES, tmp_path, limit=1)
        assert model.training
    finally:
        model.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert BYTES.padding_side == "right"
    assert [len(rows_of(tmp_path / f"{task}.jsonl")) for task in SAMPLES] == [1, 1]


@pytest.mark.parametrize(
    ("samples", "settings", "message"),
    [
        ({}, {}, "at least one task"),
        ({"lcc": []}, {}, "at least one sample"),
        ({"lc": SAMPLES["lcc"]}, {}, r"no task 'lc'.*lcc"),
        (
            {"gov_report": SAMPLES["lcc"]},
            {},
            "has 160 positions, of which gov_report needs 512 for the answer",
        ),
        ({"passage_count": SAMPLES["lcc"]}, {"chat_template": "always"}, "has no chat template"),
        ({"passage_retrieval_en": SAMPLES["lcc"]}, {}, "must name a paragraph"),
        ({"trec": SAMPLES["lcc"]}, {}, "trec needs classes"),
        (SAMPLES, {"max_length": 1}, "max_length"),
        (SAMPLES, {"bacth": 2}, "did you mean 'batch'"),
    ],
)
def test_what_a_run_needs(
    model: LlamaForCausalLM, tmp_path: Path, samples: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_longbench(model, BYTES, samples, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_what_model_and_tokenizer_need(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpadded = byte_tokenizer()
    unpadded.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        evaluate_longbench(model, unpadded, SAMPLES, tmp_path)
    with pytest.raises(TypeError, match=r"chat_template must be .*'official', 'always', 'never'.* got 'sometimes'"):
        evaluate_longbench(model, BYTES, SAMPLES, tmp_path, chat_template="sometimes")
    monkeypatch.setattr(model.config, "is_encoder_decoder", True)
    with pytest.raises(ValueError, match="LlamaForCausalLM has an encoder"):
        evaluate_longbench(model, BYTES, SAMPLES, tmp_path)


def test_longer_than_the_model_only_where_it_is_asked_for(model: LlamaForCausalLM, tmp_path: Path) -> None:
    found = evaluate_longbench(model, BYTES, {"hotpotqa": text_samples("y" * 300)}, tmp_path, max_length=200)
    assert found["tasks"]["hotpotqa"]["prompt_tokens"] == 200  # rotary positions go on


# Comparison


def test_plain_and_patched_in_one_report(model: LlamaForCausalLM, tmp_path: Path) -> None:
    plain = evaluate_longbench(model, BYTES, SAMPLES, tmp_path / "plain", batch=2)
    with pytest.raises(ValueError, match="expects a patched model"):
        compare_longbench(model, BYTES, SAMPLES, tmp_path / "out")
    with patchattn.patched(model, "moh", {"active_ratio": 0.5}):
        report = compare_longbench(model, BYTES, SAMPLES, tmp_path / "out", batch=2)
        assert patchattn.patch_info(model)["patches"]
        alone = evaluate_longbench(model, BYTES, SAMPLES, tmp_path / "alone", batch=2)
    assert report["patches"][0]["variant"] == "moh"
    for task in SAMPLES:
        for found, expected in ((report["unpatched"], plain), (report["patched"], alone)):
            assert found["tasks"][task]["score"] == expected["tasks"][task]["score"]
        change = alone["tasks"][task]["score"] - plain["tasks"][task]["score"]
        assert report["difference"]["tasks"][task] == pytest.approx(change)
        said = [rows_of(tmp_path / "out" / run / f"{task}.jsonl") for run in ("unpatched", "patched")]
        assert [row["pred"] for row in said[0]] != [row["pred"] for row in said[1]]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / "out" / "report.md").read_text() == longbench_table(report)


def test_the_table() -> None:
    def run(score: float, memory: int | None) -> dict[str, Any]:
        row = {"metric": "word_f1", "score": score, "samples": 3, "first_token_seconds": 0.25, "peak_memory": memory}
        return {"average": score, "tasks": {"qasper": {**row, "tokens_per_second": None if memory else 12.34}}}

    report = {
        "unpatched": run(40.0, 2**31),
        "patched": run(42.125, None),
        "difference": {"average": 2.125, "tasks": {"qasper": 2.125}},
    }
    lines = longbench_table(report).splitlines()
    assert lines[2] == "| qasper | word_f1 | 3 | 40.00 | 42.12 | +2.12 | 0.250 / 0.250 | - / 12.3 | 2.00 / - |"
    assert lines[3] == "| average | | | 40.00 | 42.12 | +2.12 | | | |"
    assert {line.count("|") for line in lines} == {10}


def test_a_real_model_on_real_prompts(data_dir: Path, tmp_path: Path) -> None:
    """A check of the machinery: 512 tokens are too few to answer anything."""
    folder = data_dir / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    samples = load_longbench(["hotpotqa", "passage_retrieval_en"], data_dir / "longbench" / "mini")
    neutral = patchattn.variant_info("ssa").variant.neutral_config()
    with patchattn.patched(model, "ssa", neutral):
        report = compare_longbench(model, tokenizer, samples, tmp_path, batch=2, limit=2)
    assert report["difference"]["average"] == 0
    for run in ("unpatched", "patched"):
        for row in report[run]["tasks"].values():
            assert (row["samples"], row["truncated"]) == (2, 2)
            assert 470 <= row["prompt_tokens"] <= 512 - 32
            assert row["first_token_seconds"] > 0
            assert math.isfinite(row["tokens_per_second"])
