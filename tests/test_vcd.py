"""VCD against two unpatched models, one of them given pixels that were noised here."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.decoding.other_images import kept_variance

from . import vlms
from .test_decoding import decode, extended

F64 = torch.float64


def kept(step: int) -> float:
    """The product over the schedule, number by number."""
    product = 1.0
    for k in range(step + 1):
        at = -6.0 + 12.0 * k / 999
        product *= 1.0 - ((0.005 - 1e-5) / (1.0 + math.exp(-at)) + 1e-5)
    return product


def noised(given: dict[str, torch.Tensor], step: int, seed: int) -> dict[str, torch.Tensor]:
    """Every image under the same noise; of packed patches, each image's own rows."""
    pixels, parts = given["pixel_values"], []
    if "image_grid_thw" in given:
        parts = [(rows, rows.shape) for rows in pixels.split(given["image_grid_thw"].prod(-1).tolist())]
    else:
        parts = [(image[None], image.shape) for image in pixels.flatten(0, -4)]
    done = []
    for image, shape in parts:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        done.append(kept(step) ** 0.5 * image + (1 - kept(step)) ** 0.5 * noise.to(image.dtype))
    return {**given, "pixel_values": torch.cat(done).view_as(pixels)}


@torch.no_grad()
def expected(model: Any, given: dict[str, torch.Tensor], tokens: torch.Tensor, **settings: Any) -> torch.Tensor:
    """`(B, n + 1, V)` logits behind the prompt and behind each token."""
    s = {"alpha": 1.0, "beta": 0.1, "noise_step": 500, "seed": 0, **settings}
    found = []
    for count in range(tokens.shape[1] + 1):
        whole = extended(given, tokens[:, :count])
        own = model(**whole).logits[:, -1].double().numpy()
        other = model(**noised(whole, s["noise_step"], s["seed"])).logits[:, -1].double().numpy()
        least = own.max(-1, keepdims=True) + (math.log(s["beta"]) if s["beta"] else -math.inf)
        found.append(np.where(own >= least, (1 + s["alpha"]) * own - s["alpha"] * other, -np.inf))
    return torch.from_numpy(np.stack(found, axis=1))


def test_the_schedule() -> None:
    assert kept_variance(500) == pytest.approx(0.7448, abs=5e-5)
    assert kept_variance(999) == pytest.approx(0.0812, abs=5e-5)
    for step in (0, 1, 500, 999):
        assert kept_variance(step) == pytest.approx(kept(step), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llava", {}),
        ("llava_siglip", {"alpha": 0.5, "noise_step": 999}),
        ("llava_next", {"beta": 0.0, "seed": 3}),
        ("instructblip", {"alpha": 2.0}),
        ("qwen2_5_vl", {"noise_step": 900}),
    ],
)
def test_every_step_of_a_padded_batch(name: str, settings: dict[str, Any]) -> None:
    model, given = vlms.make(name, dtype=F64), vlms.inputs(name, dtype=F64)
    with patchattn.patched(model, "vcd", **settings):
        tokens, steps = decode(model, given, max_new_tokens=4)
        assert torch.equal(decode(model, given, max_new_tokens=4)[1], steps)  # the noise is the same again
    want = expected(model, given, tokens[:, :2], **settings)
    for got, wanted in zip(steps[:, :3].double().unbind(1), want.unbind(1), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        plain = model(**given).logits[:, -1]
    assert float((plain - want[:, 0]).abs().nan_to_num(0.0, posinf=0.0).max()) > 1e-2


def two_images() -> dict[str, torch.Tensor]:
    image = [vlms.IMAGE] * 16
    ids = torch.tensor([[5, *image, 9, 8, 7, *image, 21, 22]])
    pixels = torch.randn(2, 3, vlms.SIDE, vlms.SIDE, generator=torch.Generator().manual_seed(5), dtype=F64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_two_images_of_a_row() -> None:
    model, given = vlms.make("llava", dtype=F64), two_images()
    want = expected(model, given, torch.zeros(1, 0, dtype=torch.long))[:, 0]
    with patchattn.patched(model, "vcd"), torch.no_grad():
        torch.testing.assert_close(model(**given).logits[:, -1], want, rtol=1e-6, atol=1e-6)


def test_a_prompt_in_chunks() -> None:
    """Where `generate` encodes images before the first forward, it cuts such prompts."""
    model, given = vlms.make("llava", dtype=F64), two_images()
    if not hasattr(model, "_supports_mm_encoder_outputs"):
        pytest.skip("this release of transformers cuts no prompts with images")
    with patchattn.patched(model, "vcd"):
        want, got = (decode(model, given, prefill_chunk_size=size) for size in (None, 7))
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


def test_without_a_contrast_only_the_cut_is_left() -> None:
    model, given = vlms.make("llava", dtype=F64), two_images()
    with torch.no_grad():
        plain = model(**given).logits[0, -1]
        with patchattn.patched(model, "vcd", alpha=0.0, beta=0.5):
            got = model(**given).logits[0, -1]
    allowed = plain.softmax(-1) >= 0.5 * plain.softmax(-1).max()
    assert torch.equal(got[allowed], plain[allowed])
    assert bool((got[~allowed] == -torch.inf).all())
    assert 0 < int(allowed.sum()) < len(plain)


def test_noise_of_torchs_own_generator_is_drawn_for_every_image() -> None:
    model, given = vlms.make("llava", dtype=F64), two_images()
    given["pixel_values"] = given["pixel_values"][:1].repeat(2, 1, 1, 1)
    with patchattn.patched(model, "vcd", seed=None), torch.no_grad():
        (variant,) = [part for part in model.modules() if isinstance(part, patchattn.Variant)]
        seen = [variant.change(given["pixel_values"]) for _ in range(2)]
    assert not torch.equal(seen[0][0], seen[0][1])
    assert not torch.equal(seen[0], seen[1])


def test_images_that_were_encoded_elsewhere_are_refused() -> None:
    model, given = vlms.make("llava", dtype=F64), two_images()
    embeddings = model.get_input_embeddings()(given["input_ids"])
    embeddings = torch.where((given["input_ids"] == vlms.IMAGE)[..., None], 0.5, embeddings)
    with patchattn.patched(model, "vcd"), torch.no_grad():
        model(**given)  # whose images are known
        model.get_input_embeddings()(given["input_ids"])
        with pytest.raises(ValueError, match="were not made by the"):
            model(inputs_embeds=embeddings, attention_mask=given["attention_mask"])
