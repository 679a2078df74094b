"""LongBench as tasks: prompts cut and templated, answers, scores, and what is refused."""

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
from patchattn.evaluation.tasks.generation import fit_prompt
from patchattn.evaluation.tasks.longbench import LongBenchEval
from patchattn.evaluation.tasks.longbench_data import LongBenchSample

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


def asked(task: str, **settings: Any) -> LongBenchEval:
    return LongBenchEval(task, SAMPLES.get(task, []), **settings)


def alone(model: LlamaForCausalLM, prompt: str, new_tokens: int) -> list[int]:
    tokens = BYTES(prompt, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(tokens)
    made = model.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    return made[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize(("task", "new_tokens"), [("hotpotqa", 32), ("lcc", 64)])
def test_answers_are_those_of_one_prompt_at_a_time(model: LlamaForCausalLM, task: str, new_tokens: int) -> None:
    samples = SAMPLES[task]
    rows = asked(task).answer(model, BYTES, range(len(samples)))
    room = 160 - new_tokens
    for row, sample in zip(rows, samples, strict=True):
        half = room // 2  # tokens, one of which is that of the beginning
        prompt, fits = sample.prompt, len(sample.prompt) < room
        expected = alone(model, prompt if fits else prompt[: half - 1] + prompt[-half:], new_tokens)
        assert row["pred"] == BYTES.decode(expected, skip_special_tokens=True)
        assert row["new_tokens"] == len(expected)
        assert row["truncated"] == (not fits)
        assert row["prompt_tokens"] == (1 + len(prompt) if fits else room)
        assert (row["id"], row["answers"], row["all_classes"]) == (sample.id, ["yes"], None)
        assert 0 < row["first_token_seconds"] < row["seconds"]


def test_scores() -> None:
    """Half of the answers are right, and one of four prompts was truncated."""
    task = asked("hotpotqa")
    rows = [
        {"pred": pred, "answers": ["nothing", "it was Bob"], "all_classes": None, "truncated": cut}
        for pred, cut in (("It was Bob.", True), ("Alice", False), ("nothing", False), ("", False))
    ]
    assert task.main_score == "word_f1"
    assert task.score(rows) == pytest.approx({"word_f1": 50.0, "truncated": 25.0})


def test_what_is_asked_of_generate(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As officially: chat templates, but not for few-shot tasks and code; an end of line ends samsum's answers."""
    prompts, calls = [], []
    generate = model.generate

    def spy(**inputs: Any) -> torch.Tensor:
        prompts.append(CHAT.decode(inputs["input_ids"][0]))
        calls.append(inputs)
        return generate(**{**inputs, "max_new_tokens": 1})

    monkeypatch.setattr(model, "generate", spy)

    def ask(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> list[str]:
        prompts.clear()
        for task, prompt in (("qasper", "Why?"), ("samsum", "Hi."), ("lcc", "x =")):
            LongBenchEval(task, text_samples(prompt), **settings).answer(model, tokenizer, [0])
        return list(prompts)

    assert ask(CHAT) == ["<s>[Why?]", "<s>Hi.", "<s>x ="]
    assert [call["max_new_tokens"] for call in calls] == [128, 128, 64]
    line = CHAT.convert_tokens_to_ids("Ċ")
    assert [call["eos_token_id"] for call in calls] == [[2], sorted([2, line]), [2]]
    assert [call["min_new_tokens"] for call in calls] == [None, 1, None]
    assert all(call["do_sample"] is False and call["num_beams"] == 1 for call in calls)
    assert ask(CHAT, chat_template="always") == ["<s>[Why?]", "<s>[Hi.]", "<s>[x =]"]
    assert ask(CHAT, chat_template="never") == ask(BYTES) == ["<s>Why?", "<s>Hi.", "<s>x ="]


# What is refused


@pytest.mark.parametrize(
    ("task", "samples", "settings", "message"),
    [
        ("lcc", [], {}, "at least one sample"),
        ("lc", SAMPLES["lcc"], {}, r"no task 'lc'.*lcc"),
        ("passage_retrieval_en", SAMPLES["lcc"], {}, "must name a paragraph"),
        ("trec", SAMPLES["lcc"], {}, "trec needs classes"),
        ("lcc", SAMPLES["lcc"], {"max_length": 1}, "max_length"),
        ("lcc", SAMPLES["lcc"], {"max_lenght": 2}, "did you mean 'max_length'"),
        ("lcc", None, {"data": "nowhere"}, "nowhere"),
    ],
)
def test_what_a_task_needs(task: str, samples: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongBenchEval(task, samples, **settings)


def test_what_model_and_tokenizer_need(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked("lcc").check_model(model, BYTES)
    with pytest.raises(ValueError, match="has 160 positions, of which longbench/gov_report needs 512 for the answer"):
        LongBenchEval("gov_report", SAMPLES["lcc"]).check_model(model, BYTES)
    LongBenchEval("gov_report", SAMPLES["lcc"], max_length=200).check_model(model, BYTES)
    with pytest.raises(ValueError, match="has no chat template"):
        asked("lcc", chat_template="always").check_model(model, BYTES)
    unpadded = byte_tokenizer()
    unpadded.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        asked("lcc").check_model(model, unpadded)
    with pytest.raises(TypeError, match=r"chat_template must be .*'official', 'always', 'never'.* got 'sometimes'"):
        asked("lcc", chat_template="sometimes")
    monkeypatch.setattr(model.config, "is_encoder_decoder", True)
    with pytest.raises(ValueError, match="LlamaForCausalLM has an encoder"):
        asked("lcc").check_model(model, BYTES)


def test_longer_than_the_model_only_where_it_is_asked_for(model: LlamaForCausalLM) -> None:
    (row,) = LongBenchEval("hotpotqa", text_samples("y" * 300), max_length=200).answer(model, BYTES, [0])
    assert row["prompt_tokens"] == 200  # rotary positions go on


def test_the_identity_is_that_of_the_samples() -> None:
    one = asked("lcc").identity()
    assert asked("lcc").identity() == one
    assert LongBenchEval("lcc", text_samples("def f(x):\n", "for j in")).identity() != one
    assert asked("lcc", max_length=100).identity() != one


def test_a_real_model_on_real_prompts(data_dir: Path) -> None:
    """A check of the machinery: 512 tokens are too few to answer anything."""
    folder = data_dir / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    task = LongBenchEval("passage_retrieval_en", data=str(data_dir / "longbench" / "mini"))
    task.check_model(model, tokenizer)
    for row in task.answer(model, tokenizer, [0, 1]):
        assert row["truncated"]
        assert 470 <= row["prompt_tokens"] <= 512 - 32


def test_what_the_kv_cache_takes_up_is_told(model: LlamaForCausalLM) -> None:
    """Of the unpatched model all keys of all tokens; a model that forgets stores less."""
    task = asked("lcc")
    rows = {None: task.answer(model, BYTES, [0])[0]}
    with patchattn.patched(model, "streaming_llm", sinks=1, recent=7, slack=0):
        rows["streaming_llm"] = task.answer(model, BYTES, [0])[0]
    config, plain, forgetful = model.config, rows[None], rows["streaming_llm"]
    size = config.num_hidden_layers * config.num_key_value_heads * 2 * config.head_dim * model.dtype.itemsize
    assert plain["cache_bytes"] == plain["cache_dense_bytes"]
    assert plain["cache_bytes"] == (plain["prompt_tokens"] + plain["new_tokens"] - 1) * size
    assert forgetful["cache_dense_bytes"] == (forgetful["prompt_tokens"] + forgetful["new_tokens"] - 1) * size
    index = 4 * config.num_hidden_layers
    assert forgetful["cache_bytes"] == 8 * (size + index)
