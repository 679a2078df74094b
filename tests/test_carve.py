"""CARVE (arXiv 2509.06461) against attention of a model that is run token by token."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchattn.cli.main import main
from patchattn.inspection.carve import carve, kept_parts
from patchattn.vision.prompts import image_prompt

from .recipes import recipe


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, Any]:
    """An untrained LLaVA and its processor."""
    module = recipe("train_tiny_vlm")
    settings = module.TinyVLMSettings(output="none", steps=1, vision_width=32, text_width=32, patch_size=12)
    processor = module.make_processor(settings)
    torch.manual_seed(0)
    model = module.make_model(settings, processor.tokenizer).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4)
    model.generation_config.eos_token_id = None
    return model, processor


@pytest.fixture
def picture() -> Any:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_contrast_of_two_answers_step_by_step(vlm: tuple[Any, Any], picture: Any) -> None:
    model, processor = vlm
    how = {"general": "a yellow circle", "suffix": "?", "layers": [0, 1], "steps": 3}
    found = carve(model, processor, picture, "Is there a square", **how)
    model.set_attn_implementation("eager")
    maps = []
    for text in ("Is there a square ?", "a yellow circle ?"):
        given, steps = image_prompt(processor, [picture], text, model), []
        image = given["input_ids"][0] == processor.image_token_id
        for _ in range(3):
            with torch.no_grad():
                out = model(**given, output_attentions=True)
            layers = [layer[0, :, -1].double().mean(0)[: len(image)][image] for layer in out.attentions[:2]]
            steps.append(torch.stack(layers))
            token = out.logits[:, -1:].argmax(-1)
            given["input_ids"] = torch.cat([given["input_ids"], token], dim=1)
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        maps.append(steps)
    side = int(image.sum()) ** 0.5
    total = sum((t + 1) * ((q + 1e-8) / (g + 1e-8)).sum(0) for t, (q, g) in enumerate(zip(*maps, strict=True)))
    small = Image.fromarray(total.view(int(side), int(side)).float().numpy(), mode="F")
    want = np.asarray(small.resize(picture.size, Image.Resampling.BILINEAR))
    np.testing.assert_allclose(found.contrast.numpy(), want, rtol=1e-3, atol=1e-3)
    model.set_attn_implementation("sdpa")


def test_a_question_that_is_the_general_one_keeps_the_whole_picture(vlm: tuple[Any, Any], picture: Any) -> None:
    model, processor = vlm
    text = "Is there a square"
    found = carve(model, processor, picture, text, general=text, suffix="?", layers=[1], steps=2)
    assert bool(found.kept.all())
    assert found.box == (0, 0, 60, 40)
    assert np.array_equal(np.asarray(found.cut), np.asarray(picture))


def test_regions_with_the_largest_sums_stay() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    values = torch.rand(24, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for share, least in ((0.2, 3), (0.3, 1), (1.0, 1)):
        array = values.numpy()
        large = array >= np.percentile(array, 100 * (1 - share))
        labels, count = ndimage.label(large)
        sums = ndimage.sum(array, labels, range(1, count + 1))
        best = np.argsort(-sums)[: max(least, int(count * share))] + 1
        assert np.array_equal(kept_parts(values, share, least).numpy(), np.isin(labels, best))


def test_the_cut_is_black_where_nothing_stays(vlm: tuple[Any, Any], picture: Any) -> None:
    model, processor = vlm
    found = carve(model, processor, picture, "Is there a square", suffix="?", general="a circle", layers=[0], steps=1)
    left, top, right, bottom = found.box
    assert not found.kept[:top].any()
    assert not found.kept[:, right:].any()
    assert found.kept[top:bottom, left:right].any(0).any()
    assert found.cut.width >= 60
    assert found.cut.height >= 40
    assert 0.15 < float(found.kept.float().mean()) <= 0.25


def test_command(vlm: tuple[Any, Any], picture: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = vlm
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    picture.save(tmp_path / "picture.png")
    files = [str(tmp_path / name) for name in ("model", "picture.png", "cut.png", "flow.png")]
    command = ["carve", files[0], "Is there a square", "--image", files[1], "--output", files[2], "--device", "cpu"]
    for line, code in (([*command, "--layer", "1", "--steps", "2"], 0), (command, 2)):
        with pytest.raises(SystemExit) as left:
            main(line)
        assert (left.value.code or 0) == code
    out = capsys.readouterr()
    assert "with the cut: " in out.out
    assert "no layer" in out.err  # the paper's layers are not in so small a model
    assert (tmp_path / "cut.png").exists()
    with pytest.raises(SystemExit) as left:
        main(["plot", "image-flow", files[0], "--image", files[1], "--prompt", "a square", "--output", files[3]])
    assert not left.value.code
    assert "%" in capsys.readouterr().out
    assert (tmp_path / "flow.png").exists()


def test_what_cannot_be_is_refused(vlm: tuple[Any, Any], picture: Any) -> None:
    model, processor = vlm
    with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
        carve(model, processor, picture, "what", share=0.0)
    with pytest.raises(ValueError, match="no layer 9"):
        carve(model, processor, picture, "what", layers=[9])
