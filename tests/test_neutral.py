"""Neutral settings, computed: a variant that would be skipped is made to run, and gives what the base does."""

from typing import Any

import pytest

from . import writers
from .behaviour import Case, close, on, variants_in
from .families import FAMILIES, outputs
from .mutation import mutated, stages

pytestmark = pytest.mark.usefixtures("toys")
# Variants without settings that compute what the base does, and why.
NOT_COMPUTED = {
    **dict.fromkeys(
        ("ape", "attention_buckets", "focus_icl", "graph_kv", "parallel_context"),
        "without spans or other bases no rotation is looked for; what gives the model is in the tests of each",
    ),
    "cope": "without positions there is no embedding to read; that zeros give the model is in its own tests",
    "hdt": "without spans a token sees itself alone",
    "gqa_convert": "no number of kv heads is nothing to merge into; that equal heads merge exactly is in its own tests",
    "shrp": "it puts an expander of the heads' sum in place of the feed-forward part: no values make it the base's",
}


def check(family: str, case: Case, monkeypatch: pytest.MonkeyPatch, **mutations: Any) -> None:
    """AssertionError if the computed neutral differs from the base by more than the order of sums may: `close`.

    Args:
        family: of the model.
        case: whose neutral settings are tried, where its own change something.
        monkeypatch: for the length of the test.
        mutations: methods in place of the variant's.
    """
    model, variant = FAMILIES[family].make_exact(), case.info.variant
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in FAMILIES[family].inputs().items()}
    expected = outputs(model, **inputs)
    patched = case.patch(FAMILIES[family].make())
    acts_in = {one.site.name for one in variants_in(patched) if not one.is_identity}
    ran = set()

    def attend(self: Any, call: Any, inner: Any) -> Any:
        ran.add(self.site.name)
        return mutations.get("attend", original)(self, call, inner)

    original = variant.attend
    with monkeypatch.context() as patch:
        for name, method in mutations.items():
            patch.setattr(variant, name, method)
        patch.setattr(variant, "attend", attend)
        patch.setattr(variant, "is_identity", property(lambda self: self.site.name not in acts_in))
        case.neutral.patch(model, live=False)
        found = outputs(model, **inputs)
    assert ran == acts_in
    for left, right in zip(found, expected, strict=True):
        close(left, right)


@on(list(FAMILIES), without=NOT_COMPUTED)
def test_neutral_settings_compute_what_the_base_does(family: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(family, case, monkeypatch)


@on(["llama", "bert", "llava"], without=NOT_COMPUTED, once=True)
def test_a_small_factor_in_what_is_computed_is_noticed(
    family: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = case.info.variant
    for stage in stages(variant):
        with pytest.raises(AssertionError, match="not close"):
            check(family, case, monkeypatch, **{stage: mutated(variant, stage, 1.001, difference=False)})


def check_logits(family: str, case: Case, monkeypatch: pytest.MonkeyPatch, **mutations: Any) -> None:
    """`check` of a decoding variant, whose change is in how it combines logits."""
    model, variant = writers.make(family, writers.exact(family)), case.info.variant
    inputs = writers.inputs(family, dtype=writers.exact(family))
    (expected,), ran = outputs(model, **inputs)[:1], []

    def combine(self: Any, *logits: Any) -> Any:
        ran.append(self)
        return mutations.get("combine", original)(self, *logits)

    original = variant.combine
    with monkeypatch.context() as patch:
        patch.setattr(variant, "combine", combine)
        patch.setattr(variant, "is_identity", False)
        found, *_ = outputs(case.neutral.patch(model), **inputs)
    assert ran
    real = inputs["attention_mask"].bool()
    close(found[real], expected[real])


@on(writers.NAMES, "decoding", without=NOT_COMPUTED)
def test_neutral_decoding_computes_the_model_s_own_logits(
    family: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_logits(family, case, monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        check_logits(family, case, monkeypatch, combine=mutated(case.info.variant, "combine", 1.001, difference=False))
