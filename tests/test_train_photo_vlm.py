"""The recipe for a VLM of two models that exist, and its pictures: photographs, rows, training, resuming."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from patchattn.evaluation.metrics.chair import SynonymTable
from patchattn.evaluation.tasks import collages
from patchattn.evaluation.tasks.company import KINDS, Company

from .photo_vlm import CLASSES, parts, photographs
from .recipes import RECIPES, recipe

TINY = {
    "pixels": 56,
    "pictures": 24,
    "eval_pictures": 4,
    "questions": 2,
    "align_steps": 60,
    "align_batch": 64,
    "align_learning_rate": 0.01,
    "lora_rank": 2,
    "lora_targets": r".*language_model.*\.(q|v)_proj",
    "steps": 4,
    "batch": 4,
    "eval_batch": 4,
    "log_steps": 2,
}


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return recipe("train_photo_vlm")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {**TINY, **parts(tmp_path_factory.mktemp("parts"))}


@pytest.fixture(scope="module")
def trained(module: ModuleType, given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "vlm"
    module.run(module.PhotoVLMSettings(output=str(folder), **given))
    return folder


# Pictures


def test_pictures_show_what_their_captions_say(given: dict[str, Any], tmp_path: Path) -> None:
    photos = collages.Photos(given["photos"])
    assert photos.classes == CLASSES
    (tmp_path / "names.txt").write_text(collages.synonym_table(CLASSES))
    table = SynonymTable(tmp_path / "names.txt")
    counts = set()
    for index in range(30):
        scene = photos.scene(0, index)
        pixels = np.asarray(scene.picture(56)).astype(int)
        shown = []
        for cell in range(4):
            red, green, _ = pixels[cell // 2 * 28 + 14, cell % 2 * 28 + 14]
            shown += [CLASSES[red // 30]] if red + green == 255 else []
        assert shown == list(scene.objects) == table.mentions(scene.caption())
        assert scene.present() in scene.objects
        assert not {scene.absent(kind) for kind in KINDS} & set(scene.objects)
        counts.add(len(shown))
    assert counts == {1, 2, 3, 4}


def test_absent_objects_are_of_their_kind() -> None:
    company = Company(CLASSES, 3)
    near = set(company.companions("cat"))
    assert near == {"frog", "ship"}
    for number in range(20):
        assert company.absent(["cat"], "adversarial", (0, number)) in near
        assert company.absent(["cat"], "popular", (0, number)) in set(company.popular) - {"cat"}
    with pytest.raises(ValueError, match="more than 7 and no multiple of it, got 14"):
        Company([str(i) for i in range(14)], 3)


@pytest.mark.parametrize(("name", "said"), [("cat", "a cat"), ("airplane", "an airplane")])
def test_articles(name: str, said: str) -> None:
    assert collages.question(name) == f"Is there {said} in the image?"


def test_no_photographs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no zip file '.*none.zip'"):
        collages.Photos(tmp_path / "none.zip")


# The recipe


def test_rows_are_the_prompts_of_the_processor(module: ModuleType, given: dict[str, Any]) -> None:
    """Each request of a row, cut out with the picture before it, is what the processor makes of it alone."""
    settings = module.PhotoVLMSettings(output="none", **given)
    processor = module.make_processor(settings)
    data = module.Pictures(settings, processor, torch.zeros(4, 17, 16), evaluate=True)
    row, scene = data[1], collages.Photos(given["eval_photos"]).scene(module.EVAL_SEED, 1)
    asked = [collages.question(scene.absent(k) if i else scene.present()) for k in KINDS for i in range(2)]
    for number, text in enumerate([*asked, collages.CAPTION_REQUEST]):
        last = int(data.keep[2 * number])  # the request's last token
        seen = row["attention_mask"][0, last].nonzero()[:, 0]
        content = [{"type": "image"}, {"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        alone = processor(images=scene.picture(56), text=prompt, return_tensors="pt")["input_ids"][0]
        assert torch.equal(row["input_ids"][seen], alone)
        assert torch.equal(row["position_ids"][seen], torch.arange(len(alone)))
    said = processor.tokenizer.convert_ids_to_tokens(row["labels"][: 4 * len(KINDS) : 2])
    assert said == ["Yes", "No"] * 3
    caption = row["labels"][4 * len(KINDS) :]
    assert torch.equal(row["input_ids"][-len(caption) :][caption != -100], caption[caption != -100])
    wanted = processor.tokenizer(scene.caption() + "<|im_end|>").input_ids
    assert caption[caption != -100].tolist() == wanted


def test_it_trains(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert metrics["patches_named"] > 0.5  # one of eight by chance
    assert 0 <= metrics["after"]["accuracy"] <= 1
    assert 0 <= metrics["after"]["caption_tokens"] <= 1


def test_what_it_writes_is_the_model_that_was_trained(module: ModuleType, given: dict[str, Any], trained: Path) -> None:
    """Loaded by Auto classes, with its own encoder on pictures and each request alone, it has the last loss."""
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(trained).eval(),
        AutoProcessor.from_pretrained(trained),
    )
    photos, losses, right = collages.Photos(given["eval_photos"]), [], []
    for index in range(TINY["eval_pictures"]):
        scene = photos.scene(module.EVAL_SEED, index)
        turns = [(scene.present(), "Yes"), *((scene.absent(kind), "No") for kind in KINDS)]
        turns = [(collages.question(name), said) for name, said in turns]
        turns = [turns[0], turns[1], turns[0], turns[2], turns[0], turns[3]]
        for text, said in [*turns, (collages.CAPTION_REQUEST, scene.caption())]:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(images=scene.picture(56), text=f"{asked}{said}<|im_end|>", return_tensors="pt")
            count = len(processor.tokenizer(f"{said}<|im_end|>", add_special_tokens=False).input_ids)
            with torch.inference_mode():
                logits = model(**inputs).logits[0, -count - 1 : -1]
            wanted = inputs["input_ids"][0, -count:]
            losses += torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
            right += [int(logits[0].argmax()) == int(wanted[0])] if said in ("Yes", "No") else []
    after = json.loads((trained / "metrics.json").read_text())["after"]
    assert np.mean(losses) == pytest.approx(after["loss"], abs=1e-3)
    assert np.mean(right) == pytest.approx(after["accuracy"], abs=0.05)


def test_a_killed_run_continues(
    module: ModuleType, given: dict[str, Any], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = module.PhotoVLMSettings(output=str(tmp_path / "out"), **given, save_steps=2)
    saved = module.AnswersTrainer._save_checkpoint

    def save_and_die(self: Any, *arguments: Any, **more: Any) -> None:
        saved(self, *arguments, **more)
        self.callback_handler.on_save(self.args, self.state, self.control)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.AnswersTrainer, "_save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            module.run(half)
    metrics = module.run(half)
    assert metrics["resumed_from"] == "checkpoint-2"
    assert metrics["patches_named"] is None
    whole, continued = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "out"))
    assert whole.keys() == continued.keys()
    for name, value in whole.items():
        torch.testing.assert_close(value, continued[name], msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"variants": {"moh": {}}}, "variants: this recipe trains a plain model"),
        ({"pixels": 40}, "pixels must be a multiple of 28, 2 patches, got 40"),
        ({"photos": "none.zip"}, "There is no zip file 'none.zip'"),
    ],
)
def test_bad_configurations_are_refused(
    module: ModuleType, given: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        module.PhotoVLMSettings.from_dict({"output": "none", **given, **changes})


def test_other_classes_are_refused(module: ModuleType, given: dict[str, Any], tmp_path: Path) -> None:
    import zipfile

    path = photographs(tmp_path / "more.zip", 1, 0)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train/truck/0.png", b"")
    with pytest.raises(ValueError, match="must show the same classes"):
        module.PhotoVLMSettings(output="none", **{**given, "eval_photos": path})


def test_the_shipped_configuration_names_settings_that_exist(module: ModuleType) -> None:
    import yaml

    shipped = yaml.safe_load((RECIPES / "configs" / "photo_vlm.yaml").read_text())
    assert shipped.keys() <= set(module.PhotoVLMSettings.__dataclass_fields__)
