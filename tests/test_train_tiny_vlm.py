"""The recipe for a tiny VLM and the benchmark of hallucination on it: pictures, training, resuming, the tables."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from typer import Typer
from typer.testing import CliRunner

from patchattn.evaluation.metrics.chair import SynonymTable
from patchattn.evaluation.tasks import shapes

from .recipes import RECIPES, ROOT, recipe

TINY = {
    "pictures": 40,
    "eval_pictures": 3,
    "questions": 2,
    "vision_steps": 3,
    "vision_batch": 4,
    "patch_size": 16,
    "vision_width": 16,
    "vision_layers": 2,
    "text_width": 16,
    "text_layers": 2,
    "steps": 4,
    "batch": 4,
    "eval_batch": 9,
    "log_steps": 2,
}


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return recipe("train_tiny_vlm")


@pytest.fixture(scope="module")
def trained(module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "vlm"
    module.run(module.TinyVLMSettings(output=str(folder), **TINY))
    return folder


# Pictures


def test_pictures_show_what_their_captions_say() -> None:
    """Read off the pixels: which colours stand in which cell."""
    width = shapes.SIDE // shapes.CELLS
    for scene in shapes.scenes(0, 30):
        pixels = np.asarray(scene.picture()).astype(int)
        found = {}
        for cell in range(shapes.CELLS**2):
            top, left = cell // shapes.CELLS * width, cell % shapes.CELLS * width
            part = pixels[top : top + width, left : left + width].reshape(-1, 3)
            for name, colour in shapes.COLOURS.items():
                if (part == colour).all(-1).sum() >= 20:
                    found[cell] = name
        assert found == {cell: name.split()[0] for cell, name in zip(scene.cells, scene.objects, strict=True)}
        assert scene.caption() == "there is " + " and ".join(f"a {name}" for name in scene.objects)


def test_shapes_differ() -> None:
    """A disc fills pi / 4 of its box, a square nearly all of it, a triangle half, a cross least."""
    areas: dict[str, list[float]] = {shape: [] for shape in shapes.SHAPES}
    for index, shape in enumerate(shapes.SHAPES * 20):
        pixels = np.asarray(shapes.Scene((f"blue {shape}",), (4,), (0, index)).picture())
        rows, columns = np.nonzero((pixels == shapes.COLOURS["blue"]).all(-1))
        areas[shape].append(len(rows) / (np.ptp(rows) + 1) / (np.ptp(columns) + 1))
    means = {shape: np.mean(values) for shape, values in areas.items()}
    assert means["square"] == 1
    assert means["circle"] == pytest.approx(np.pi / 4, abs=0.08)
    assert means["triangle"] == pytest.approx(0.5, abs=0.08)
    assert means["cross"] < 0.75


def test_questions_of_three_kinds() -> None:
    counts = Counter(name for scene in shapes.scenes(1, 500) for name in scene.objects)
    frequent = [name for name, _ in counts.most_common(5)]
    popular: Counter[str] = Counter()
    for scene in shapes.scenes(0, 100):
        assert scene.present() in scene.objects
        for kind in shapes.KINDS:
            assert scene.absent(kind) not in scene.objects
            assert scene.absent(kind) == scene.absent(kind)
        popular[scene.absent("popular")] += 1
        near = {name for seen in scene.objects for name in shapes.companions(seen)} - set(scene.objects)
        assert scene.absent("adversarial") in near or not near
    assert len(set(frequent) & set(popular)) >= 4
    assert len({scene.absent("random") for scene in shapes.scenes(0, 100)}) > 15


def test_companions_come_together() -> None:
    together = alone = 0
    for scene in shapes.scenes(0, 400):
        for name in scene.objects:
            alone += sum(other in scene.objects for other in shapes.OBJECTS if other != name)
            together += sum(other in scene.objects for other in shapes.companions(name))
    assert together / 2 > 3 * alone / (len(shapes.OBJECTS) - 1)


def test_the_synonym_table(tmp_path: Path) -> None:
    (tmp_path / "synonyms.txt").write_text(shapes.synonym_table())
    table = SynonymTable(tmp_path / "synonyms.txt")
    assert table.names == set(shapes.OBJECTS)
    assert table.mentions("there is a red disc and a blue plus") == ["red circle", "blue cross"]
    for scene in shapes.scenes(0, 20):
        assert table.mentions(scene.caption()) == list(scene.objects)


# The recipe


def test_what_it_learns_from(module: ModuleType) -> None:
    settings = module.TinyVLMSettings(output="none", **TINY)
    processor = module.make_processor(settings)
    data = module.Conversations(settings, processor)
    for index in range(5):
        row = data[index]
        scene = shapes.scene(0, index)
        learned = row["labels"] != module.IGNORED
        assert torch.equal(row["labels"][learned], row["input_ids"][learned])
        answers = [text.strip() for text in processor.tokenizer.decode(row["labels"][learned]).split("</s>")]
        assert answers.pop() == ""
        text = processor.tokenizer.decode(row["input_ids"][row["attention_mask"] == 1])
        assert text.count("<image>") == 9
        for request, said in zip(text.split("USER")[1:], answers, strict=True):
            if "Is there" in request:
                asked = re.search(r"Is there (?:a|something) (.+) in the image", request)[1].split()
                is_there = any(set(asked) <= set(name.split()) for name in scene.objects)
                assert said == ("yes" if is_there else "no")
            else:
                assert said == scene.caption()
        assert sum(len(text) > 3 for text in answers) == index % 2  # captions
        assert len(answers) == 2 + index % 2


def test_questions_are_balanced(module: ModuleType) -> None:
    draw = np.random.default_rng(0)
    asked = [row for scene in shapes.scenes(0, 300) for row in module.questions(scene, 4, draw)]
    parts = [text for text, _ in asked if text not in map(shapes.question, shapes.OBJECTS)]
    assert len(parts) / len(asked) == pytest.approx(0.5, abs=0.05)
    assert sum("something" in text for text in parts) / len(parts) == pytest.approx(0.5, abs=0.07)
    assert sum(said == "yes" for _, said in asked) / len(asked) == pytest.approx(0.5, abs=0.05)


def test_prompts_are_those_of_training(module: ModuleType) -> None:
    settings = module.TinyVLMSettings(output="none", **TINY)
    processor = module.make_processor(settings)
    row = module.Conversations(settings, processor, evaluate=True)[1]
    scene = shapes.scene(module.EVAL_SEED, 0)
    content = [{"type": "image"}, {"type": "text", "text": shapes.question(scene.present())}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=scene.picture(), text=prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    assert torch.equal(inputs["input_ids"][0], row["input_ids"][:length])
    assert torch.equal(inputs["pixel_values"][0], row["pixel_values"])
    assert processor.tokenizer.decode(row["labels"][length]) == "yes"
    assert (row["labels"] != module.IGNORED).sum() == 1
    assert "<unk>" not in processor.tokenizer.decode(row["input_ids"])


def test_it_trains(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert 0 <= metrics["class_token_exact"] <= 1
    assert 0 <= metrics["after"]["accuracy"] <= 1
    assert metrics["parameters"] > metrics["trained_parameters"]  # the tower is frozen


def test_it_loads(module: ModuleType, trained: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(trained)
    assert type(AutoModelForImageTextToText.from_pretrained(trained)) is type(model)
    settings = module.TinyVLMSettings(output="none", **TINY)
    picture = shapes.scene(0, 0).picture()
    processors = module.make_processor(settings), AutoProcessor.from_pretrained(trained)
    ours, loaded = (p(images=picture, text="USER: <image>\nIs there", return_tensors="pt") for p in processors)
    assert set(ours) == set(loaded)
    for name, value in ours.items():
        assert torch.equal(value, loaded[name]), name


def test_a_killed_run_continues(module: ModuleType, trained: Path, tmp_path: Path) -> None:
    half = module.TinyVLMSettings(output=str(tmp_path / "out"), **TINY, save_steps=2)
    arguments = module.begin(half)
    assert arguments.save_steps == 2
    trainer_class = module.PatchedTrainer
    saved = trainer_class._save_checkpoint

    class Killed(Exception):  # noqa: N818, an event and no error
        pass

    def save_and_die(self: Any, *given: Any, **more: Any) -> None:
        saved(self, *given, **more)
        self.args.max_steps = self.state.max_steps = 4
        self.control.should_training_stop = True
        self.callback_handler.on_save(self.args, self.state, self.control)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_class, "_save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            module.run(half)
    metrics = module.run(half)
    assert metrics["resumed_from"] == "checkpoint-2"
    assert metrics["class_token_exact"] is None
    whole, continued = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "out"))
    for name, value in whole.items():
        assert torch.equal(value, continued[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 4}, "lora_rank goes with a pretrained model"),
        ({"patch_size": 7}, "patch_size must divide the pictures' side, 48, got 7"),
        ({"text_heads": 3}, r"text_width \(16\) must be a multiple of text_heads \(3\)"),
        ({"vision_heads": 5}, r"vision_width \(16\) must be a multiple of vision_heads \(5\)"),
        ({"text_kv_heads": 3}, r"text_heads \(4\) must be a multiple of text_kv_heads \(3\)"),
        ({"vision_layers": 1}, "vision_layers must lie between 2"),
        ({"picture": 3}, "did you mean 'pictures'"),
    ],
)
def test_bad_configurations_are_refused(module: ModuleType, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.TinyVLMSettings.from_dict({"output": "none", **TINY, **changes})


def test_the_shipped_configuration_is_right(module: ModuleType) -> None:
    settings = module.TinyVLMSettings.from_yaml(RECIPES / "configs" / "tiny_vlm.yaml")
    assert settings.variants == {}


# The benchmark


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The benchmark."""
    specification = importlib.util.spec_from_file_location("hallucination", ROOT / "benchmarks" / "hallucination.py")
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def benchmark(script: ModuleType) -> Typer:
    """Its command line."""
    app = Typer()
    app.command()(script.main)
    return app


