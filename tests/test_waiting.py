"""No variant waits for its device in every layer and at every token: on `meta`, no value can be asked for at all."""

import functools
import inspect
import traceback
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import patchattn
from patchattn.core.registry import temporarily_registered
from patchattn.positions.variant import RotaryVariant

from .behaviour import Case, on, randomise
from .evictions import fewest
from .families import FAMILIES, outputs
from .toy import registered_toy

ASKING = ("_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique2")

# What they drop, or run once more, of a prompt depends on where images are; of later calls they ask whether any come.
ASK_ABOUT_IMAGES = ("fastv", "hiprune", "vhr")

COMPUTES_WEIGHTS = ("gqa_convert",)  # when it patches: refused on meta, by name


def patched_on_meta(family: str, case: Case, dtype: torch.dtype) -> nn.Module:
    """A patched model without values. How it rotates is seen in runs of it, when patching: that needs values."""
    if issubclass(case.info.variant, RotaryVariant):
        return case.patch(FAMILIES[family].make().to(dtype)).to("meta")
    return case.patch(FAMILIES[family].make().to("meta", dtype))


class Asked(TorchDispatchMode):
    """Notes where the host is told a value, or a shape that depends on values, but for references of kernels: they run
    on a CPU alone."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.rpartition("::")[2]
        if name in ASKING:
            files = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(None)]
            if not any("patchattn_kernels" in file for file in files):
                self.places.append(f"{name} in {next((file for file in files if '/patchattn/' in file), 'the model')}")
        return func(*args, **(kwargs or {}))


def decode(model, input_ids: torch.Tensor, **images: torch.Tensor) -> torch.Tensor:
    """A prompt, then token by token."""
    tokens = input_ids
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        logits = model(tokens[:, :-2], past_key_values=cache, **images).logits
        for place in (-2, -1):
            step = tokens[:, place : place + 1 or None]
            logits = model(step, past_key_values=cache).logits
    return logits


DTYPES = (torch.bfloat16, torch.float32)  # a variant's examples by turns; all run in float32 with images, below


@on(("llama",))
def test_decoding_asks_no_device(family: str, case: Case, toys, monkeypatch) -> None:
    dtype = DTYPES[case.example % 2]
    if case.variant in COMPUTES_WEIGHTS:
        monkeypatch.setattr("patchattn.cache.waiting.waits", lambda tensor: True)
        tokens = torch.full((2, 7), 7)
        unpatched = asked(FAMILIES[family].make().to(dtype), input_ids=tokens)
        assert asked(case.patch(FAMILIES[family].make().to(dtype)), input_ids=tokens) == unpatched
        return
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # torch has none for meta
    model = patched_on_meta(family, case, dtype)
    tokens = torch.zeros(2, 7, dtype=torch.long, device="meta")
    assert decode(model, tokens).shape[:2] == (2, 1)


def asked(model, **inputs: torch.Tensor) -> list[str]:
    with Asked() as noted:
        decode(model, **inputs)
    return noted.places


@functools.cache
def asked_unpatched(family: str) -> list[str]:
    return asked(FAMILIES[family].make(), **FAMILIES[family].inputs())


@on(("llama",), "cache")
def test_what_drops_keys_asks_at_the_end_of_a_prompt_at_most(family: str, case: Case, monkeypatch) -> None:
    monkeypatch.setattr("patchattn.cache.waiting.waits", lambda tensor: True)
    model, tokens = case.patch(FAMILIES[family].make()), torch.full((2, 19), 7)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), Asked() as noted:
        for place in (slice(0, 14), *(slice(at, at + 1) for at in range(14, 19))):
            if place.start == 15:
                noted.places.clear()
            model(tokens[:, place], past_key_values=cache)
    assert fewest(cache) < 19
    assert noted.places == []


@on(("llava",))
def test_decoding_with_images_asks_no_more_than_unpatched(family: str, case: Case, toys, monkeypatch) -> None:
    monkeypatch.setattr("patchattn.cache.waiting.waits", lambda tensor: True)
    unpatched = asked_unpatched(family)
    model = case.patch(FAMILIES[family].make())
    decode(model, **FAMILIES[family].inputs())  # where patches stand is looked up once for each size of images
    places = asked(model, **FAMILIES[family].inputs())
    if case.variant in ASK_ABOUT_IMAGES:  # once a forward, not in every layer
        assert 0 < len(places) - len(unpatched) <= 8
    else:
        assert places == unpatched


def test_asking_a_device_would_be_noticed() -> None:
    class Asks(patchattn.Variant):
        config_class = patchattn.VariantConfig

        def attend(self, call, inner):
            return inner(call.replace(query=call.query * (1 + float(call.query.sum() > 0))))

    info = patchattn.variant_info("logn")
    facts = {**vars(info), "name": "asks", "variant": Asks, "presets": {}, "examples": ({},)}
    with temporarily_registered(patchattn.VariantInfo(**facts)) as name:
        model = patchattn.patch_model(FAMILIES["llama"].make(), name).to("meta")
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            decode(model, torch.zeros(2, 7, dtype=torch.long, device="meta"))


@pytest.mark.parametrize("lacking", ["dropout", "static_cache", "padding"])
def test_values_of_a_mask_are_asked_for_by_who_lacks_padding_alone(lacking: str, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(torch.Tensor, "__bool__", _noting(asked))
    inputs = FAMILIES["llama"].inputs()
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, -1] = 0  # of a token that nothing asked for comes after
    with registered_toy(frozenset({lacking})) as name:
        model = patchattn.patch_model(FAMILIES["llama"].make(), name)
        try:
            outputs(model, **{**inputs, "attention_mask": mask})
            refused = False
        except NotImplementedError:
            refused = True
    assert refused is (lacking == "padding")
    assert any("capabilities" in place for place in asked) is refused


def _noting(asked: list[str]):
    real = torch.Tensor.__bool__

    def note(tensor):
        asked.append(inspect.stack()[1].filename)
        return real(tensor)

    return note


def test_act_on_a_device_that_waits_gives_what_it_gives_on_one_that_does_not(monkeypatch) -> None:
    model = FAMILIES["llama"].make()
    randomise(model)
    patchattn.patch_model(model, "act", alpha=0.5, keep_first=False, beta=0.2, heads={0: [0, 1, 2, 3], 1: [0, 2]})
    inputs = FAMILIES["llama"].inputs()
    expected = outputs(model.double(), **inputs)[0]
    model.float()
    for waits in (False, True):
        monkeypatch.setattr("patchattn.cache.waiting.waits", lambda tensor, waits=waits: waits)
        torch.testing.assert_close(outputs(model, **inputs)[0].double(), expected, atol=2e-5, rtol=2e-5)
