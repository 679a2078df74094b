"""The recipe for images: what it reads and refuses, its augmentation by brute force, training, resuming, processes."""

import json
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import patchattn

from .recipes import RECIPES, recipe, started, written

COLOURS = {"blue": (40, 60, 200), "green": (60, 190, 50), "red": (200, 50, 60)}
SIZE = 8
MOH = {"router": "learned", "active_heads": [4, 2], "shared_heads": [2, 1]}
TINY = {
    "image_size": SIZE,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return recipe("finetune_image_classification")


def make_images(folder: Path, counts: dict[str, int], classes: dict[str, tuple[int, ...]] = COLOURS) -> Path:
    """Noisy squares of one colour per class; sizes, modes and formats differ."""
    noise = np.random.default_rng(0)
    for split, count in counts.items():
        for name, colour in classes.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                side = SIZE if index % 3 else 11
                pixels = noise.normal(colour, 40, (side, side, 3)).clip(0, 255).astype(np.uint8)
                image = Image.fromarray(pixels).convert("RGBA" if index % 4 == 3 else "RGB")
                image.save(folder / split / name / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), {"train": 8, "test": 5})


@pytest.fixture
def settings(images: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "data": str(images),
        "output": str(tmp_path / "out"),
        "from_scratch": TINY,
        "variants": {"ssa": {}, "moh": MOH},
        "balance_weight": 0.01,
        "crop_padding": 1,
        "steps": 8,
        "batch": 4,
        "eval_batch": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "eval_steps": 3,
        "log_steps": 2,
    }


def processor(**size: int) -> Any:
    return transformers.ViTImageProcessorPil(size=size or {"height": SIZE, "width": SIZE})


