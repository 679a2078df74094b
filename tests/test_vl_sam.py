"""VL-SAM's attention flow (arXiv 2410.05963) against matrices written out in numpy, and boxes against drawn maps."""

import numpy as np
import pytest
import torch

from patchattn.inspection.vl_sam import boxes, image_flow
from patchattn.plotting.image_flow import plot_image_flow

from . import vlms


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_flow_through_all_layers(name: str) -> None:
    model, inputs = vlms.make(name), vlms.inputs(name)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    ids, real = inputs["input_ids"][1], inputs["attention_mask"][1].bool()
    length, flow = int(real.sum()), None
    for layer in maps:
        weights = layer[1][:, real][:, :, real].double().numpy()
        mean = sum(one.max(-1).mean() * one for one in weights) / len(weights)
        one = np.eye(length)
        flow = (one + mean) @ (one + (0 if flow is None else flow))
        for column in range(length):
            flow[:, column] *= 1 - (length - column - 1) / length  # seen by itself and all behind it
    image = (ids[real] == vlms.IMAGE).numpy()
    found = image_flow(model, inputs, row=1)
    want = flow[-1][image]
    np.testing.assert_allclose(found.grid.flatten().numpy(), want / want.max(), rtol=1e-4)
    assert found.layers == 2
    word = int(real.nonzero()[-2])
    other = image_flow(model, inputs, row=1, queries=word).grid.flatten().numpy()
    np.testing.assert_allclose(other, flow[-2][image] / flow[-2][image].max(), rtol=1e-4)


def test_boxes_are_around_parts_that_hang_together_by_their_sides() -> None:
    grid = torch.tensor(
        [
            [0.9, 0.6, 0.0, 0.0],
            [0.0, 0.0, 1.0, 0.0],
            [0.0, 0.0, 0.8, 0.4],
        ],
        dtype=torch.float64,
    )
    first, second = boxes(grid, 0.5)
    assert (first.left, first.top, first.right, first.bottom) == (0.5, 1 / 3, 0.75, 1.0)
    assert first.point == (2.5 / 4, 1.5 / 3)
    assert first.share == pytest.approx(1.8 / 3.7)
    assert (second.left, second.top, second.right, second.bottom) == (0.0, 0.0, 0.5, 1 / 3)
    assert len(boxes(grid, 0.95)) == 1


def test_the_picture_has_a_frame_for_every_box() -> None:
    found = image_flow(vlms.make("llava"), vlms.inputs("llava"))
    (axes, _) = plot_image_flow(np.zeros((20, 30, 3), dtype=np.uint8), found).axes
    assert len(axes.patches) == len(found.boxes) >= 1


def test_what_cannot_be_is_refused() -> None:
    model, inputs = vlms.make("llava"), vlms.inputs("llava")
    with pytest.raises(ValueError, match="threshold must be above 0 and at most 1, got 0"):
        image_flow(model, inputs, threshold=0)
    with pytest.raises(ValueError, match="chooses no token"):
        image_flow(model, inputs, queries=1)
    with pytest.raises(NotImplementedError, match="no place in the picture"):
        image_flow(vlms.make("instructblip"), vlms.inputs("instructblip"))