def test_the_benchmark_of_a_neutral_patch(benchmark: Typer, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    given = [str(trained), "--output", str(output), "--pictures", "4", "--seeds", "2"]
    done = CliRunner().invoke(benchmark, [*given, "--variant", "moh", "--set", "active_ratio=1.0"])
    assert done.exit_code == 0, done.output
    rows = json.loads((output / "results.json").read_text())["rows"]
    name = "moh (active_ratio=1.0)"
    assert list(rows) == [f"{m}, {d}" for m in ("plain", name) for d in ("greedy", "sampling0", "sampling1")]
    for decoding in ("greedy", "sampling0", "sampling1"):
        changed = rows[f"{name}, {decoding}"]["scores"]
        for kind in shapes.KINDS:
            assert changed[kind].pop("lost") == changed[kind].pop("won") == 0
        assert rows[f"plain, {decoding}"]["scores"] == changed
    assert set(rows["plain, greedy"]["scores"]) == {*shapes.KINDS, "chair"}
    shown = (output / "results.md").read_text()
    assert shown.strip() in done.output
    assert f"| {name} | sampling | popular |" in shown
    assert len(list((output / "answers").glob("*/*.jsonl"))) == 6 * 4


def test_answers_that_changed(script: ModuleType, tmp_path: Path) -> None:
    """Right and wrong by the official rule: what does not say no is a yes."""
    labels = ["yes", "yes", "no", "no", "no"]
    for name, answers in (("before", ["yes", "no", "no", "no", "maybe"]), ("after", ["No.", "", "no", "yes", "not"])):
        rows = ({"answer": a, "label": label} for a, label in zip(answers, labels, strict=True))
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    assert script.changed_answers(tmp_path / "before", tmp_path / "after") == {"lost": 2, "won": 2}


def test_the_benchmark_on_official_files(benchmark: Typer, trained: Path, tmp_path: Path) -> None:
    names = [f"COCO_val2014_{number:012}.jpg" for number in (3, 4)]
    for name in names:
        shapes.scene(0, 0).picture().save(tmp_path / name)
    rows = [
        {"question_id": number, "image": name, "text": "Is there a cat in the image?", "label": "no"}
        for number, name in enumerate(names)
    ]
    (tmp_path / "pope.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "objects.json").write_text('{"3": ["cat"], "4": [], "5": []}')
    (tmp_path / "synonyms.txt").write_text("cat, kitten\n")
    given = [str(trained), "--output", str(tmp_path / "out"), "--seeds", "0", "--images", str(tmp_path)]
    for option in ("pope", "objects", "synonyms"):
        given += [f"--{option}", str(tmp_path / f"{option}.{'txt' if option == 'synonyms' else 'json'}")]
    done = CliRunner().invoke(benchmark, given)
    assert done.exit_code == 0, done.output
    assert "| plain | greedy | pope |" in done.output
    answers = (tmp_path / "out" / "answers" / "plain, greedy" / "captions.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"] for line in answers] == names
    (tmp_path / "objects.json").write_text('{"3": ["cat"]}')
    done = CliRunner().invoke(benchmark, given)
    assert done.exit_code == 2
    assert f"knows 1 of the images not, such as {names[1]}" in done.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--variant", "mho"], "Error: Unknown variant 'mho'; did you mean 'moh'"),
        (["--variant", "moh", "--set", "active_ratio"], "Error: --set expects name=value"),
        (["--set", "active_ratio=1"], "Error: --set and --modules go with --variant"),
        (["--pope", "none.json"], "Error: --pope needs --images, --objects and --synonyms too"),
    ],
)
def test_the_benchmark_refuses(benchmark: Typer, given: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(benchmark, ["no/model", "--output", str(tmp_path / "out"), *given])
    assert done.exit_code == 2
    assert done.output.startswith(message)
