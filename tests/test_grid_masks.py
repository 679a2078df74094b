"""Masks over the grid of patches: on which towers, whatever their tokens, and in tiles or under a mask."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    DeiTConfig,
    DeiTModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    HieraConfig,
    HieraModel,
    PixtralVisionConfig,
    PixtralVisionModel,
    SamVisionConfig,
    SamVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SwinConfig,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
    ViTMAEConfig,
    ViTMAEModel,
)

import patchattn
from patchattn.reading import grid_tiles

from .families import FAMILIES
from .grid_masks import Place, assert_sees, attention, image, made, tiled
from .grids import IMAGE, SIZES, first, make, pixels, qwen, qwen2, qwen2_5, vit


def near(layer: int, head: int, query: Place, key: Place) -> bool:
    """Windows of 2 x 2, not shifted."""
    return all(q // 2 == k // 2 for q, k in zip(query, key, strict=True))


PLAIN = {"size": 2, "shifted": "none"}


@pytest.mark.parametrize(
    ("how", "shape", "prefix"),
    [
        (lambda: DeiTModel(DeiTConfig(**SIZES, **IMAGE)), (3, 3), 2),
        (
            lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, **IMAGE, num_register_tokens=4)),
            (3, 2),
            5,
        ),
    ],
    ids=["class and distillation token", "class token and registers"],
)
def test_tokens_before_the_patches_see_all_and_are_seen_by_all(
    monkeypatch: pytest.MonkeyPatch, how: Callable[[], nn.Module], shape: Place, prefix: int
) -> None:
    inputs = pixels(2, 3, 8 * shape[0], 8 * shape[1])
    assert_sees(monkeypatch, "window", PLAIN, shape, near, how=how, inputs=inputs, prefix=prefix)


def keep_of(places: list[Any], numbers: list[int]) -> torch.Tensor:
    """`(1, T, T)`: windows of 2 x 2 of images by their numbers; padding, at `None`, sees all."""
    return torch.tensor(
        [
            [q is None or (k is not None and m == n and near(0, 0, q, k)) for k, n in zip(places, numbers, strict=True)]
            for q, m in zip(places, numbers, strict=True)
        ]
    )[None]


def product(rows: int, columns: int) -> list[Place]:
    return [(row, column) for row in range(rows) for column in range(columns)]


def noted(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[Any, torch.Tensor]]:
    """Calls of the first layer as the model made them, and what came out."""
    calls: list[tuple[Any, torch.Tensor]] = []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: calls.append((call, output)), layers=0):
        model(**inputs)
    return calls


def matches(call: Any, output: torch.Tensor, row: int, keep: torch.Tensor, real: int) -> None:
    states = (tensor[row : row + 1] for tensor in (call.query, call.key, call.value))
    expected = attention(*states, call.scaling, keep)[0, :real]
    torch.testing.assert_close(output[row, :real].double(), expected, rtol=1e-4, atol=1e-5)


def test_images_of_several_sizes_in_a_batch() -> None:
    """SigLIP 2: an image to a row, padded behind."""
    model = make(lambda: Siglip2VisionModel(Siglip2VisionConfig(**SIZES, patch_size=8, num_patches=16)))
    shapes, mask = torch.tensor([[2, 3], [3, 2]]), torch.tensor([[1] * 6 + [0] * 2] * 2)
    inputs = {**pixels(2, 8, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    patchattn.patch_model(model, "window", PLAIN)
    ((call, output),) = noted(model, inputs)
    for row, (shape, real) in enumerate((((2, 3), 6), ((3, 2), 6))):
        places = [*product(*shape), *[None] * (8 - real)]
        matches(call, output, row, keep_of(places, [0] * real + [-1] * (8 - real)), real)


def test_images_in_one_row() -> None:
    model = make(lambda: PixtralVisionModel(PixtralVisionConfig(**SIZES, image_size=64, patch_size=8)))
    inputs = {**pixels(2, 3, 32, 24), "image_sizes": torch.tensor([[16, 24], [32, 16]])}
    patchattn.patch_model(model, "window", PLAIN)
    ((call, output),) = noted(model, inputs)
    matches(call, output, 0, keep_of(product(2, 3) + product(4, 2), [0] * 6 + [1] * 8), 14)


@pytest.mark.parametrize("always", [True, False])
def test_patches_in_an_order_of_their_own(monkeypatch: pytest.MonkeyPatch, always: bool) -> None:
    """Qwen2-VL: blocks of 2 x 2, one after another; heads have a kernel each."""
    model = patchattn.patch_model(make(qwen2), "neighborhood", kernel=[2, 3], several="heads")
    blocks = [(y + i, x + j) for y in (0, 2) for x in (0, 2) for i in (0, 1) for j in (0, 1)]
    sides = [made("neighborhood", kernel=kernel).sees(4, 4)[0].rows for kernel in (2, 3)]
    keep = torch.tensor([[[c in side[a] and d in side[b] for c, d in blocks] for a, b in blocks] for side in sides])
    with tiled(monkeypatch, always) as counts:
        ((call, output),) = noted(model, qwen(16, [[1, 4, 4]]))
    assert bool(counts) is always
    matches(call, output, 0, keep, 16)


def test_a_call_on_a_part_of_an_image_is_refused() -> None:
    """Qwen2.5-VL attends over windows; an image that is one window is whole."""
    model = patchattn.patch_model(make(qwen2_5), "window", size=2)
    with pytest.raises(NotImplementedError, match=r"16 patches of an image of 4 x 6, as in windows.*layers="):
        model(**qwen(24, [[1, 4, 6]]))
    assert model(**qwen(16, [[1, 4, 4]])) is not None
    patchattn.patch_model(patchattn.unpatch_model(model), "window", size=2, layers=1)
    assert model(**qwen(24, [[1, 4, 6]])) is not None


def test_a_bias_that_comes_as_the_mask_stays() -> None:
    """BEiT: what is seen gets its bias as before."""
    model = make(lambda: BeitModel(BeitConfig(**SIZES, **IMAGE, use_relative_position_bias=True)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias_table" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    patchattn.patch_model(model, "window", PLAIN)
    ((call, output),) = noted(model, pixels(2, 3, 24, 24))
    added = call.mask.added()
    assert added.abs().max() > 1
    logits = call.query.double() @ call.key.mT.double() * call.scaling + added
    keep = torch.ones(10, 10, dtype=torch.bool)
    keep[1:, 1:] = keep_of(product(3, 3), [0] * 9)[0]
    expected = (logits.masked_fill(~keep, -torch.inf).softmax(-1) @ call.value.double()).transpose(1, 2)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


def test_several_sizes_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fresh = (patchattn.patch_model(make(vit), "neighborhood", kernel=3) for _ in range(2))
    with torch.no_grad(), tiled(monkeypatch, True):
        found = [first(model, image(*shape)) for shape in ((4, 4), (3, 6), (4, 4))]
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], first(fresh, image(3, 6)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "swin": (
        lambda: SwinModel(
            SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4)
        ),
        pixels(1, 3, 32, 32),
        "as in windows",
    ),
    "swinv2": (
        lambda: Swinv2Model(
            Swinv2Config(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        pixels(1, 3, 32, 32),
        "as in windows",
    ),
    "hiera": (
        lambda: HieraModel(HieraConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])),
        {},
        "Window needs a vision tower: .*HieraMaskUnitAttention .* has no grid of patches that is known",
    ),
    "sam": (
        lambda: SamVisionModel(
            SamVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
        ),
        pixels(1, 3, 32, 32),
        r"SamVision\w+ .* has no grid of patches that is known",
    ),
    "vit_mae": (
        lambda: ViTMAEModel(ViTMAEConfig(**SIZES, **IMAGE)),
        pixels(1, 3, 24, 24),
        "its patch embedding says an order of its own",
    ),
    "llama": (FAMILIES["llama"].make, {}, "Window needs a vision tower: none of the chosen attention modules of Llama"),
}


@pytest.mark.parametrize(("how", "inputs", "text"), REFUSED.values(), ids=REFUSED)
def test_families_without_a_grid_are_refused_by_name(
    how: Callable[[], nn.Module], inputs: dict[str, Any], text: str
) -> None:
    model = make(how)
    with pytest.raises(NotImplementedError, match=text):
        patchattn.patch_model(model, "window", size=2)(**inputs)


def test_the_language_model_behind_a_tower_is_left_out() -> None:
    model = patchattn.patch_model(FAMILIES["llava"].make(), "window", size=2)
    (patch,) = patchattn.patch_info(model).patches
    assert patch["sites"]
    assert all("vision_tower" in name for name in patch["sites"])


def test_with_other_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order they are: who counts keys counts those that are seen. Behind the others it is in tiles."""
    model, found, tiles = make(vit), [], []
    for variants in (["ssmax", "window"], ["window", "ssmax"], ["window", "halo"]):
        settings = {name: {"window": PLAIN, "halo": {"block": 4, "halo": 0}}.get(name, {}) for name in variants}
        with torch.no_grad(), tiled(monkeypatch, True) as counts, patchattn.patched(model, variants, settings):
            found.append(first(model, image(4, 8)))
            tiles.append(bool(counts))
    assert tiles == [True, False, False]
    torch.testing.assert_close(found[0], found[1])
    with torch.no_grad(), patchattn.patched(model, "window", PLAIN):
        torch.testing.assert_close(found[2], first(model, image(4, 8)))  # of whose windows blocks are made


