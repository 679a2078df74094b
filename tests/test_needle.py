"""Needle in a haystack: prompts to the token, where needles come to stand, scores and the grid."""

import json
import math
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from patchattn.evaluation.tasks.figures import plot_needle
from patchattn.evaluation.tasks.haystack import filler, read_texts, sentences
from patchattn.evaluation.tasks.needle import NeedleGrid, NeedleTask, needle_grid

from .long_context import BYTES, BYTES_CHAT, CHAT, Reader, byte_tokenizer, tiny_llama

NEEDLE = "The spare key of the observatory lies in a blue teapot on the third shelf."
QUESTION = "Where does the spare key of the observatory lie? Answer with what the text says and nothing else."
HEAD = "<s>Read the text below. A question about one of its sentences follows it.\n\n"


def tokenizers(data: Path) -> dict[str, Any]:
    """Of four kinds: byte-level BPE, WordPiece, BPE of sentencepiece with and without a token of the beginning."""
    return {
        "gpt2": GPT2Tokenizer(str(data / "tokenizers/gpt2/vocab.json"), str(data / "tokenizers/gpt2/merges.txt")),
        "bert": BertTokenizer(str(data / "tokenizers/bert-base-uncased/vocab.txt")),
        "llama": AutoTokenizer.from_pretrained(data / "tokenizers/llama"),
        "stories260K": AutoTokenizer.from_pretrained(data / "models/stories260K"),
    }


def parts(task: NeedleTask, index: int, chat: bool = False) -> tuple[str, str]:
    """What stands before and behind the needle in the text of a prompt of bytes."""
    prompt = BYTES.decode(task.prompt(BYTES_CHAT if chat else BYTES, index).tokens)
    head = HEAD.replace("<s>", "<s><user>") if chat else HEAD
    tail = f"\n\n{QUESTION}{'<model>' if chat else chr(10)}Answer:"
    assert prompt.startswith(head)
    assert prompt.endswith(tail)
    before, behind = prompt[len(head) : -len(tail)].split(f" {NEEDLE}")
    return before, behind


