"""Checkpoints as they are published: SmolLM2, DINOv2 and Whisper under a patch, and without it again."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import patchattn

MODELS: dict[str, tuple[Any, str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "SmolLM2-135M-Instruct": (
        tf.AutoModelForCausalLM,
        "ssmax",
        {"initial_scale": 0.2},
        {"input_ids": torch.arange(50, 62)[None]},
    ),
    "dinov2-small": (
        tf.AutoModel,
        "sink",
        {"initial_logit": 0.0},
        {"pixel_values": torch.linspace(-2, 2, 3 * 56 * 56).reshape(1, 3, 56, 56)},
    ),
    "whisper-tiny.en": (
        tf.WhisperForConditionalGeneration,
        "moh",
        {"active_ratio": 0.5},
        {
            "input_features": torch.linspace(-1, 1, 80 * 3000).reshape(1, 80, 3000),
            "decoder_input_ids": torch.arange(50, 54)[None],
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_is_patched_and_restored(name: str, models_dir: Path) -> None:
    if not (models_dir / name).is_dir():
        pytest.skip(f"{models_dir} has no {name}")
    kind, variant, settings, inputs = MODELS[name]
    model = kind.from_pretrained(models_dir / name, dtype="float32").eval()

    def first() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs)[0]

    plain = first()
    assert plain.isfinite().all()
    neutral = patchattn.variant_info(variant).variant.neutral_config()
    with patchattn.patched(model, variant, **neutral):
        torch.testing.assert_close(first(), plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    with patchattn.patched(model, variant, **settings):
        assert (first() - plain).abs().max() > 1e-2 * plain.abs().max()
    assert torch.equal(first(), plain)
