"""Image-token spans against what the models themselves do with them."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from patchattn import ImageSpan, image_spans, image_token_mask

from . import vlms
from .families import FAMILIES


def sizes(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: inputs[name] for name in ("image_sizes", "image_grid_thw") if name in inputs}


@pytest.mark.parametrize("name", vlms.VLMS)
def test_mask_is_where_pictures_matter(name: str) -> None:
    """Other pixels change the embeddings of exactly these tokens (but for newlines, which are always the same)."""
    model, inputs = vlms.make(name), vlms.inputs(name, rows=3)
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["inputs_embeds"])

    language = model.get_submodule("language_model" if name == "instructblip" else "model.language_model")
    handle = language.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for pixels in (inputs["pixel_values"], inputs["pixel_values"].flip(0, -1)):
            model(**{**inputs, "pixel_values": pixels})
    handle.remove()
    changed = (seen[0] != seen[1]).any(-1)
    mask = image_token_mask(model, inputs["input_ids"])
    newlines = torch.zeros_like(mask)
    spans = image_spans(model, inputs["input_ids"], **sizes(inputs))
    covered = torch.zeros_like(mask)
    for span in spans:
        covered[span.row, span.start : span.stop] = True
        newlines[span.row, list(span.newlines)] = True
    assert torch.equal(covered, mask)
    assert torch.equal(changed | newlines, mask)
    assert not bool((changed & newlines).any())
    assert [span.row for span in spans] == [0, 1, 2]


def test_llava_next_newlines_are_the_models_newline() -> None:
    model, inputs = vlms.make("llava_next"), vlms.inputs("llava_next", rows=4)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    for span, tokens in zip(image_spans(model, inputs["input_ids"], **sizes(inputs)), features, strict=True):
        assert len(span) == len(tokens)
        ends = (tokens == model.model.image_newline).all(-1).nonzero()[:, 0] + span.start
        assert tuple(ends.tolist()) == span.newlines
        assert span.grid == (4, 4)
        rows, columns = span.tiled_grid
        assert rows == len(span.newlines)
        assert all(right - left == columns + 1 for left, right in pairwise(span.newlines))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90))
def test_llava_next_counts_as_the_model_does(height: int, width: int) -> None:
    """For any size of picture: what the model makes of it has as many tokens as its span."""
    model = _next_model()
    count = tf.models.llava_next.modeling_llava_next.image_size_to_num_patches((height, width), vlms.PINPOINTS, 16)
    grid = torch.zeros(count, 16, 2)
    (packed,), _ = model.pack_image_features(
        [grid], torch.tensor([[height, width]]), "default", image_newline=torch.ones(2)
    )
    ids = torch.cat([torch.tensor([5]), torch.full((len(packed),), vlms.IMAGE), torch.tensor([6])])[None]
    (span,) = image_spans(model, ids, image_sizes=[(height, width)])
    assert (span.start, span.stop) == (1, 1 + len(packed))
    assert [at - 1 for at in span.newlines] == (packed == 1).all(-1).nonzero()[:, 0].tolist()


_MODELS: list[Any] = []


def _next_model() -> Any:
    if not _MODELS:
        _MODELS.append(vlms.make("llava_next"))
    return _MODELS[0]


def test_grids() -> None:
    model, inputs = vlms.make("qwen2_5_vl"), vlms.inputs("qwen2_5_vl", rows=3)
    spans = image_spans(model, inputs["input_ids"], **sizes(inputs))
    assert [span.grid for span in spans] == [(2, 2), (4, 2), (2, 6)]
    assert image_spans(vlms.make("instructblip"), vlms.inputs("instructblip", rows=1)["input_ids"]) == [
        ImageSpan(row=0, start=2, stop=5)
    ]


def test_images_side_by_side_are_told_apart() -> None:
    model = vlms.make("llava")
    ids = torch.full((2, 34), vlms.IMAGE)
    ids[0, [0, 33]], ids[1, :18] = 5, 6
    assert image_spans(model, ids) == [
        ImageSpan(0, 1, 17, (4, 4)),
        ImageSpan(0, 17, 33, (4, 4)),
        ImageSpan(1, 18, 34, (4, 4)),
    ]


def test_a_class_token_that_is_kept_counts() -> None:
    model = vlms.make("llava")
    model.config.vision_feature_select_strategy = "full"
    ids = torch.full((1, 17), vlms.IMAGE)
    assert image_spans(model, ids) == [ImageSpan(0, 0, 17, (4, 4))]


class TestErrors:
    def test_no_image(self) -> None:
        with pytest.raises(ValueError, match="There is no image in the input: none of its tokens is 63"):
            image_token_mask(vlms.make("llava"), torch.tensor([[1, 2, 3]]))
        with pytest.raises(ValueError, match="There is no image"):
            image_spans(vlms.make("llava"), torch.tensor([[1, 2, 3]]))

    @pytest.mark.parametrize("family", ["llama", "clip", "bert"])
    def test_no_known_vision_language_model(self, family: str) -> None:
        with pytest.raises(NotImplementedError, match=f"'{family}'.*instructblip, llava, llava_next, qwen2_5_vl"):
            image_token_mask(FAMILIES[family].make(), torch.tensor([[1]]))

    def test_several_layers(self) -> None:
        model = vlms.make("llava")
        for layer in ([-2, -1], 0):
            model.config.vision_feature_layer = layer
            with pytest.raises(NotImplementedError, match="vision_feature_layer="):
                image_token_mask(model, torch.tensor([[63]]))

    def test_numbers_that_do_not_fit(self) -> None:
        model = vlms.make("llava")
        for length in (15, 17):
            with pytest.raises(ValueError, match="do not fit"):
                image_spans(model, torch.full((1, length), vlms.IMAGE))
        model, inputs = vlms.make("llava_next"), vlms.inputs("llava_next", rows=2)
        sizes = inputs["image_sizes"].tolist()
        for wrong in (sizes[:1], sizes[::-1], [*sizes, [9, 9]]):
            with pytest.raises(ValueError, match="do not fit"):
                image_spans(model, inputs["input_ids"], image_sizes=wrong)

    @pytest.mark.parametrize(("name", "missing"), [("llava_next", "image_sizes"), ("qwen2_5_vl", "image_grid_thw")])
    def test_sizes_that_are_needed(self, name: str, missing: str) -> None:
        with pytest.raises(ValueError, match=f"pass {missing}="):
            image_spans(vlms.make(name), vlms.inputs(name)["input_ids"])

    def test_no_batch(self) -> None:
        with pytest.raises(ValueError, match=r"must be a tensor .B, T."):
            image_token_mask(vlms.make("llava"), torch.tensor([63]))
