"""The head search against a loop over all heads, each on the whole model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import patchattn
from patchattn.calibration.replay import Replay
from patchattn.calibration.search import HeadSearch, find_heads
from patchattn.cli import main as cli
from patchattn.core.heads import HeadList
from patchattn.evaluation.tasks.likelihood import ChoiceExample, accuracy, score_choices

from .test_likelihood import Letters

SETTINGS = {"alpha": 1.0, "beta": 0.0, "keep_first": False}


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return sharpened(LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return sharpened(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=5, n_head=4, vocab_size=64, n_positions=64)))


def sharpened(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def data(count: int = 20) -> list[ChoiceExample]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(count):
        letters = "".join(chr(97 + int(x)) for x in torch.randint(26, (16,), generator=generator))
        prompt = letters[: int(torch.randint(4, 13, (1,), generator=generator))]
        examples.append(
            ChoiceExample(prompt, (letters[13], letters[14:], "?"), int(torch.randint(3, (1,), generator=generator)))
        )
    return examples


def score(model: nn.Module, examples: list[ChoiceExample], metric: str) -> float:
    scores = score_choices(model, Letters(), [e.prompt for e in examples], [e.choices for e in examples])
    if metric == "accuracy":
        return accuracy(scores, [e.label for e in examples])
    return sum(float(s.log_softmax(-1)[e.label]) for s, e in zip(scores, examples, strict=True)) / len(examples)


def alone(model: nn.Module, examples: list[ChoiceExample], heads: Any, metric: str) -> float:
    with patchattn.patched(model, "act", **SETTINGS, heads=heads):
        return score(model, examples, metric)


def search(model: nn.Module, examples: list[ChoiceExample], **how: Any) -> HeadSearch:
    return find_heads(model, Letters(), examples, settings=SETTINGS, **how)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_run_from_a_layer_equals_the_whole_run(make: Any) -> None:
    model = make()
    batches = [{"input_ids": torch.randint(3, 60, (2, length))} for length in (5, 8)]
    expected = [model(**batch).logits for batch in batches]
    layers = [module for _, module in model.named_modules()]
    site = patchattn.find_sites(model)[0]
    replay = Replay(model, site, batches)
    calls: list[int] = []
    for index, other in enumerate(patchattn.find_sites(model)):
        model.get_submodule(other.name).register_forward_hook(lambda *_, index=index: calls.append(index))
    for layer in range(5):
        replay.advance(layer)
        calls.clear()
        for index, wanted in enumerate(expected):
            with replay.below(index) as inputs, torch.no_grad():
                torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)
        assert calls == [*range(layer, 5)] * 2
    assert [module for _, module in model.named_modules()] == layers


@pytest.mark.parametrize("metric", ["accuracy", "likelihood"])
def test_every_head_alone(metric: str) -> None:
    model, examples = llama(), data()
    found = search(model, examples, group_size=1, metric=metric, batch_size=5)
    baseline = score(model, examples, metric)
    expected = {}
    for layer in (2, 3):
        for head in range(4):
            gain = alone(model, examples, {layer: [head]}, metric) - baseline
            if gain > 0:
                expected[layer, head] = gain
    assert found.gains == pytest.approx(expected, abs=1e-6)
    assert 0 < len(expected) < 8
    assert found.baseline == pytest.approx(baseline, abs=1e-6)
    assert found.together == pytest.approx(alone(model, examples, list(expected), metric), abs=1e-6)
    assert found.runs == 8 + 2
    assert not hasattr(model.model.layers[2].self_attn, "patchattn")


def test_groups_that_help_are_halved_and_others_dropped() -> None:
    model, examples = llama(), data()
    found = search(model, examples, group_size=4, metric="likelihood", layers=[1, 2, 3])
    baseline = score(model, examples, "likelihood")
    expected, runs = {}, 0
    for layer in (1, 2, 3):
        groups = [[0, 1, 2, 3]]
        while groups:
            group = groups.pop()
            gain = alone(model, examples, {layer: group}, "likelihood") - baseline
            runs += 1
            if gain > 0 and len(group) > 1:
                groups += [group[: len(group) // 2], group[len(group) // 2 :]]
            elif gain > 0:
                expected[layer, group[0]] = gain
    assert found.gains == pytest.approx(expected, abs=1e-6)
    assert found.runs == runs + 2
    assert expected


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    model, examples, state = llama(), data(), tmp_path / "state"
    whole = search(model, examples, group_size=2, metric="likelihood")
    calls = 0

    def kill(done: int, known: int, found: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, examples, group_size=2, metric="likelihood", state=state, progress=kill)
    measured = len(json.loads(state.read_text())["scores"])
    assert measured == 4  # and the baseline
    assert not hasattr(model.model.layers[2].self_attn, "patchattn")
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    last = model.model.layers[4].register_forward_hook(count)
    again = search(model, examples, group_size=2, metric="likelihood", state=state, batch_size=8)
    last.remove()
    assert again == whole
    batches = -(-forwards // (whole.runs - measured))
    assert forwards == batches * (whole.runs - measured)  # only what was left
    with pytest.raises(ValueError, match="other data, settings or model"):
        search(model, examples[1:], group_size=2, metric="likelihood", state=state)
    with pytest.raises(ValueError, match="other data, settings or model"):
        search(llama(seed=1), examples, group_size=2, metric="likelihood", state=state)
    state.write_text("{")
    with pytest.raises(ValueError, match="no state"):
        search(model, examples, state=state)


def test_a_search_that_keeps_no_head_is_over(tmp_path: Path) -> None:
    """What it measured is of no use any more, and must not stand in the way of the next model."""
    examples, state = data(), tmp_path / "heads.json.state"
    with pytest.raises(ValueError, match="No head raises the accuracy"):
        search(llama(), examples, group_size=4, min_gain=1.0, state=state)
    assert not state.exists()
    assert search(llama(seed=1), examples, metric="likelihood", state=state).gains


def test_a_run_that_cannot_win_is_ended() -> None:
    model, examples = llama(), data()
    baseline = score(model, examples, "accuracy")
    forwards = []
    model.model.layers[4].register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match="No head raises the accuracy"):
        search(model, examples, group_size=1, min_gain=1.0 - baseline, batch_size=4)
    complete = len(forwards)
    forwards.clear()
    search(model, examples, group_size=1, metric="likelihood", batch_size=4)
    assert complete < len(forwards) / 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"metric": "f1"}, "metric"),
        ({"group_size": 0}, "group_size"),
        ({"settings": {"heads": {1: [0]}}}, "what is searched"),
        ({"settings": {"betta": 1}}, "betta"),
        ({"layers": [9]}, "9"),
    ],
    ids=str,
)
def test_mistakes(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_heads(llama(), Letters(), data(3), **how)


def test_models_that_cannot_be_searched() -> None:
    with pytest.raises(ValueError, match="unpatched model in evaluation mode"):
        find_heads(patchattn.patch_model(llama(), "act"), Letters(), data(3))
    with pytest.raises(ValueError, match="unpatched model in evaluation mode"):
        find_heads(llama().train(), Letters(), data(3))
    with pytest.raises(ValueError, match="no example"):
        find_heads(llama(), Letters(), [])


def test_the_command_writes_a_list_that_patch_model_reads(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = data_dir / "models" / "stories260K", tmp_path / "heads.json"
    questions = [
        ("Once upon a time, there was a little", [" girl", " of"], 0),
        ("Lily liked to play with her", [" the", " toys"], 1),
        ("The dog was very", [" happy", " day"], 0),
        ("Tom and his mom went to the", [" said", " park"], 0),
    ]
    lines = [json.dumps({"prompt": p, "choices": c, "label": i}) for p, c, i in questions]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    arguments = ["calibrate", "act", str(folder), "--data", str(tmp_path / "data.jsonl"), "--output", str(output)]
    arguments += ["--metric", "likelihood", "--set", "alpha=2.0", "--group-size", "2"]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert not ended.value.code
    assert "heads kept after" in capsys.readouterr().out
    assert not output.with_name("heads.json.state").exists()
    written = json.loads(output.read_text())
    assert written["base"] == {"model_type": "llama", "layers": 5, "heads": 8, "name": "stories260K"}
    assert written["calibration"]["examples"] == 4
    model = LlamaForCausalLM.from_pretrained(folder)
    patchattn.patch_model(model, "act", alpha=2.0, heads=str(output))
    active = {i for i, layer in enumerate(model.model.layers) if layer.self_attn.patchattn.active}
    assert active == set(HeadList.parse(str(output)).heads) <= {2, 3}
    with pytest.raises(ValueError, match="for stories260K, llama of 5 layers with 8 heads"):
        patchattn.patch_model(llama(), "act", heads=str(output))


@pytest.mark.parametrize(
    "model_class", [BertModel, BertForMaskedLM, BertForSequenceClassification], ids=lambda c: c.__name__
)
def test_a_model_without_a_causal_head_is_refused(
    model_class: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`AutoModelForCausalLM` would load it, with a head made up or for another task."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model_class(BertConfig(**sizes, vocab_size=64)).save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "choices": ["b", "c"], "label": 0}))
    with pytest.raises(SystemExit) as ended:
        cli.main(["calibrate", "act", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl")])
    assert ended.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"calibrate act needs a causal language model, such as BertLMHeadModel; got ['{model_class.__name__}']" in (
        message
    )
