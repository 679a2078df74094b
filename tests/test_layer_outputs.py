"""What variants that change layers' outputs keep of a call, and several of them behind one layer."""

from typing import Any

import pytest
import torch
from torch import nn

import patchattn
from patchattn.core import run

from .behaviour import close
from .families import FAMILIES, outputs

ROWS: dict[str, Any] = {"vectors": {0: [0.5, -0.25] * 16, 1: [0.25] * 32}, "rows": "marked", "tokens": [1, 3]}
SETTINGS: dict[str, dict[str, Any]] = {
    "function_vectors": {"vectors": {1: [0.5, -0.25] * 16}, "rows": "all"},
    "task_vectors": {"vectors": {1: [0.25, 0.75] * 16}, "gain": 0.5, "rows": "all", "phase": "both"},
    "massive": {"activations": {1: {1: 0.5, 5: -0.25}}, "to": "mean"},
}


class Failing(nn.Module):
    def forward(self, *args: Any) -> Any:
        raise MemoryError


@pytest.fixture(autouse=True)
def _own_run() -> Any:
    """What other tests have left is not looked at, and nothing is left to them."""
    vars(run._local).clear()
    yield
    vars(run._local).clear()


def nothing_left() -> bool:
    return not any(vars(run._local).values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "t5", "llava"])
def test_activation_checkpointing_leaves_no_rows_behind(family: str, reentrant: bool) -> None:
    """It runs layers again in backward, without their hooks or not to their end."""
    model = patchattn.patch_model(FAMILIES[family].make(), "function_vectors", **ROWS).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**FAMILIES[family].inputs()).logits.square().mean().backward()
    assert nothing_left()


@pytest.mark.parametrize("place", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_layer_that_fails_leaves_no_rows_behind(place: str) -> None:
    """Within attention, and between attention and the layer's end."""
    model = patchattn.patch_model(FAMILIES["llama"].make(), "function_vectors", **ROWS)
    parent, _, child = place.rpartition(".")
    setattr(model.model.layers[1].get_submodule(parent), child, Failing())
    with pytest.raises(MemoryError):
        outputs(model, **FAMILIES["llama"].inputs())
    assert nothing_left()


def test_a_layer_whose_output_is_refused_leaves_no_rows_behind() -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "function_vectors", **{**ROWS, "vectors": {0: [1.0, 2.0]}})
    with pytest.raises(ValueError, match="has 2 numbers"):
        outputs(model, **FAMILIES["llama"].inputs())
    assert nothing_left()


def test_attention_that_is_called_without_its_layer_leaves_no_rows_behind() -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "function_vectors", **ROWS)
    hidden, places = torch.randn(1, 6, 32), torch.arange(6)[None]
    with torch.no_grad():
        rotary = model.model.rotary_emb(hidden, places)
        model.model.layers[0].self_attn(hidden, position_embeddings=rotary, attention_mask=None)
    assert nothing_left()


@pytest.mark.parametrize("names", [("massive", "function_vectors"), ("function_vectors", "task_vectors", "massive")])
def test_several_act_behind_one_layer_in_their_order(names: tuple[str, ...]) -> None:
    inputs = FAMILIES["llama"].inputs()
    model = patchattn.patch_model(FAMILIES["llama"].make_exact(), list(names), {name: SETTINGS[name] for name in names})
    found = outputs(model, **inputs)[0]

    def by_hand(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        for name in names:
            if name == "massive":
                for dimension, value in SETTINGS[name]["activations"][1].items():
                    hidden[..., dimension] = value
            else:
                vector = torch.tensor(SETTINGS[name]["vectors"][1], dtype=hidden.dtype)
                hidden = hidden * SETTINGS[name].get("gain", 1.0) + vector
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    plain = FAMILIES["llama"].make_exact()
    plain.model.layers[1].register_forward_hook(by_hand)
    close(found, outputs(plain, **inputs)[0])
