"""A family that a variant refuses is declared with the reason; it is refused by name and left as it was."""

import pytest
import torch

import patchattn

from .behaviour import REPRESENTATIVES, Case, assert_same, cases, is_named, on, snapshot, toys
from .families import FAMILIES, outputs
from .refusals import REFUSALS
from .toys import TOYS

pytestmark = pytest.mark.usefixtures("toys")
KINDS = ("attention", "surgery", "decoding", "cache")


def declared() -> list:
    """One family of each reason by default, all others marked `full`."""
    found = []
    for case in [*toys(*KINDS), *cases(*KINDS)]:
        seen = set()
        for family in FAMILIES:
            refusal = case.refusal(family)
            if refusal is not None:
                marks = pytest.mark.full if refusal in seen else ()
                found.append(pytest.param(family, case, id=f"{family}-{case}", marks=marks))
                seen.add(refusal)
    return found


@pytest.mark.parametrize(("family", "case"), declared())
def test_a_declared_family_is_refused_and_left_as_it_was(family: str, case: Case) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
    expected = outputs(model, **inputs)
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match=case.refusal(family).says):
        outputs(case.patch(model), **inputs)  # where only a call shows what is needed
    if patchattn.patch_info(model)["patches"]:
        patchattn.unpatch_model(model)
    assert_same(before, snapshot(model))
    for left, right in zip(outputs(model, **inputs), expected, strict=True):
        assert torch.equal(left, right)


def test_what_is_declared_exists_and_has_a_reason() -> None:
    assert set(REFUSALS) <= {*patchattn.list_variants(), *TOYS}
    for refusal in (refusal for refusals in REFUSALS.values() for refusal in refusals):
        assert refusal.says
        assert refusal.because


def test_toys_run_on_every_family_that_they_do_not_refuse_and_papers_on_some() -> None:
    """The default suite grows with papers and with families, not with their product."""
    for case in [*toys(), *cases()]:
        by_default = [family for family in FAMILIES if case.runs_by_default_on(family) and not case.refusal(family)]
        assert by_default
        if case.variant in TOYS:
            assert by_default == list(FAMILIES)
        else:
            assert len(by_default) < len(FAMILIES) / 2
    assert [
        case for case in cases() for family in set(FAMILIES) - set(REPRESENTATIVES) if is_named(family, case.variant)
    ]
    parameters = on(list(FAMILIES)).args[1]
    full = [one for one in parameters if one.marks]
    assert len(full) > len(cases())
    assert not [one for one in full if one.values[1].variant in TOYS]
