"""Gates of kv heads: the loss and AdamW by their formulas on explicit attention matrices; resuming; the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import patchattn
from patchattn.calibration.duo import learn_gates
from patchattn.calibration.passkeys import PasskeyText, PasskeyTexts
from patchattn.cli import main as cli
from patchattn.core.patching import is_patched
from patchattn.reading.gates import HeadGates

from .behaviour import assert_same, snapshot
from .long_context import BYTES
from .long_context import tiny_llama as byte_llama
from .reference import tiny_llama

SINKS, RECENT = 2, 4
LAYERS, KV_HEADS = 2, 2


def text(step: int) -> PasskeyText:
    tokens = torch.randint(3, 50, (20 + step % 3,), generator=torch.Generator().manual_seed(step)).tolist()
    return PasskeyText(tokens, 7)


def how(**changes: Any) -> dict[str, Any]:
    return {"steps": 6, "learning_rate": 0.05, "penalty": 0.1, "sinks": SINKS, "recent": RECENT, **changes}


def explicit(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
    """Attention by whole matrices, between all keys and the near ones by `module.gates`, `(Hkv,)` or `None`."""
    group, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
    logits = query @ key.transpose(2, 3) * scaling
    row, column = torch.arange(length)[:, None], torch.arange(length)
    causal = column <= row
    near = causal & ((column < SINKS) | (row - column < RECENT))
    whole, part = (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value for seen in (causal, near))
    if module.gates is not None:
        gate = module.gates.repeat_interleave(group)[None, :, None, None]
        whole = gate * whole + (1 - gate) * part
    return whole.transpose(1, 2), None


@pytest.fixture
def reference() -> Any:
    """A model whose attention is `explicit`."""
    ALL_ATTENTION_FUNCTIONS.register("explicit", explicit)
    ALL_MASK_ATTENTION_FUNCTIONS.register("explicit", lambda *_, **__: None)
    model: Any = tiny_llama(num_hidden_layers=LAYERS)
    model.set_attn_implementation("explicit")
    yield model
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("explicit")
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop("explicit")


def hidden(model: Any, tokens: list[int], gates: Any) -> torch.Tensor:
    for layer, module in enumerate(model.model.layers):
        module.self_attn.gates = None if gates is None else gates[layer]
    return model.model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]


def test_steps_are_those_of_the_formulas(reference: Any) -> None:
    settings = how()
    gates = torch.ones(LAYERS, KV_HEADS, dtype=torch.float64)
    first, second = torch.zeros_like(gates), torch.zeros_like(gates)
    steps, fifth = settings["steps"], settings["steps"] / 5
    for step in range(steps):
        sample, current = text(step), gates.clone().requires_grad_()
        with torch.no_grad():
            wanted = hidden(reference, sample.tokens, None)
        found = hidden(reference, sample.tokens, current)
        loss = 0.0
        for row in range(len(sample.tokens) - sample.asked, len(sample.tokens)):
            loss = loss + ((wanted[row] - found[row]) ** 2).sum() / wanted.shape[1] / sample.asked
        loss = loss + settings["penalty"] * current.abs().sum() / (LAYERS * KV_HEADS)
        (slope,) = torch.autograd.grad(loss, current)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        rate = settings["learning_rate"] * min(1, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))
        size = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        gates = (gates - rate * (first / (1 - 0.9 ** (step + 1))) / size).clamp(0, 1)
    found = learn_gates(tiny_llama(num_hidden_layers=LAYERS), text, **settings)
    torch.testing.assert_close(torch.tensor(found.gates, dtype=torch.float64), gates, rtol=1e-7, atol=1e-9)
    assert len(gates.unique()) > 2
    assert found.base is not None
    assert (found.base.layers, found.base.model_type) == (LAYERS, "llama")


def test_heads_that_nobody_reads_stream_and_the_model_is_as_before() -> None:
    model: Any = tiny_llama(num_hidden_layers=LAYERS)
    unread = [(0, 1), (1, 0)]
    with torch.no_grad():
        for layer, head in unread:
            weight = model.model.layers[layer].self_attn.o_proj.weight
            weight.view(weight.shape[0], KV_HEADS, -1)[:, head] = 0.0
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    found = learn_gates(model, text, **how(steps=60, penalty=1e-4))
    assert_same(before, snapshot(model))
    assert "duo_gates" not in patchattn.list_variants()
    kept = {(layer, head) for layer, row in enumerate(found.gates) for head, gate in enumerate(row) if gate > 0.5}
    assert kept == {(layer, head) for layer in range(LAYERS) for head in range(KV_HEADS)} - set(unread)
    assert sorted(place for layer, row in enumerate(found.lowest(0.5)) for place in ((layer, h) for h in row)) == unread


class StopError(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=LAYERS)
    straight = learn_gates(model, text, **how(steps=7))
    state = tmp_path / "state"
    drawn = []

    def stopping(step: int) -> PasskeyText:
        drawn.append(step)
        if len(drawn) == 6:
            raise StopError
        return text(step)

    given = {**how(steps=7), "resume": state, "about": {"seed": 1}, "save_every": 2}
    with pytest.raises(StopError):
        learn_gates(model, stopping, **given)
    assert not is_patched(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert learn_gates(model, stopping, **given) == straight
    assert drawn == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    assert learn_gates(model, stopping, **given) == straight  # and does nothing more
    assert len(drawn) == 9
    for change in ({"penalty": 0.2}, {"about": {"seed": 2}}):
        with pytest.raises(ValueError, match=r"is of another calibration, .* delete it, or write elsewhere"):
            learn_gates(model, text, **{**given, **change})
    state.write_bytes(state.read_bytes()[:60])
    with pytest.raises(ValueError, match="is no state of a calibration that could go on"):
        learn_gates(model, text, **given)


def test_what_is_refused() -> None:
    model = tiny_llama(num_hidden_layers=LAYERS)
    with pytest.raises(ValueError, match="Expected steps and save_every of at least 1"):
        learn_gates(model, text, steps=0)
    with pytest.raises(
        ValueError, match=r"all 2 layers of one decoder, but the chosen modules are of the layers \[1\]"
    ):
        learn_gates(model, text, modules="layers.1")
    with pytest.raises(ValueError, match=r"evaluation mode: model\.eval"):
        learn_gates(model.train(), text)
    with pytest.raises(ValueError, match="The model is patched: learn its gates before"):
        learn_gates(patchattn.patch_model(model.eval(), "ssmax"), text)
    patchattn.unpatch_model(model)
    assert not is_patched(model)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_hide_passkeys_and_ask_for_all_of_them_in_order() -> None:
    texts = PasskeyTexts(BYTES, lengths=[900, 1200], passkeys=3, words=4, seed=5)
    lengths, places = set(), []
    for index in range(12):
        sample = texts(index)
        lengths.add(len(sample.tokens))
        said = BYTES.decode(sample.tokens[: -sample.asked], skip_special_tokens=True)
        asked = BYTES.decode(sample.tokens[-sample.asked :])
        questions = asked.strip().split("\n")
        assert len(questions) == 3
        for number, question in enumerate(questions, start=1):
            start = f"Which words are passkey number {number}? They are: "
            assert question.startswith(start)
            passkey = question.removeprefix(start).removesuffix(".")
            assert len(passkey.split()) == 4
            hidden = f" Passkey number {number} is: {passkey}."
            assert said.count(hidden) == 1
            places.append(said.index(hidden) / len(said))
    assert lengths == {900, 1200}
    assert min(places) < 0.3 < 0.7 < max(places)
    assert texts(3) == PasskeyTexts(BYTES, lengths=[900, 1200], passkeys=3, words=4, seed=5)(3)
    assert texts(3) != texts(4)


def test_texts_that_are_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match="are too short"):
        PasskeyTexts(BYTES, lengths=[400], passkeys=10)(0)
    with pytest.raises(ValueError, match="of at least 1"):
        PasskeyTexts(BYTES, lengths=[])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output, picture = tmp_path / "model", tmp_path / "gates.json", tmp_path / "gates.png"
    byte_llama(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2).save_pretrained(model)
    BYTES.save_pretrained(model)
    drawn = ["--length", "700", "--passkeys", "2", "--words", "3", "--steps", "3", "--sinks", "4", "--recent", "40"]
    command = ["calibrate", "duo", str(model), *drawn, "--output", str(output), "--plot", str(picture)]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code in (0, None)
    assert "of 4 gates are below 0.5" in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert {"steps": 3, "lengths": [700], "passkeys": 2, "sinks": 4}.items() <= content["calibration"].items()
    assert content["base"]["name"] == "model"
    assert picture.stat().st_size > 1000
    assert not output.with_name("gates.json.state").exists()
    loaded: Any = nn.Module.eval(byte_llama(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    texts = PasskeyTexts(BYTES, lengths=[700], passkeys=2, words=3)
    assert HeadGates.parse(str(output)).gates == learn_gates(loaded, texts, steps=3, sinks=4, recent=40).gates
    patchattn.patch_model(loaded, "duo", gates=str(output))
