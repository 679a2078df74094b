"""DAMRO under what one call may ask for, against two forward passes of the unpatched model."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import LogitsProcessor

import patchattn

from . import vlms
from .test_damro import expected_logits, qk_of_layer, reference_scores
from .test_decoding import decode


def tokens_of(model: Any, given: dict[str, torch.Tensor], first: int, kind: str, layer: int) -> torch.Tensor:
    """`(2, E)` the outliers of one picture among the encoder's tokens from `first` on."""
    name = "llava" if kind == "cls" else "llava_siglip"
    pairs, out = qk_of_layer(model, name, given)
    scores = reference_scores(*pairs[0], 4, kind, False)
    start = max(first, 1) if kind == "cls" else first
    best = np.argsort(-scores[start:])[:2] + start
    with torch.no_grad():
        return model.model.multi_modal_projector(out.hidden_states[layer][0][best.copy()])


@pytest.mark.parametrize("where", ["forward", "generate"])
@pytest.mark.parametrize("strategy", ["full", "default"])
@pytest.mark.parametrize(("name", "kind", "layer"), [("llava", "cls", -2), ("llava_siglip", "received", -1)])
def test_the_encoder_s_first_token_may_be_kept_or_left_out(
    name: str, kind: str, layer: int, strategy: str, where: str
) -> None:
    plain, given = vlms.make(name, dtype=torch.float64), vlms.inputs(name, rows=1, dtype=torch.float64)
    count = 16 + (kind == "cls") - (strategy == "default")
    ids = torch.cat([torch.tensor([[5, 6]]), torch.full((1, count), vlms.IMAGE), torch.tensor([[7, 8, 9]])], dim=1)
    given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    asked = {**given, "vision_feature_select_strategy": strategy}
    model = patchattn.patch_model(vlms.make(name, dtype=torch.float64), "damro", top_k=2, score=kind)
    image = tokens_of(plain, given, int(strategy == "default"), kind, layer)
    if where == "generate":
        text, got = decode(model, asked)
    else:
        with torch.no_grad():
            text, got = torch.zeros(1, 4, dtype=torch.long), model(**asked).logits[:, -1:]
    expected = expected_logits(plain, "llava", asked, text, image, 2.0)[: got.shape[1]]
    assert (np.isinf(got[0].numpy()) == np.isinf(expected)).all()
    np.testing.assert_allclose(got[0].numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("where", ["forward", "generate"])
def test_image_tokens_of_another_layer(where: str) -> None:
    model, given = patchattn.patch_model(vlms.make("llava"), "damro", top_k=2), vlms.inputs("llava")
    call = model if where == "forward" else model.generate
    with pytest.raises(NotImplementedError, match="which is not the one that this call's image tokens are made of"):
        call(**given, vision_feature_layer=-1)
    assert call(**given) is not None


class Always(LogitsProcessor):
    """One token comes at every step."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self.token] = 0.0
        return only


@pytest.mark.parametrize("variant", ["damro", "var"])
def test_an_image_token_that_the_model_writes_is_text(variant: str) -> None:
    """As if another token with the same embedding had been written."""
    settings: dict[str, Any] = {"top_k": 2}
    if variant == "var":
        settings = {"sink_dims": (3, 17), "sink_threshold": 1.0, "max_sink_share": 0.9, "min_image_share": 0.1}
        settings |= {"first_layer": 0, "except_last": False}
    model, given = vlms.make("llava", dtype=torch.float64), vlms.inputs("llava", rows=1, dtype=torch.float64)
    embedding, twin = model.get_input_embeddings().weight, 9
    with torch.no_grad():
        embedding[twin] = embedding[vlms.IMAGE]
    patchattn.patch_model(model, variant, settings)
    written, twins = (decode(model, given, logits_processor=[Always(token)]) for token in (vlms.IMAGE, twin))
    assert (written[0] == vlms.IMAGE).all()
    assert (twins[0] == twin).all()
    torch.testing.assert_close(written[1], twins[1])


def test_prefix_tuning_is_refused() -> None:
    """Its cache is filled before the first token, and the branch knows nothing of it."""
    model = patchattn.patch_model(vlms.make("llava"), "damro", top_k=2)
    settings = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=16, num_attention_heads=2
    )
    tuned = get_peft_model(model, settings).eval()
    with pytest.raises(ValueError, match="filled before the model was patched, or by prefix tuning"):
        tuned(**vlms.inputs("llava"))