def test_folders_and_zip_files_are_read_alike(module: ModuleType, images: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for file in sorted((images / split).rglob("*.png"), reverse=True):
                archive.write(file, file.relative_to(images))
    zips = [str(tmp_path / "train.zip"), str(tmp_path / "test.zip")]
    for split, count in (("train", 8), ("test", 5)):
        listed, zipped = module.list_images(str(images), split), module.list_images(zips, split)
        assert list(listed) == list(zipped) == sorted(COLOURS)
        for name, files in listed.items():
            assert [file.name for file in files] == [f"{index:03}.png" for index in range(count)]
            assert [file.read_bytes() for file in files] == [file.read_bytes() for file in zipped[name]]


def test_an_image_becomes_what_the_processor_makes_of_it(module: ModuleType, images: Path) -> None:
    classes = module.list_images(str(images), "test")
    for given in (processor(), processor(height=6, width=10)):
        items = module.Images(classes, given)
        assert len(items) == 15
        for index, item in enumerate(items[i] for i in range(15)):
            name, place = sorted(COLOURS)[index // 5], index % 5
            assert item["labels"] == index // 5
            image = Image.open(images / "test" / name / f"{place:03}.png").convert("RGB")
            expected = given(image, return_tensors="pt").pixel_values[0]
            torch.testing.assert_close(item["pixel_values"], expected, rtol=0, atol=1e-6)
            if image.size == (SIZE, SIZE) and expected.shape[1:] == (SIZE, SIZE):
                by_hand = (np.asarray(image, dtype="float64").transpose(2, 0, 1) / 255 - 0.5) / 0.5
                np.testing.assert_allclose(item["pixel_values"], by_hand, atol=1e-6)


def test_augmentation_is_a_shift_and_a_flip(module: ModuleType, images: Path) -> None:
    """Every augmented image is among all shifted and mirrored ones, and all kinds come up."""
    classes, padding = module.list_images(str(images), "train"), 2
    plain = module.Images(classes, processor())
    augmented = module.Images(classes, processor(), crop_padding=padding, flip=True, seed=3)
    seen = set()
    for epoch in range(40):
        augmented.start_epoch(epoch)
        for index in (0, 5, 23):
            black = np.pad(plain[index]["pixel_values"].numpy(), ((0, 0), (2, 2), (2, 2)), constant_values=-1.0)
            got = augmented[index]["pixel_values"].numpy()
            matches = [
                (top, left, mirrored)
                for top in range(2 * padding + 1)
                for left in range(2 * padding + 1)
                for mirrored in (False, True)
                if np.array_equal(got, black[:, top : top + SIZE, left : left + SIZE][..., :: -1 if mirrored else 1])
            ]
            assert len(matches) == 1
            seen.update(matches)
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert len(seen) > 35  # of 50


def test_augmentation_depends_on_seed_epoch_and_index_alone(module: ModuleType, images: Path) -> None:
    classes = module.list_images(str(images), "train")

    def drawn(seed: int, epoch: int, order: range) -> torch.Tensor:
        torch.manual_seed(len(order) + order[0])
        items = module.Images(classes, processor(), crop_padding=2, flip=True, seed=seed)
        items.start_epoch(epoch)
        found = {index: items[index]["pixel_values"] for index in order}
        return torch.stack([found[index] for index in sorted(found)])

    base = drawn(0, 1, range(24))
    assert torch.equal(base, drawn(0, 1, range(23, -1, -1)))
    assert not torch.equal(base, drawn(0, 2, range(24)))
    assert not torch.equal(base, drawn(1, 1, range(24)))


def test_a_split_that_does_not_fit_is_decoded_as_needed(
    module: ModuleType, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = module.list_images(str(images), "train")
    kept = module.Images(classes, processor(), crop_padding=2, flip=True)
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    read = module.Images(classes, processor(), crop_padding=2, flip=True)
    assert kept.kept is not None
    assert read.kept is None
    for index in range(24):
        assert torch.equal(kept[index]["pixel_values"], read[index]["pixel_values"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "'nowhere' is neither a folder nor a zip file"),
        ({"eval_split": "validation"}, "holds no folder 'validation', only: test, train"),
        ({"eval_split": "train"}, "eval_split must not be train"),
        ({"dta": "x"}, "no setting 'dta'; did you mean 'data'"),
        ({"data": 3}, "data must be"),
        ({"from_scratch": {}}, "Give either model"),
        ({"model": "no/model"}, "Give either model"),
        ({"from_scratch": {"patch": 4}}, "no setting 'patch'; did you mean 'patch_size'"),
        ({"from_scratch": {"hidden_size": "wide"}}, "hidden_size must be int, got 'wide'"),
        ({"from_scratch": {"hidden_size": 12}}, r"hidden_size \(12\) must be a multiple of num_attention_heads \(8\)"),
        ({"from_scratch": {"patch_size": 5}}, r"image_size \(32\) must be a multiple of patch_size \(5\)"),
        ({"lora_rank": 4}, "lora_rank goes with a pretrained model"),
        ({"crop_padding": -1}, "crop_padding must lie between"),
        ({"variants": {"mho": {}}}, "did you mean 'moh'"),
        ({"variants": {}}, "balance_weight has no effect"),
    ],
)
def test_bad_configurations_are_refused(
    module: ModuleType, settings: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        module.ImageSettings.from_yaml(written({**settings, **changes}, tmp_path))


def test_bad_folders_are_refused(module: ModuleType, settings: dict[str, Any], tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", {"train": 1, "test": 1})
    given = {**settings, "data": str(data)}
    module.ImageSettings.from_dict(given)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            module.ImageSettings.from_dict(given)

    (data / "train" / "empty").mkdir()
    refused("The class 'empty' of train has no images")
    (data / "train" / "empty" / ".hidden").touch()
    refused("The class 'empty' of train has no images")
    (data / "train" / "empty" / "folder").mkdir()
    refused("folder is a folder; images must lie directly")
    (data / "train" / "empty" / "folder").rmdir()
    (data / "train" / "empty" / "file.png").touch()
    refused("train and test must hold the same classes; only one of them holds empty")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    given["data"] = str(tmp_path / "flat")
    refused("holds no folders; there must be one per class")


@pytest.mark.parametrize("damage", ["text", "truncated"])
def test_an_unreadable_image_is_refused_before_a_model_is_made(
    module: ModuleType, settings: dict[str, Any], damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_images(tmp_path / "data", {"train": 2, "test": 2})
    file = data / "test" / "red" / "001.png"
    file.write_bytes(b"no image" if damage == "text" else file.read_bytes()[:-40])
    monkeypatch.setattr(module, "make_model", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(ValueError, match=r"red/001\.png is not a readable image"):
        module.run(module.ImageSettings.from_dict({**settings, "data": str(data)}))


def test_the_command_line_says_what_is_wrong_in_one_line(
    module: ModuleType,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = written({**settings, "data": "nowhere"}, tmp_path)
    monkeypatch.setattr("sys.argv", ["recipe", str(config)])
    with pytest.raises(SystemExit) as stopped:
        module.command(module.ImageSettings, module.run)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"Error: {config}: data: 'nowhere' is neither a folder nor a zip file."


def test_the_shipped_configurations_are_right(
    module: ModuleType, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted((RECIPES / "configs").glob("*_cifar10_*.yaml"))
    assert len(paths) == 5
    monkeypatch.setattr(module, "list_images", lambda data, split: {"class": []})
    for path in paths:
        module.ImageSettings.from_yaml(path)


def correct(model: torch.nn.Module, images: Path, split: str) -> float:
    """Accuracy image by image."""
    hits = []
    for file in sorted((images / split).rglob("*.png")):
        resized = Image.open(file).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        pixels = torch.tensor(np.asarray(resized, dtype="float32")).permute(2, 0, 1)[None] / 127.5 - 1
        index = int(model.eval()(pixel_values=pixels).logits.argmax())
        hits.append(model.config.id2label[index] == file.parent.name)
    return sum(hits) / len(hits)


def test_a_run_learns_and_what_it_saves_loads(
    module: ModuleType, settings: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    metrics = module.run(module.ImageSettings.from_dict({**settings, "steps": 24}))
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["classes"] == sorted(COLOURS)
    assert (metrics["train_images"], metrics["eval_images"]) == (24, 15)
    assert [entry["step"] for entry in metrics["curve"]] == list(range(0, 25, 3))
    assert metrics["after"]["accuracy"] > 0.9
    loaded = patchattn.from_pretrained(tmp_path / "out")
    assert [patch["variant"] for patch in patchattn.patch_info(loaded)["patches"]] == ["ssa", "moh"]
    assert correct(loaded, images, "test") == pytest.approx(metrics["after"]["accuracy"])
    chosen = [len(layer.usage) for layer in routing(loaded)]
    assert chosen == [4, 4]
    assert [sum(layer.usage) for layer in routing(loaded)] == pytest.approx([4.0, 2.0])
    assert any("entropy" in key for entry in metrics["log"] for key in entry)


def routing(model: torch.nn.Module) -> list[patchattn.LayerRouting]:
    with patchattn.routing_statistics(model) as statistics:
        model(torch.zeros(1, 3, SIZE, SIZE))
    return statistics.layers()


def test_without_variants_it_trains_the_same_model(
    module: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The weights that both have start equal, so that only the variant differs."""
    dense = {**settings, "variants": {}, "balance_weight": 0.0, "learning_rate": 0.0, "steps": 1}
    dense["output"] = str(tmp_path / "dense")
    module.run(module.ImageSettings.from_dict(dense))
    module.run(module.ImageSettings.from_dict({**settings, "learning_rate": 0.0, "steps": 1}))
    here, there = (load_file(tmp_path / folder / "model.safetensors") for folder in ("dense", "out"))
    assert not [name for name in here if "patchattn" in name]
    assert {name for name in there if "patchattn" not in name} == set(here)
    for name, value in here.items():
        assert torch.equal(value, there[name]), name


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A folder with a random ViT for seven classes and its processor."""
    try:
        transformers.AutoImageProcessor.from_pretrained  # noqa: B018
    except ImportError:
        pytest.skip("AutoImageProcessor of this transformers needs torchvision")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, num_labels=7))
    model.save_pretrained(tmp_path / "base")
    processor().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("rank", [0, 4])
def test_a_checkpoint_is_tuned_to_other_classes(
    module: ModuleType, settings: dict[str, Any], checkpoint: str, rank: int, tmp_path: Path
) -> None:
    data = make_images(tmp_path / "data", {"train": 8, "test": 5}, {"dark": (60, 60, 60), "light": (190, 190, 190)})
    changes = {"from_scratch": {}, "model": checkpoint, "lora_rank": rank, "steps": 30, "data": str(data)}
    metrics = module.run(module.ImageSettings.from_dict({**settings, **changes}))
    assert metrics["after"]["accuracy"] > 0.9
    assert (metrics["trained_parameters"] < metrics["parameters"]) == bool(rank)
    head = {"ignore_mismatched_sizes": True, "id2label": {0: "dark", 1: "light"}} if rank else {}
    loaded = patchattn.from_pretrained(tmp_path / "out", **head)  # the adapter's base has the old head
    assert correct(loaded, data, "test") == pytest.approx(metrics["after"]["accuracy"])


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
import finetune_image_classification as recipe

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

class Killed(recipe.PatchedTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(Kill())

recipe.PatchedTrainer = Killed
for config, step in ((sys.argv[1], None), (sys.argv[2], 5), (sys.argv[2], 7), (sys.argv[2], None)):
    process = os.fork()
    if process == 0:
        recipe.run(recipe.ImageSettings.from_yaml(config))
        os._exit(0)
    assert os.waitpid(process, 0)[1] == (signal.SIGKILL if step else 0)
"""


@pytest.mark.slow  # the same of the recipe for language models is in the default suite
def test_a_killed_run_goes_on_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    """Killed within an epoch of 3 steps and after one, it sees the same crops and ends with the same bits."""
    files = []
    for name in ("straight", "broken"):
        given = {**settings, "batch": 8, "steps": 10, "output": str(tmp_path / name)}
        files.append(written(given, tmp_path).rename(tmp_path / f"{name}.yaml"))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = started(script, *files)
    assert done.returncode == 0, done.stderr
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for file in ("model.safetensors", "patchattn_model.safetensors"):
        assert (straight / file).read_bytes() == (broken / file).read_bytes()
    theirs, ours = (json.loads((folder / "metrics.json").read_text()) for folder in (straight, broken))
    assert ours["resumed_from"] == "checkpoint-6"  # 4, within the second epoch, was where the first kill left it
    assert ours["curve"] == theirs["curve"]


@pytest.mark.slow  # the same of the recipe for language models is in the default suite
def test_two_processes_compute_what_one_does(module: ModuleType, settings: dict[str, Any], tmp_path: Path) -> None:
    """Two processes see the batches that one accumulates; 15 images to evaluate are uneven for both."""
    one = {**settings, "output": str(tmp_path / "one"), "accumulation": 2}
    two = {**settings, "output": str(tmp_path / "two")}
    done = started(RECIPES / "finetune_image_classification.py", written(two, tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    ours = json.loads((tmp_path / "two" / "metrics.json").read_text())
    theirs = module.run(module.ImageSettings.from_dict(one))
    assert ours["settings"]["processes"] == 2
    assert [entry["step"] for entry in ours["curve"]] == [entry["step"] for entry in theirs["curve"]]
    assert [e["accuracy"] for e in ours["curve"]] == pytest.approx([e["accuracy"] for e in theirs["curve"]])
    here, there = (load_file(tmp_path / folder / "model.safetensors") for folder in ("two", "one"))
    for name, value in here.items():
        torch.testing.assert_close(value, there[name], rtol=1e-3, atol=1e-4)