@settings(max_examples=25, deadline=None)
@given(st.integers(400, 1500), st.floats(0, 100), st.integers(0, 5), st.booleans())
def test_prompts_of_bytes(tmp_path_factory, length: int, depth: float, seed: int, chat: bool) -> None:
    """As long as asked; the text ends with a sentence; the needle is at the sentence end nearest to its depth."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text('It rained.\n\nNobody   came! "Why?" asked A b. C d?')
    task = NeedleTask(lengths=[length], depths=[depth], seed=seed, data=str(path))
    prompt = task.prompt(BYTES_CHAT if chat else BYTES, 0)
    assert len(prompt.tokens) == length
    before, behind = parts(task, 0, chat)
    filling = before + behind
    pieces = [" It rained.", " Nobody came!", ' "Why?"', " asked A b.", " C d?"] * 60
    begin = "".join(pieces).index(filling)  # longer than the text, so that it is found at one place of it
    places = [end - begin for end in accumulate(map(len, pieces))]
    assert len(filling) in places
    ends = [0, *(place for place in places if 0 < place <= len(filling))]
    assert len(before) in ends
    wanted = len(filling) * depth / 100
    assert abs(len(before) - wanted) == pytest.approx(min(abs(end - wanted) for end in ends))
    assert prompt.depths == pytest.approx([100 * len(before) / len(filling)])


def test_every_prompt_is_another_and_the_same_again() -> None:
    task = NeedleTask(lengths=[400, 500], depths=[0, 40, 100], repeats=2)
    prompts = [task.prompt(BYTES, index).tokens for index in range(len(task))]
    assert [len(tokens) for tokens in prompts] == [400] * 6 + [500] * 6
    assert len({tuple(tokens) for tokens in prompts}) == 12
    again = NeedleTask(lengths=[400, 500], depths=[0, 40, 100], repeats=2)
    assert [again.prompt(BYTES, index).tokens for index in (7, 0)] == [prompts[7], prompts[0]]
    assert NeedleTask(lengths=[400], seed=1).prompt(BYTES, 0).tokens != prompts[0]
    cells = [(task.sample(index).length, task.sample(index).fields["depth"]) for index in range(len(task))]
    assert cells == [(length, depth) for length in (400, 500) for depth in (0, 40, 100) for _ in range(2)]


def test_generated_text() -> None:
    assert filler(3) == filler(3) != filler(4)
    found = sentences(filler(0))
    assert len(found) > 1000
    assert all(sentence.startswith(" ") and sentence.endswith(".") and sentence.count(".") == 1 for sentence in found)
    assert not any(word in filler(0).lower() for word in ("teapot", "shelf", "observatory"))


def test_where_sentences_end() -> None:
    text = 'One.  Two!\n\n"Three?" (Four.) Of 3.5 km five\u3002Six\uff01'
    expected = [" One.", " Two!", ' "Three?"', " (Four.)", " Of 3.5 km five\u3002", "Six\uff01"]
    assert sentences(text) == expected
    assert sentences("no end") == [" no end"]


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "stories260K"])
def test_real_tokenizers(data_dir: Path, name: str) -> None:
    """Exact lengths of essays, also with a chat template; and the tokens that the whole text has, but at the cut."""
    tokenizer = tokenizers(data_dir)[name]
    task = NeedleTask(lengths=[301, 900, 2500], depths=[0, 33, 100], data=str(data_dir / "needle/PaulGrahamEssays"))
    for index in range(len(task)):
        assert len(task.prompt(tokenizer, index).tokens) == task.sample(index).length
    tokens = task.prompt(tokenizer, 4).tokens
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert (NEEDLE.lower() if name == "bert" else NEEDLE) in text
    if name != "bert":  # which writes neither capitals nor line breaks
        assert abs(len(tokenizer(text)["input_ids"]) - len(tokens)) <= 2  # at the cut
    tokenizer.chat_template = CHAT.replace("{{ bos_token }}", "")
    assert len(NeedleTask(lengths=[333]).prompt(tokenizer, 0).tokens) == 333


def test_chinese_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\u4e0b\u96e8\u4e86\u3002\u6ca1\u6709\u4eba\u6765\u3002abc\u3002" * 9, encoding="utf-8")
    task = NeedleTask(lengths=[500], depths=[50], data=str(path))
    prompt = task.prompt(BYTES, 0)
    assert len(prompt.tokens) == 500
    text = BYTES.decode(prompt.tokens)
    assert f"\u3002 {NEEDLE}" in text
    assert "\u6765\u3002abc\u3002\u4e0b" in text


def test_a_chat_template_is_used_or_not() -> None:
    def text(choice: str, tokenizer: Any) -> str:
        return BYTES.decode(NeedleTask(lengths=[400], chat_template=choice).prompt(tokenizer, 0).tokens)

    assert text("auto", BYTES_CHAT) == text("always", BYTES_CHAT)
    assert text("auto", BYTES_CHAT).startswith("<s><user>Read")
    assert text("never", BYTES_CHAT) == text("auto", BYTES)
    assert "<model>" not in text("never", BYTES_CHAT)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        text("always", BYTES)
    with pytest.raises(ValueError, match="does not hold the user's message once"):
        text("auto", byte_tokenizer("{{ messages[0]['content'] }}{{ messages[0]['content'] }}"))


def test_a_model_that_sees_the_end_of_its_prompt() -> None:
    """It finds the needle at 100 %, and never at 0 %; the other half of the answer is not asked for."""
    task = NeedleTask(lengths=[600, 900], depths=[100, 0], repeats=2)
    model = Reader("a (blue teapot) on", sight=400)
    task.check_model(model, BYTES)
    rows = [row for start in (0, 3, 6) for row in task.answer(model, BYTES, range(start, min(start + 3, 8)))]
    assert json.loads(json.dumps(rows)) == rows
    assert [row["pred"] for row in rows] == ["blue teapot", "blue teapot", "", ""] * 2
    assert [row["prompt_tokens"] for row in rows] == [600] * 4 + [900] * 4
    assert {"first_token_seconds", "seconds", "new_tokens"} <= rows[0].keys()
    assert task.score(rows) == {"recall": 25.0, "recall@600": 25.0, "recall@900": 25.0}
    assert needle_grid(rows) == NeedleGrid([600, 900], [0, 100], [[0.0, 0.0], [50.0, 50.0]])
    assert task.main_score in task.score(rows)


def test_grid_of_hand_made_rows() -> None:
    """Letters of either case; the mean over repeats; nan where nothing was asked."""
    expected = ["Blue Teapot", "third shelf"]
    rows = [
        {"length": 20, "depth": 50, "expected": expected, "pred": "on the THIRD SHELF in a blue teapot"},
        {"length": 20, "depth": 50, "expected": expected, "pred": "third-shelf"},
        {"length": 10, "depth": 0, "expected": expected, "pred": "the blue teapot"},
    ]
    grid = needle_grid(rows)
    assert (grid.lengths, grid.depths) == ([10, 20], [0, 50])
    assert (grid.scores[0][0], grid.scores[1][1]) == (50.0, 50.0)
    assert math.isnan(grid.scores[0][1])
    assert math.isnan(grid.scores[1][0])
    with pytest.raises(ValueError, match="no rows"):
        needle_grid([])


def test_stories260k_can_be_asked(data_dir: Path) -> None:
    """The machinery, not the model, which was made for stories alone."""
    folder = data_dir / "models/stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    task = NeedleTask(lengths=[300, 400], depths=[0, 100], max_new_tokens=3)
    task.check_model(model, tokenizer)
    rows = task.answer(model, tokenizer, range(4))
    assert [row["prompt_tokens"] for row in rows] == [300, 300, 400, 400]
    assert task.score(rows).keys() == {"recall", "recall@300", "recall@400"}


def test_another_needle(tmp_path: Path) -> None:
    task = NeedleTask(needle="It is 7 now.", question="What time is it?", answers=["7"], lengths=[300], depths=[20])
    (row,) = task.answer(Reader(r"It is (\d)"), BYTES, [0])
    assert task.score([row])["recall"] == 100
    assert "What time is it?" in BYTES.decode(task.prompt(BYTES, 0).tokens)


def test_identity(tmp_path: Path) -> None:
    """The same text at another place is the same task."""
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for path, text in zip(files, ("One. Two.", "One. Two.", "Three."), strict=True):
        path.write_text(text)
    found = [json.dumps(NeedleTask(data=str(path)).identity()) for path in files]
    assert found[0] == found[1] != found[2]
    assert json.dumps(NeedleTask(seed=1, data=str(files[0])).identity()) != found[0]


def test_texts_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("\ufefffirst", encoding="utf-8")
    (tmp_path / "c.md").write_text("no")
    assert read_texts(str(tmp_path)) == "first\n\nsecond"
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_texts(str(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"lengths": []}, ValueError, "lengths must hold at least one value"),
        ({"lengths": [5, 5]}, ValueError, "none twice"),
        ({"lengths": [0]}, ValueError, "lengths must lie between 1"),
        ({"lengths": "400"}, TypeError, "lengths must be"),
        ({"depths": [101]}, ValueError, "depths must lie between 0 and 100"),
        ({"depths": [1, 1]}, ValueError, "none twice"),
        ({"depth": [1]}, ValueError, "did you mean 'depths'"),
        ({"answers": ["gold"]}, ValueError, "does not hold the answer 'gold'"),
        ({"answers": [""]}, ValueError, "not empty"),
        ({"question": " "}, ValueError, "not empty"),
        ({"chat_template": "maybe"}, TypeError, "chat_template"),
        ({"data": "no/such/file.txt"}, ValueError, "There is no text in 'no/such/file.txt'"),
    ],
)
def test_what_is_refused(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NeedleTask(**wrong)


def test_texts_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no text in"):
        NeedleTask(data=str(tmp_path))
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        NeedleTask(data=str(tmp_path))


def test_models_that_are_refused() -> None:
    """Too short a prompt, no padding token, a table of positions that is too short; rotary ones may be passed."""
    with pytest.raises(ValueError, match=r"Prompts of 90 tokens are too short: without any text they have 2\d\d"):
        NeedleTask(lengths=[400, 90]).check_model(tiny_llama(), BYTES)
    NeedleTask(lengths=[400]).check_model(tiny_llama(max_position_embeddings=64), BYTES)
    task = NeedleTask(lengths=[400], max_new_tokens=20)
    small = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 300}
    task.check_model(GPT2LMHeadModel(GPT2Config(n_positions=420, **small)), BYTES)
    with pytest.raises(ValueError, match=r"has a table of 419 positions \(transformer.wpe\), and the task needs 420"):
        task.check_model(GPT2LMHeadModel(GPT2Config(n_positions=419, **small)), BYTES)
    blind = byte_tokenizer()
    blind.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        task.check_model(tiny_llama(), blind)


def test_a_heat_map(tmp_path: Path) -> None:
    grid = NeedleGrid([512, 1024], [0, 50, 100], [[100.0, 0.0], [math.nan, 25.0], [75.0, 50.0]])
    figure = plot_needle({"unpatched": grid, "moh": grid}, title="Found")
    assert figure.get_suptitle() == "Found"
    left, right, bar = figure.axes
    assert (left.get_title(), right.get_title()) == ("unpatched", "moh")
    assert (left.get_xlabel(), left.get_ylabel()) == (
        "length of the prompt, tokens",
        "depth of the needle, % of the text",
    )
    assert "%" in bar.get_ylabel()
    assert [text.get_text() for text in left.texts] == ["100", "0", "25", "75", "50"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["512", "1024"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["0", "50", "100"]
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, 100)
    figure.savefig(tmp_path / "needle.png")
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_needle({})
