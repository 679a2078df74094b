"""check_patch passes what behaves, fails what does not, and leaves the model alone."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import patchattn
from patchattn.core.registry import temporarily_registered

from .behaviour import assert_same, on, randomise, snapshot
from .families import FAMILIES, outputs


class Broken(patchattn.Variant):
    """Wrong in the way that its subclasses choose."""

    config_class = patchattn.VariantConfig


class ReadsPadding(Broken):
    """Scales by a mean over all keys, padded ones included."""

    def attend(self, call, inner):
        return inner(call.replace(query=call.query * (1 + call.key.mean(dim=(1, 2, 3), keepdim=True))))


class CountsRowsOfTheChunk(Broken):
    """Counts positions from the start of the call, as if there were no cache."""

    def attend(self, call, inner):
        rows = torch.arange(call.query.shape[2], device=call.query.device)
        return inner(call.replace(query=call.query * (1 + 0.1 * rows[:, None])))


class ForgetsCallsWithoutCache(Broken):
    """Scales what enters a kv cache, and nothing where there is none."""

    def attend(self, call, inner):
        return inner(call)

    def before_cache(self, key, value, context, visible):
        return key, value if context.cache is None else 1.5 * value


class IsNeverNeutral(Broken):
    def attend(self, call, inner):
        output, weights = inner(call)
        return output * 1.001, weights


@pytest.fixture
def broken(request: pytest.FixtureRequest) -> Iterator[str]:
    words = {"title": "", "summary": "", "extra_parameters": ""}
    facts = {**words, "arxiv_id": None, "year": 2026, "needs_training": False}
    with temporarily_registered(patchattn.VariantInfo(name="broken", variant=request.param, **facts)) as name:
        yield name


def status(report: patchattn.CheckReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


@pytest.mark.usefixtures("toys")
@on(["llama", "bert", "t5"], first=True, papers=1)
def test_good_patches_pass(family: str, case) -> None:
    model = FAMILIES[family].make()
    before = snapshot(model)
    report = patchattn.check_patch(model, FAMILIES[family].inputs(), case.variant, dict(case.settings))
    assert report.passed, str(report)
    assert_same({key: before[key] for key in ("state", "config", "modules")}, snapshot(model))
    applicable = [check for check in report.checks if check.status == "passed"]
    decoding = not case.looks_ahead  # else decoding is not one forward
    assert len(applicable) == {"bert": 3, "vit": 2}.get(family, 3 + decoding)


@pytest.mark.parametrize(
    ("broken", "failing"),
    [
        (ReadsPadding, "padding changes no real token"),
        (CountsRowsOfTheChunk, "cached decoding equals one forward"),
        (ForgetsCallsWithoutCache, "cached decoding equals one forward"),
        (IsNeverNeutral, "neutral settings equal the unpatched model"),
    ],
    indirect=["broken"],
)
def test_bad_variants_fail(broken: str, failing: str) -> None:
    report = patchattn.check_patch(FAMILIES["llama"].make(), FAMILIES["llama"].inputs(), broken)
    assert not report.passed
    assert status(report)[failing] == "failed"
    assert "failed" in str(report)
    assert report.to_dict()["passed"] is False


def test_a_trained_patch_is_checked_as_it_is_and_kept() -> None:
    model, inputs = patchattn.patch_model(FAMILIES["llama"].make(), ["ssa", "moh"]), FAMILIES["llama"].inputs()
    randomise(model)
    before = outputs(model, **inputs)[0]
    model.train()
    report = patchattn.check_patch(model)  # makes inputs of its own
    assert report.passed
    assert [patch["variant"] for patch in report.patches] == ["ssa", "moh"]
    assert report.milliseconds > 0
    assert report.dtype == "float32"
    assert model.training
    assert torch.equal(outputs(model.eval(), **inputs)[0], before)


def test_mistakes_are_named() -> None:
    model = FAMILIES["llama"].make()
    with pytest.raises(ValueError, match="not patched: patch it first"):
        patchattn.check_patch(model)
    with pytest.raises(TypeError, match="inputs must be a dictionary"):
        patchattn.check_patch(model, 3, "moh")
    with pytest.raises(ValueError, match="did you mean 'moh'"):
        patchattn.check_patch(model, None, "mho")
    patchattn.patch_model(model, "moh")
    with pytest.raises(ValueError, match="patched already"):
        patchattn.check_patch(model, None, "moh")
    with pytest.raises(ValueError, match="give inputs"):
        patchattn.check_patch(FAMILIES["whisper"].make(), None, "moh")
    with pytest.raises(TypeError, match="transformers model"):
        patchattn.check_patch(nn.Linear(2, 2), None, "moh")


class WithoutCache(LlamaForCausalLM):
    """A decoder whose forward takes no kv cache."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask, use_cache=False)


def test_a_decoder_without_kv_cache_has_nothing_to_compare():
    family = FAMILIES["llama"]
    model = patchattn.patch_model(WithoutCache(family.make().config).eval(), "logn", train_length=4)
    report = patchattn.check_patch(model, family.inputs())
    caching = next(check for check in report.checks if "cach" in check.name)
    assert report.passed
    assert "takes no kv cache" in str(caching)
