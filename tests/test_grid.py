"""`call.grid()`: where the tokens of vision towers lie on their images, against grids written out by hand."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DPTConfig,
    DPTModel,
    MLCDVisionConfig,
    MLCDVisionModel,
    PixtralVisionConfig,
    PixtralVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

import patchattn

from . import vlms
from .families import outputs
from .grids import IMAGE, SEEN, SIZES, first, make, pixels, qwen, qwen2, qwen2_5, registered, vit


@pytest.fixture(autouse=True)
def reads() -> Iterator[None]:
    with registered():
        yield


# Rows and columns in the order of tokens; `-` is a token that is no patch.
THREE_BY_THREE = "00 01 02 10 11 12 20 21 22"
TOWERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int, tuple[int, int], str]] = {
    "vit": (vit, pixels(2, 3, 24, 24), 1, (3, 3), f"- {THREE_BY_THREE}"),
    "vit, another size": (
        vit,
        {**pixels(1, 3, 16, 40), "interpolate_pos_encoding": True},
        1,
        (2, 5),
        "- 00 01 02 03 04 10 11 12 13 14",
    ),
    "vit, not square": (
        lambda: vit(image_size=(16, 24)),
        pixels(2, 3, 16, 24),
        1,
        (2, 3),
        "- 00 01 02 10 11 12",
    ),
    "vit with a head": (
        lambda: ViTForImageClassification(ViTConfig(**SIZES, **IMAGE)),
        pixels(2, 3, 24, 24),
        1,
        (3, 3),
        f"- {THREE_BY_THREE}",
    ),
    "deit": (lambda: DeiTModel(DeiTConfig(**SIZES, **IMAGE)), pixels(2, 3, 24, 24), 2, (3, 3), f"- - {THREE_BY_THREE}"),
    "beit": (
        lambda: BeitModel(BeitConfig(**SIZES, **IMAGE, use_relative_position_bias=True)),
        pixels(2, 3, 24, 24),
        1,
        (3, 3),
        f"- {THREE_BY_THREE}",
    ),
    "dinov2 with registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, **IMAGE, num_register_tokens=4)),
        pixels(2, 3, 24, 16),
        5,
        (3, 2),
        "- - - - - 00 01 10 11 20 21",
    ),
    "clip": (
        lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, **IMAGE)),
        pixels(2, 3, 24, 24),
        1,
        (3, 3),
        f"- {THREE_BY_THREE}",
    ),
    "mlcd, with a rotary embedding beside": (
        lambda: MLCDVisionModel(MLCDVisionConfig(**SIZES, **IMAGE)),
        pixels(2, 3, 24, 24),
        1,
        (3, 3),
        f"- {THREE_BY_THREE}",
    ),
    "dpt": (
        lambda: DPTModel(DPTConfig(**SIZES, **IMAGE, backbone_out_indices=[0, 1, 1, 1]), add_pooling_layer=False),
        pixels(2, 3, 24, 24),
        1,
        (3, 3),
        f"- {THREE_BY_THREE}",
    ),
    "siglip": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, **IMAGE)),
        pixels(2, 3, 24, 24),
        0,
        (3, 3),
        THREE_BY_THREE,
    ),
}


def written(places: torch.Tensor) -> str:
    return " ".join("-" if row < 0 else f"{row}{column}" for row, column in places.tolist())


@pytest.mark.parametrize(("how", "inputs", "prefix", "shape", "places"), TOWERS.values(), ids=TOWERS)
@torch.no_grad()
def test_images_of_one_size(
    how: Callable[[], nn.Module], inputs: dict[str, Any], prefix: int, shape: tuple[int, int], places: str
) -> None:
    model = make(how)
    plain = first(model, inputs)
    before = [{key: len(value) for key, value in vars(m).items() if key.endswith("_hooks")} for m in model.modules()]
    patchattn.patch_model(model, "reads")
    assert torch.equal(first(model, inputs), plain)
    assert len(SEEN) == 2
    for _, grid in SEEN:
        assert (grid.prefix, grid.shape) == (prefix, shape)
        assert written(grid.places[0]) == places
        assert grid.extents.tolist() == [[[0, 0]] * prefix + [list(shape)] * (shape[0] * shape[1])]
        assert grid.images.tolist() == [[-1] * prefix + [0] * (shape[0] * shape[1])]
    patchattn.unpatch_model(model)
    assert torch.equal(first(model, inputs), plain)
    after = [{key: len(value) for key, value in vars(m).items() if key.endswith("_hooks")} for m in model.modules()]
    assert before == after


@pytest.mark.parametrize(("how", "inputs", "prefix", "shape", "places"), TOWERS.values(), ids=TOWERS)
@torch.no_grad()
def test_a_pixel_reaches_the_token_of_its_patch(
    how: Callable[[], nn.Module], inputs: dict[str, Any], prefix: int, shape: tuple[int, int], places: str
) -> None:
    """Of the first layer's queries, in the unpatched model: what the grids written out above say."""
    model, queries = make(how), []

    def see(call: patchattn.AttentionCall, output: torch.Tensor) -> None:
        queries.append(call.query[0].clone())

    with patchattn.probed(model, see, layers=0):
        model(**inputs)
        for row in range(shape[0]):
            for column in range(shape[1]):
                moved = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
                moved["pixel_values"][0, :, 8 * row + 5, 8 * column + 2] += 1.0
                model(**moved)
                changed = (queries[-1] != queries[0]).any(-1).any(0).nonzero().flatten().tolist()
                assert changed == [places.split().index(f"{row}{column}")]


