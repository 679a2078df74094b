"""Choice scores against loops over single tokens, one text at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from patchattn.evaluation.tasks.likelihood import accuracy, prepare_choices, read_choices, score_choices

from .families import FAMILIES


class Letters:
    """A tokenizer of one token per letter, but for pairs that it merges; 1 starts every text."""

    def __init__(self, merges: tuple[str, ...] = (), start: bool = True) -> None:
        self.merges, self.start = merges, start

    def __call__(self, text: str) -> dict[str, list[int]]:
        ids, i = [1] if self.start else [], 0
        while i < len(text):
            pair = text[i : i + 2]
            ids.append(50 + self.merges.index(pair) if pair in self.merges else 3 + ord(text[i]) % 40)
            i += 2 if pair in self.merges else 1
        return {"input_ids": ids}


PROMPTS = ["what is a", "b", "some longer text", "what is a"]
CHOICES = [[" dog", " cat", "x"], ["c", "de"], [" yes", " no"], [" dog", " dig"]]


def loop(model: nn.Module, ids: list[int], start: int) -> float:
    total = 0.0
    with torch.no_grad():
        for i in range(start, len(ids)):
            total += float(model(torch.tensor([ids[:i]])).logits[0, -1].double().log_softmax(-1)[ids[i]])
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("normalise", ["none", "tokens", "characters"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_equal_a_loop(family: str, normalise: Any, batch_size: int) -> None:
    model, tokenizer = FAMILIES[family].make_exact(), Letters()
    found = score_choices(model, tokenizer, PROMPTS, CHOICES, normalise=normalise, batch_size=batch_size)
    for prompt, choices, scores in zip(PROMPTS, CHOICES, found, strict=True):
        for choice, score in zip(choices, scores, strict=True):
            ids = tokenizer(prompt + choice)["input_ids"]
            by = {"none": 1, "tokens": len(choice), "characters": len(choice)}[normalise]
            assert float(score) == pytest.approx(loop(model, ids, len(prompt) + 1) / by, rel=1e-9)


def test_a_token_across_the_boundary_is_scored_whole_for_every_choice() -> None:
    model, tokenizer = FAMILIES["llama"].make_exact(), Letters(merges=("ad",))
    (scores,) = score_choices(model, tokenizer, ["a a"], [["d", "x"]])
    for choice, score in zip("dx", scores, strict=True):
        ids = tokenizer("a a" + choice)["input_ids"]
        assert float(score) == pytest.approx(loop(model, ids, 3), rel=1e-9)  # behind the start, "a" and " "


def test_choices_of_one_token_share_a_row() -> None:
    model = FAMILIES["llama"].make()
    (batch,) = prepare_choices(model, Letters(), ["is it", "is it"], [["a", "b", "c"], ["de", "b"]])
    assert batch.inputs["input_ids"].shape[0] == 2


def test_accuracy() -> None:
    assert accuracy([torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0])], [1, 1]) == 0.5


@pytest.mark.parametrize(
    ("prompts", "choices", "settings", "message"),
    [
        (["a"], [], {}, "Every prompt"),
        (["a"], [["b", ""]], {}, "not empty"),
        (["a"], [[]], {}, "not empty"),
        (["a"], [["b"]], {"normalise": "words"}, "normalise"),
        (["a"], [["b"]], {"batch_size": 0}, "batch_size"),
    ],
)
def test_mistakes(prompts: Any, choices: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_choices(FAMILIES["llama"].make(), Letters(), prompts, choices, **settings)


def test_a_first_token_needs_one_before_it() -> None:
    with pytest.raises(ValueError, match="Nothing comes before"):
        score_choices(FAMILIES["llama"].make(), Letters(start=False), [""], [["a", "b"]])


def test_read_choices(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = {"prompt": "p", "choices": ["a", "b"], "label": 1}
    path.write_text(json.dumps(good) + "\n\n")
    (example,) = read_choices(path)
    assert (example.prompt, example.choices, example.label) == ("p", ("a", "b"), 1)
    for bad, message in [
        ("{", "line 2: not valid JSON"),
        ("[]", "must have prompt"),
        (json.dumps({**good, "label": 2}), "label must be 0 to 1"),
        (json.dumps({**good, "label": True}), "label must be 0 to 1"),
        (json.dumps({**good, "choices": ["a"]}), "two or more"),
        (json.dumps({**good, "prompt": 3}), "prompt must be a text"),
    ]:
        path.write_text(json.dumps(good) + "\n" + bad)
        with pytest.raises(ValueError, match=message):
            read_choices(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no example"):
        read_choices(path)
    with pytest.raises(ValueError, match="no file"):
        read_choices(tmp_path / "other")


def test_a_real_tokenizer(data_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = data_dir / "models" / "stories260K"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).double().eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    prompt, choices = "Once upon a time, there was a little", [" girl", " purple engine", "r"]
    (scores,) = score_choices(model, tokenizer, [prompt], [choices])
    texts = [tokenizer(prompt + choice)["input_ids"] for choice in choices]
    start = min(len([1 for a, b in zip(t, tokenizer(prompt)["input_ids"], strict=False) if a == b]) for t in texts)
    for ids, score in zip(texts, scores, strict=True):
        assert float(score) == pytest.approx(loop(model, ids, start), rel=1e-6)
    assert int(scores.argmax()) == 0
