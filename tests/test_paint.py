"""PAINT against sets written out from the encoder's attention, and attention raised row by row in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.variants.decoding.paint import raised_patches

from . import vlms
from .guidance_reference import guided, raised, text_alone
from .test_decoding import decode, extended
from .test_pai import same, two_images

F64 = torch.float64
LOCAL, SUMMARY = 2.0, -1.0  # of tokens, in what the model packs
ALL = {"first_layer": 0, "local_alpha": 0.9, "summary_alpha": 0.4, "local_share": 0.4, "gamma": 1.0}


def sets(first: np.ndarray, last: np.ndarray, share: float) -> np.ndarray:
    """What every patch of a picture is: one after the other, by sorting."""
    ordered, count = sorted(last.tolist()), len(last)

    def quartile(q: float) -> float:
        place = q * (count - 1)
        low = int(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, count - 1)] - ordered[low])

    limit = quartile(0.75) + 1.5 * (quartile(0.75) - quartile(0.25))
    summary = {j for j in range(count) if last[j] > limit}
    local = set(sorted(range(count), key=lambda j: -first[j])[: int(share * count)]) - summary
    return np.array([SUMMARY if j in summary else LOCAL if j in local else 0.0 for j in range(count)])


@torch.no_grad()
def kinds(model: Any, pixels: torch.Tensor, share: float) -> torch.Tensor:
    """`(pictures, patches)` of an unpatched model's encoder."""
    tower: Any = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    maps = tower(pixels, output_attentions=True).attentions
    first, last = (maps[number][:, :, 0, 1:].sum(1).numpy() for number in (0, 1))  # of 3 layers, the last but one
    return torch.from_numpy(np.stack([sets(*each, share) for each in zip(first, last, strict=True)]))


def boosts(ids: torch.Tensor, of_tokens: list[torch.Tensor], settings: dict[str, Any]) -> list[list[float]]:
    """Of every token of every sequence, whose image tokens are of these kinds, in order."""
    strength = {0.0: 0.0, LOCAL: settings["local_alpha"], SUMMARY: settings["summary_alpha"]}
    coming = iter([float(kind) for part in of_tokens for kind in part.flatten()])
    return [[strength.get(next(coming), 0.0) if token == vlms.IMAGE else 0.0 for token in row] for row in ids.tolist()]


@torch.no_grad()
def expected(
    model: Any, given: dict[str, torch.Tensor], of_tokens: list[torch.Tensor], settings: dict[str, Any], end: int
) -> torch.Tensor:
    ids = given["input_ids"]
    rows = [list(range(end - 1, ids.shape[1]))] * len(ids)
    layers = list(range(settings["first_layer"], 2))
    with raised(model, boosts(ids, of_tokens, settings), rows, layers) as twin:
        return twin(**given, use_cache=False).logits[:, -1]


@pytest.fixture(scope="module")
def llava() -> Any:
    """One whose encoder's attention has outliers."""
    model: Any = vlms.make("llava", dtype=F64)
    with torch.no_grad():
        for name, parameter in model.model.vision_tower.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter.mul_(4.0)
    return model


@pytest.mark.parametrize("changes", [{}, {"gamma": 1.5, "first_layer": 1}])
def test_every_step_of_a_padded_batch(llava: Any, changes: dict[str, Any]) -> None:
    settings, given = {**ALL, **changes}, vlms.inputs("llava", dtype=F64)
    of_tokens = list(kinds(llava, given["pixel_values"], settings["local_share"]))
    assert {float(kind) for part in of_tokens for kind in part} == {0.0, LOCAL, SUMMARY}
    with patchattn.patched(llava, "paint", **settings):
        tokens, steps = decode(llava, given, max_new_tokens=4)
        assert torch.equal(decode(llava, given, max_new_tokens=4)[1], steps)
    real = given["attention_mask"].bool()
    for count in range(2):
        whole = extended(given, tokens[:, :count])
        want = expected(llava, whole, of_tokens, settings, given["input_ids"].shape[1])
        with torch.no_grad():
            plain = llava(**whole).logits[:, -1]
        assert float((want - plain).abs().max()) > 1e-3
        if settings["gamma"] != 1.0:
            texts = [torch.cat([given["input_ids"][i, real[i]], tokens[i, :count]])[None] for i in range(2)]
            want = torch.stack(
                [guided(one, text_alone(llava, ids), 1.5, 0.1) for one, ids in zip(want, texts, strict=True)]
            )
        same(steps[:, count], want)


def test_two_images_are_ranked_each_for_itself(llava: Any) -> None:
    given = two_images()
    of_tokens = list(kinds(llava, given["pixel_values"], 0.4))
    want = expected(llava, given, of_tokens, ALL, given["input_ids"].shape[1])
    with patchattn.patched(llava, "paint", **ALL), torch.no_grad():
        same(llava(**given).logits[:, -1], want)


def test_tiles_and_newlines() -> None:
    """LLaVA-NeXT packs its tiles' tokens: here, by its own code, the tokens' kinds."""
    model, given = vlms.make("llava_next", dtype=F64), vlms.inputs("llava_next", rows=1, dtype=F64)
    of_pictures = kinds(model, given["pixel_values"][0], 0.4)
    packed, _ = model.model.pack_image_features(
        [of_pictures[..., None]], given["image_sizes"], "default", image_newline=torch.tensor([9.0], dtype=F64)
    )
    assert 9.0 in packed[0]
    want = expected(model, given, list(packed), ALL, given["input_ids"].shape[1])
    with patchattn.patched(model, "paint", **ALL), torch.no_grad():
        same(model(**given).logits[:, -1], want)


def test_the_sets() -> None:
    rng = np.random.default_rng(0)
    for size in (5, 16, 37):
        first, last = rng.random((3, size)), rng.random((3, size)) ** 8
        local, summary = raised_patches(torch.from_numpy(first), torch.from_numpy(last), 0.25)
        want = np.stack([sets(*each, 0.25) for each in zip(first, last, strict=True)])
        assert np.array_equal(local.numpy(), want == LOCAL)
        assert np.array_equal(summary.numpy(), want == SUMMARY)
        assert summary.any()


def test_what_is_refused(llava: Any) -> None:
    with pytest.raises(NotImplementedError, match="there is no class token"):
        patchattn.patch_model(vlms.make("llava_siglip"), "paint")
    given = two_images()
    embeddings = torch.where(
        (given["input_ids"] == vlms.IMAGE)[..., None], 0.5, llava.get_input_embeddings()(given["input_ids"])
    )
    with patchattn.patched(llava, "paint", **ALL), torch.no_grad():
        llava(**given)
        llava.get_input_embeddings()(given["input_ids"])
        with pytest.raises(ValueError, match="were not made by the patched model"):
            llava(inputs_embeds=embeddings, attention_mask=given["attention_mask"])