@torch.no_grad()
def test_one_model_on_several_sizes() -> None:
    model = patchattn.patch_model(make(vit), "reads")
    for height, width in ((24, 24), (16, 40), (40, 16), (24, 24)):
        SEEN.clear()
        model(**pixels(1, 3, height, width), interpolate_pos_encoding=True)
        assert [grid.shape for _, grid in SEEN] == [(height // 8, width // 8)] * 2
    assert written(SEEN[0][1].places[0]) == f"- {THREE_BY_THREE}"


@torch.no_grad()
def test_one_size_to_a_row_of_the_batch() -> None:
    """SigLIP 2 NaFlex: each image has its own numbers of rows and columns, and padding behind."""
    model = make(lambda: Siglip2VisionModel(Siglip2VisionConfig(**SIZES, patch_size=8, num_patches=16)))
    shapes, mask = torch.tensor([[2, 3], [3, 2]]), torch.tensor([[1] * 6 + [0] * 2] * 2)
    inputs = {**pixels(2, 8, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    plain = first(model, inputs)
    patchattn.patch_model(model, "reads")
    torch.testing.assert_close(first(model, inputs)[mask.bool()], plain[mask.bool()])
    for _, grid in SEEN:
        assert (grid.prefix, grid.shape) == (0, None)
        assert written(grid.places[0]) == "00 01 02 10 11 12 - -"
        assert written(grid.places[1]) == "00 01 10 11 20 21 - -"
        assert grid.extents.tolist() == [[[2, 3]] * 6 + [[0, 0]] * 2, [[3, 2]] * 6 + [[0, 0]] * 2]
        assert grid.images.tolist() == [[0] * 6 + [-1] * 2] * 2
    wrong = {**inputs, "spatial_shapes": torch.tensor([[2, 3], [2, 2]])}
    with pytest.raises(NotImplementedError, match=r"images of \[\[2, 3\], \[2, 2\]\] patches do not fit"):
        model(**wrong)


@torch.no_grad()
def test_all_images_in_one_row() -> None:
    model = make(lambda: PixtralVisionModel(PixtralVisionConfig(**SIZES, image_size=64, patch_size=8)))
    inputs = {**pixels(2, 3, 32, 24), "image_sizes": torch.tensor([[16, 24], [32, 8]])}
    plain = first(model, inputs)
    patchattn.patch_model(model, "reads")
    assert torch.equal(first(model, inputs), plain)
    for _, grid in SEEN:
        assert (grid.prefix, grid.shape) == (0, None)
        assert written(grid.places[0]) == "00 01 02 10 11 12 00 10 20 30"
        assert grid.extents.tolist() == [[[2, 3]] * 6 + [[4, 1]] * 4]
        assert grid.images.tolist() == [[0] * 6 + [1] * 4]


@torch.no_grad()
def test_one_call_to_an_image_and_frame() -> None:
    """Qwen2-VL: patches in blocks of 2 x 2, frames one after another, each in a call of its own."""
    model, inputs = make(qwen2), qwen(8 + 2 * 8, [[1, 2, 4], [2, 4, 2]])
    plain = first(model, inputs)
    patchattn.patch_model(model, "reads")
    assert torch.equal(first(model, inputs), plain)
    wide, high = "00 01 10 11 02 03 12 13", "00 01 10 11 20 21 30 31"
    for calls in (SEEN[:3], SEEN[3:]):
        assert [written(grid.places[0]) for _, grid in calls] == [wide, high, high]
        assert [grid.shape for _, grid in calls] == [(2, 4), (4, 2), (4, 2)]
        assert all(grid.prefix == 0 and set(grid.images.flatten().tolist()) == {0} for _, grid in calls)
    assert len(SEEN) == 6


@torch.no_grad()
def test_one_call_to_a_window() -> None:
    """Qwen2.5-VL: blocks of patches in the order of windows, in all layers; a call to a window, or to an image."""
    model, inputs = make(qwen2_5), qwen(24 + 8, [[1, 4, 6], [1, 2, 4]])
    plain = first(model, inputs)
    patchattn.patch_model(model, "reads")
    assert torch.equal(first(model, inputs), plain)
    left = "00 01 10 11 02 03 12 13 20 21 30 31 22 23 32 33"
    right, second = "04 05 14 15 24 25 34 35", "00 01 10 11 02 03 12 13"
    assert [(name, written(grid.places[0])) for name, grid in SEEN] == [
        ("blocks.0.attn", left),
        ("blocks.0.attn", right),
        ("blocks.0.attn", second),
        ("blocks.1.attn", f"{left} {right}"),
        ("blocks.1.attn", second),
    ]
    assert [grid.shape for _, grid in SEEN] == [(4, 6), (4, 6), (2, 4), (4, 6), (2, 4)]


@torch.no_grad()
def test_the_text_tower_beside_a_vision_tower() -> None:
    vision, text = {**SIZES, **IMAGE}, {**SIZES, "vocab_size": 64, "eos_token_id": 2}
    model = make(lambda: CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)))
    with pytest.raises(NotImplementedError, match=r"text_model.* before its layers nothing cuts images into patches"):
        patchattn.patch_model(model, "reads")
    patchattn.patch_model(model, "reads", modules="vision_model")
    model(**pixels(2, 3, 24, 24), input_ids=torch.tensor([[5, 6, 2]]))
    assert [grid.shape for _, grid in SEEN] == [(3, 3)] * 2


@torch.no_grad()
def test_the_tower_of_a_vision_language_model() -> None:
    model, inputs = vlms.make("llava"), vlms.inputs("llava")
    plain = outputs(model, **inputs)[0]
    patchattn.patch_model(model, "reads", modules="vision_tower")
    assert torch.equal(outputs(model, **inputs)[0], plain)
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    assert SEEN
    assert all((grid.prefix, grid.shape) == (1, (side, side)) for _, grid in SEEN)
