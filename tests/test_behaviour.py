"""The invariants of a patched model, over every registered variant and every family. Nothing here names a variant."""

import copy
import pickle
from pathlib import Path

import pytest
import torch

import patchattn
from patchattn.softmax.slots import SlotVariant

from .behaviour import ONLY_WHILE_DECODING, Case, assert_same, close, on, snapshot, text, variant_parameters
from .families import FAMILIES, LENGTH, outputs

pytestmark = pytest.mark.usefixtures("toys")


@on(list(FAMILIES))
def test_neutral_settings_change_nothing(family: str, case: Case) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
    expected = outputs(model, **inputs)
    case.neutral.patch(model, live=False)
    for left, right in zip(expected, outputs(model, **inputs), strict=True):
        if case.info.variant.neutral_rounds:
            close(right, left)
        else:
            assert torch.equal(left, right)


@on(list(FAMILIES), without=ONLY_WHILE_DECODING)
def test_a_patch_changes_the_output_and_unpatching_restores_every_bit(family: str, case: Case) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
    expected = outputs(model, **inputs)
    before = snapshot(model)  # after a forward: transformers installs hooks of its own in the first
    case.patch(model)
    changed = outputs(model, **inputs)
    assert max(float((left - right).abs().max()) for left, right in zip(expected, changed, strict=True)) > 1e-4
    assert all(bool(tensor.isfinite().all()) for tensor in changed)
    patchattn.unpatch_model(model)
    assert_same(before, snapshot(model))
    for left, right in zip(expected, outputs(model, **inputs), strict=True):
        assert torch.equal(left, right)


@on(["llama", "llava", "t5", "vit"], without=("fastv", "hiprune"))  # which take all layers from one on
def test_only_the_chosen_layers_change(family: str, case: Case) -> None:
    model = FAMILIES[family].make()
    case.patch(model, layers=1)
    info = patchattn.patch_info(model)
    (chosen,) = [set(patch["sites"]) for patch in info["patches"]]
    assert chosen  # some variants leave out a vision tower
    for site in info["sites"]:
        assert site["variants"] == ([case.variant] if site["name"] in chosen else [])
        assert site["layer_index"] == 1 or site["name"] not in chosen


# Rows of these sum to other than 1: by what they are, or by learned factors.
SUM_TO_ANYTHING = ("bibert", "differential", "mta", "nsa", "sigmoid", "softpick", "talking_heads", "urpe")


@on(["llama", "gpt2", "bert", "vit", "t5"])
def test_eager_gives_attentions_and_the_same_output_as_sdpa(family: str, case: Case) -> None:
    inputs = FAMILIES[family].inputs()
    results = []
    for implementation in ("sdpa", "eager"):
        model = FAMILIES[family].make(implementation=implementation)
        case.patch(model)
        results.append(outputs(model, **inputs))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        patched = model(**inputs, output_attentions=True)
        plain = patchattn.unpatch_model(model)(**inputs, output_attentions=True)
    name = "attentions" if "attentions" in patched else "decoder_attentions"
    if not plain[name]:
        return  # T5 of transformers 5.17 stays with SDPA
    assert len(patched[name]) == len(plain[name])
    for attention, expected in zip(patched[name], plain[name], strict=True):
        heads = attention.shape[1] if case.info.kind == "surgery" else expected.shape[1]
        assert attention.shape == (expected.shape[0], heads, *expected.shape[2:])
        if issubclass(case.info.variant, SlotVariant):  # which takes a part of every row
            assert bool((attention.sum(-1) < 1 + 1e-5).all())
            continue
        if case.variant in SUM_TO_ANYTHING:
            continue
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@on(["llama", "qwen3", "gpt2", "bert", "vit", "t5", "llava"])
def test_half_precision_and_autocast(family: str, case: Case) -> None:
    inputs = FAMILIES[family].inputs()
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    model = case.patch(FAMILIES[family].make().bfloat16())
    assert {p.dtype for p in variant_parameters(model).values()} <= {torch.bfloat16}
    result = outputs(model, **half)[0]
    assert result.dtype == torch.bfloat16
    assert bool(result.isfinite().all())
    model = case.patch(FAMILIES[family].make())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bool(outputs(model, **inputs)[0].isfinite().all())


@on(["llama", "bert", "vit", "t5"])
def test_batch_of_one_and_single_token(family: str, case: Case) -> None:
    model, inputs = case.patch(FAMILIES[family].make()), FAMILIES[family].inputs()
    for left, right in zip(
        outputs(model, **{name: value[:1] for name, value in inputs.items()}), outputs(model, **inputs), strict=True
    ):
        torch.testing.assert_close(left, right[:1], rtol=1e-4, atol=1e-4)
    if family in ("llama", "bert"):
        assert outputs(model, input_ids=text(1))[0].shape[:2] == (2, 1)


@on(["llama"])
def test_packed_sequences_equal_separate_ones(family: str, case: Case) -> None:
    model, tokens = case.patch(FAMILIES[family].make_exact()), text()
    lengths = (LENGTH, 5)
    packed = torch.cat([tokens[:1], tokens[1:, :5]], dim=1)
    numbers = torch.cat([torch.arange(length) for length in lengths])[None]
    together = outputs(model, input_ids=packed, position_ids=numbers, use_cache=False)[0]
    close(together[:, :LENGTH], outputs(model, input_ids=tokens[:1])[0])
    close(together[:, LENGTH:], outputs(model, input_ids=tokens[1:, :5])[0])


@on(["llama", "gpt2", "bert", "t5", "vit", "llava"], first=True, papers=1)
def test_copies_and_pickles_are_complete_and_independent(family: str, case: Case) -> None:
    model, inputs = case.patch(FAMILIES[family].make()), FAMILIES[family].inputs()
    pickled = pickle.dumps(model)  # before a forward: transformers then installs hooks that cannot be pickled
    expected = outputs(model, **inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickled)):
        for left, right in zip(expected, outputs(twin, **inputs), strict=True):
            assert torch.equal(left, right)
        patchattn.unpatch_model(twin)
        for left, right in zip(expected, outputs(model, **inputs), strict=True):
            assert torch.equal(left, right)


@on(list(FAMILIES), papers=1)
def test_a_saved_patch_gives_equal_outputs_on_a_fresh_base(family: str, case: Case, tmp_path: Path) -> None:
    model, inputs = case.patch(FAMILIES[family].make()), FAMILIES[family].inputs()
    patchattn.save_patch(model, tmp_path)
    loaded = patchattn.load_patch(FAMILIES[family].make(), tmp_path)
    for left, right in zip(outputs(model, **inputs), outputs(loaded, **inputs), strict=True):
        assert torch.equal(left, right)
