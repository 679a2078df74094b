"""Probes on models patched with every registered variant: none is named, a new one is in by being registered."""

from typing import Any

import pytest
import torch

import patchattn

from .behaviour import Case, on
from .families import FAMILIES, outputs
from .test_probes import state

pytestmark = pytest.mark.usefixtures("toys")


RUN_THE_TEXT_ALONE = ("vhr",)  # of a prompt, beside it: probes see that run too


def run(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits of some generated tokens, or of one forward where a model generates none."""
    if not model.can_generate():
        return outputs(model, **inputs)
    how = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        return list(model.generate(**inputs, **how).logits)


@on(("llama", "llava", "bert"), "attention", "surgery", "cache", once=True, first=True)
def test_a_probe_changes_nothing(family: str, case: Case) -> None:
    inputs = FAMILIES[family].inputs()
    model = case.patch(FAMILIES[family].make())
    wanted, before = run(model, inputs), state(model)
    calls: dict[str, list[tuple[str, int, int]]] = {"model": [], "base": []}
    for at, seen in calls.items():

        def see(call: Any, output: torch.Tensor, seen: list[Any] = seen) -> None:
            if not call.context.is_apart:  # of heads whose keys a cache keeps apart it is called once more
                seen.append((call.site.name, output.shape[1], output.shape[2]))

        try:
            with patchattn.probed(model, see, at=at):
                found = run(model, inputs)
        except NotImplementedError as error:  # it computed without the base
            refusal = str(error)
        else:
            refusal = ""
        if refusal:
            assert at == "base"
            assert refusal.startswith(repr(case.variant))
            assert "has nothing to look at there" in refusal
        else:
            assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))
            assert {name for name, *_ in seen} == {site.name for site in patchattn.find_sites(model)}
        assert state(model) == before
    forwards = (4 if model.can_generate() else 1) + (case.variant in RUN_THE_TEXT_ALONE)
    last = patchattn.find_sites(model)[-1].name
    assert sum(name == last for name, *_ in calls["model"]) == forwards
