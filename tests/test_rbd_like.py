"""The reconstruction of RBD against attention written out row by row, and an unpatched model given noised pixels."""

from typing import Any

import pytest
import torch

import patchattn

from . import vlms
from .guidance_reference import guided, raised
from .test_decoding import decode, extended
from .test_pai import boosts_of, same
from .test_vcd import noised

F64 = torch.float64
ALL = {"first_layer": 0, "alpha": 0.7, "gamma": 1.5, "beta": 0.1, "noise_step": 800, "seed": 2}


@torch.no_grad()
def expected(model: Any, given: dict[str, torch.Tensor], settings: dict[str, Any], end: int) -> torch.Tensor:
    """`(B, V)` logits behind texts whose prompts end with the token `end - 1`."""
    ids = given["input_ids"]
    rows = [list(range(end - 1, ids.shape[1]))] * len(ids)
    with raised(model, boosts_of(ids, settings["alpha"]), rows, [0, 1]) as twin:
        own = twin(**given, use_cache=False).logits[:, -1]
    other = model(**noised(given, settings["noise_step"], settings["seed"])).logits[:, -1]
    return torch.stack([guided(a, b, settings["gamma"], settings["beta"]) for a, b in zip(own, other, strict=True)])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_step_of_a_padded_batch(name: str) -> None:
    model, given = vlms.make(name, dtype=F64), vlms.inputs(name, dtype=F64)
    with patchattn.patched(model, "rbd_like", **ALL):
        tokens, steps = decode(model, given)
        assert torch.equal(decode(model, given)[1], steps)  # a second run is as the first
    for count in range(2):
        want = expected(model, extended(given, tokens[:, :count]), ALL, given["input_ids"].shape[1])
        same(steps[:, count], want)


def test_it_is_vcd_where_nothing_is_raised_and_pais_attention_where_nothing_is_contrasted() -> None:
    model, given = vlms.make("llava", dtype=F64), vlms.inputs("llava", dtype=F64)
    pairs = [
        ("vcd", {"alpha": 0.5, "noise_step": 800, "seed": 2}, {**ALL, "alpha": 0.0}),
        ("pai", {"first_layer": 0, "alpha": 0.7, "gamma": 1.0}, {**ALL, "gamma": 1.0}),
    ]
    for name, settings, own in pairs:
        with torch.no_grad(), patchattn.patched(model, name, **settings):
            want = model(**given).logits[:, -1]
        with torch.no_grad(), patchattn.patched(model, "rbd_like", **own):
            torch.testing.assert_close(model(**given).logits[:, -1], want)


def test_a_step_of_noise_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_step"):
        patchattn.patch_model(vlms.make("llava"), "rbd_like", noise_step=1000)
