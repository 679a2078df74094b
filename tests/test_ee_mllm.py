"""EE-MLLM's mask (arXiv 2408.11795) against attention written out pair by pair in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

import patchattn

from . import vlms
from .test_decoding import decode, extended
from .test_pai import two_images

F64 = torch.float64


@torch.no_grad()
def expected(given: dict[str, torch.Tensor], rows: str) -> torch.Tensor:
    """`(B, T, V)` logits of a LLaVA that is not patched, in whose language model pairs are hidden one by one."""
    image = given["input_ids"] == vlms.IMAGE
    real = given["attention_mask"].bool()

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        logits = (query @ key.mT * kwargs["scaling"]).numpy()
        out = np.zeros((*logits.shape[:3], value.shape[-1]))
        is_text = query.shape[2] == image.shape[1]  # and not the vision tower
        for b, h, i in np.ndindex(*logits.shape[:3]):
            if is_text and image[b, i]:
                keys = [i] if rows == "self" else []
            else:
                keys = [j for j in range(i + 1) if real[b, j]] if is_text else list(range(key.shape[2]))
            if keys:
                weights = np.exp(logits[b, h, i, keys] - logits[b, h, i, keys].max())
                out[b, h, i] = weights / weights.sum() @ value[b, h, keys].numpy()
        return torch.from_numpy(out).transpose(1, 2), None

    model = vlms.make("llava", dtype=F64)
    AttentionInterface.register("pairs", attend)
    AttentionMaskInterface.register("pairs", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    try:
        model.set_attn_implementation("pairs")
        return model(**given, use_cache=False).logits
    finally:
        AttentionInterface._global_mapping.pop("pairs")
        AttentionMaskInterface._global_mapping.pop("pairs")


@pytest.mark.parametrize("rows", ["self", "zero"])
def test_a_padded_batch_step_by_step_and_in_chunks(rows: str) -> None:
    model, given = vlms.make("llava", dtype=F64), vlms.inputs("llava", dtype=F64)
    real = given["attention_mask"].bool()
    with patchattn.patched(model, "ee_mllm", image_rows=rows), torch.no_grad():
        got = model(**given).logits
        tokens, steps = decode(model, given)
        chunked = None
        if hasattr(model, "_supports_mm_encoder_outputs"):  # this release cuts prompts with images
            chunked = decode(model, given, prefill_chunk_size=7)[1]
    torch.testing.assert_close(got[real], expected(given, rows)[real], rtol=1e-6, atol=1e-6)
    want = expected(extended(given, tokens[:, :2]), rows)[:, -1]
    torch.testing.assert_close(steps[:, 2].double(), want, rtol=1e-5, atol=1e-5)
    if chunked is not None:
        torch.testing.assert_close(chunked, steps, rtol=1e-5, atol=1e-5)


def test_two_images_and_the_text_between_them() -> None:
    model, given = vlms.make("llava", dtype=F64), two_images()
    with patchattn.patched(model, "ee_mllm"), torch.no_grad():
        got = model(**given).logits
    torch.testing.assert_close(got, expected(given, "self"), rtol=1e-6, atol=1e-6)


def test_image_tokens_read_neither_each_other_nor_the_text_before_them() -> None:
    model = vlms.make("llava")
    model.set_attn_implementation("eager")
    given = vlms.inputs("llava")
    image = given["input_ids"] == vlms.IMAGE
    with torch.no_grad():
        with patchattn.patched(model, "ee_mllm"):
            weights = model(**given, output_attentions=True).attentions[0]
        with patchattn.patched(model, "ee_mllm", image_rows="zero"):
            none = model(**given, output_attentions=True).attentions[0]
    own = weights.diagonal(dim1=-2, dim2=-1)
    assert bool((own[image[:, None].expand_as(own)] == 1).all())
    assert not bool(none.transpose(1, 2)[image].any())
    assert bool((weights.transpose(1, 2)[~image & given["attention_mask"].bool()].sum(-1) - 1 < 1e-5).all())


def test_a_model_without_images_is_refused() -> None:
    from .families import FAMILIES

    with pytest.raises(NotImplementedError, match="'ee_mllm' does not support without_images"):
        patchattn.patch_model(FAMILIES["llama"].make(), "ee_mllm")