def test_what_is_read_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model, observed = patchattn.patch_model(make(vit), "axial", axes="rows"), []
    with torch.no_grad(), patchattn.observe(model, observed.append):
        for always in (True, False):
            with tiled(monkeypatch, always):
                model(**image(2, 4))
    for seen in observed:
        expected = torch.tensor([9.0] + [5.0] * 8) / 9
        torch.testing.assert_close(seen.values["density"], expected.expand_as(seen.values["density"]))


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("nothing_compiled")
def test_tiles_compile_and_have_the_gradients_of_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patchattn.patch_model(make(vit).double(), "neighborhood", kernel=3)
    pixels = {**image(5, 4), "pixel_values": image(5, 4)["pixel_values"].double()}
    gradients, results = [], []
    for always in (True, False):
        one = copy.deepcopy(model)
        with tiled(monkeypatch, always):
            output = first(one, pixels)
            output.square().mean().backward()
        results.append(output.detach())
        gradients.append([parameter.grad for parameter in one.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(grid_tiles, "_WORTH", float("inf"))
        first(model, pixels)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(first(compiled, pixels), results[0], rtol=1e-9, atol=1e-9)


def test_tiles_leave_out_most_of_the_work() -> None:
    """At 518 pixels and patches of 14, what windows and neighbourhoods multiply."""
    order = torch.arange(37 * 37) + 1
    for name, most in (("window", 0.05), ("neighborhood", 0.25)):
        (tiling,) = grid_tiles.tilings(made(name).sees(37, 37), order, 1, 6, torch.float32)
        of_patches = [tile for tile in tiling.tiles if tile.keys is not None]
        work = sum(tile.queries.numel() * tile.keys.shape[1] for tile in of_patches)
        assert work < most * 1370**2
    assert grid_tiles.tilings(made("neighborhood", kernel=15).sees(16, 16), order[:256], 1, 6, torch.float32) is None
