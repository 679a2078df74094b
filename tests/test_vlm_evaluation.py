"""POPE and CHAIR on a vision-language model: files, prompts, padding, runs that were killed, what is refused."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import patchattn
from patchattn.evaluation.tasks import shapes
from patchattn.evaluation.tasks.chair import objects_from_coco, read_objects, run_chair
from patchattn.evaluation.tasks.pope import PopeQuestion, read_pope, run_pope
from patchattn.evaluation.tasks.vlm import GenerationSettings, Request, answer

from .recipes import recipe

COUNT = 7


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, Any]:
    """An untrained LLaVA and its processor."""
    module = recipe("train_tiny_vlm")
    settings = module.TinyVLMSettings(output="none", steps=1, vision_width=32, text_width=32, patch_size=12)
    processor = module.make_processor(settings)
    torch.manual_seed(0)
    model = module.make_model(settings, processor.tokenizer).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4)  # nonsense, but another one for each prompt
    return model, processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index, scene in enumerate(shapes.scenes(0, COUNT)):
        scene.picture().save(folder / f"{index}.png")
    return folder


@pytest.fixture
def requests(folder: Path) -> list[Request]:
    texts = ["in", "Is there a red circle in the image?", "the image"]
    return [Request({"id": index}, folder / f"{index}.png", texts[index % 3]) for index in range(COUNT)]


def questions() -> list[PopeQuestion]:
    return [
        PopeQuestion(index, f"{index}.png", shapes.question(scene.present()), "yes")
        for index, scene in enumerate(shapes.scenes(0, COUNT))
    ]


def test_answers_are_those_of_one_request_at_a_time(
    vlm: tuple[Any, Any], requests: list[Request], tmp_path: Path
) -> None:
    model, processor = vlm
    expected = []
    for request in requests:
        prompt = f"USER: <image>\n{request.text} ASSISTANT:"
        inputs = processor(images=Image.open(request.image), text=prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    assert len(set(expected)) > 1
    found = answer(model, processor, requests, tmp_path / "a.jsonl", GenerationSettings(batch=3, max_new_tokens=5))
    assert found == expected
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines == [{"id": index, "answer": text} for index, text in enumerate(expected)]
    given = GenerationSettings(batch=3, max_new_tokens=5, template="USER: <image>\n{text} ASSISTANT:")
    assert answer(model, processor, requests, tmp_path / "b.jsonl", given) == expected


@pytest.mark.parametrize("how", [{}, {"do_sample": True, "temperature": 2.0, "seed": 3}], ids=["greedy", "sampling"])
def test_a_killed_run_continues_as_if_nothing_had_happened(
    vlm: tuple[Any, Any],
    requests: list[Request],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: dict[str, Any],
) -> None:
    model, processor = vlm
    settings = GenerationSettings(batch=2, max_new_tokens=4, **how)
    whole = answer(model, processor, requests, tmp_path / "whole.jsonl", settings)
    generate, calls = model.generate, []

    def killed(**inputs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(**inputs)

    path = tmp_path / "killed.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            answer(model, processor, requests, path, settings)
    assert len(path.read_text().splitlines()) == 4
    cut = path.read_bytes()[:-5]  # in the middle of a line, and of a batch
    path.write_bytes(cut)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert answer(model, processor, requests, path, settings) == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers go on
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", None)  # finished: nothing is generated
        assert answer(model, processor, requests, path, settings) == whole


def test_sampling_is_seeded(vlm: tuple[Any, Any], requests: list[Request], tmp_path: Path) -> None:
    def drawn(name: str, **how: Any) -> list[str]:
        settings = GenerationSettings(do_sample=True, temperature=3.0, max_new_tokens=6, **how)
        return answer(*vlm, requests, tmp_path / name, settings)

    assert drawn("a.jsonl") == drawn("b.jsonl")
    assert drawn("c.jsonl", seed=1) != drawn("a.jsonl")


def test_another_run_is_not_continued(vlm: tuple[Any, Any], requests: list[Request], tmp_path: Path) -> None:
    model, processor = vlm
    path = tmp_path / "a.jsonl"
    settings = GenerationSettings(max_new_tokens=2)
    answer(model, processor, requests, path, settings)
    for changed, message in (
        (GenerationSettings(max_new_tokens=3), "max_new_tokens: 2 became 3"),
        (GenerationSettings(max_new_tokens=2, batch=4), "batch: 8 became 4"),
    ):
        with pytest.raises(ValueError, match=rf"a\.jsonl holds a run with other settings \({message}\)"):
            answer(model, processor, requests, path, changed)
    with pytest.raises(ValueError, match="requests: 7 became 6"):
        answer(model, processor, requests[:-1], path, settings)
    with pytest.raises(ValueError, match="requests_sha256"):
        answer(model, processor, requests[::-1], path, settings)
    with patchattn.patched(model, "ssa"), pytest.raises(ValueError, match=r"patches: \[\] became .*'ssa'"):
        answer(model, processor, requests, path, settings)
    path.write_text('{"id": 3, "answer": ""}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: the answer to another request"):
        answer(model, processor, requests, path, settings)
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not an answer"):
        answer(model, processor, requests, path, settings)
    path.write_text('{"id": 0, "answer": ""}\n' * 8)
    with pytest.raises(ValueError, match="holds 8 answers to 7 requests"):
        answer(model, processor, requests, path, settings)
    (tmp_path / "a.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match=r"has no a\.jsonl\.settings\.json"):
        answer(model, processor, requests, path, settings)


def test_a_neutral_patch_gives_the_same_answers_and_the_model_is_as_it_was(
    vlm: tuple[Any, Any], requests: list[Request], tmp_path: Path
) -> None:
    model, processor = vlm
    model.train()
    processor.tokenizer.padding_side = "right"
    try:
        plain = answer(model, processor, requests, tmp_path / "plain.jsonl")
        assert model.training
        assert processor.tokenizer.padding_side == "right"
        neutral = patchattn.variant_info("ssa").variant.neutral_config()
        with patchattn.patched(model, "ssa", neutral):
            assert answer(model, processor, requests, tmp_path / "ssa.jsonl") == plain
    finally:
        model.eval()
        processor.tokenizer.padding_side = "left"


def test_what_an_answer_needs(vlm: tuple[Any, Any], requests: list[Request], tmp_path: Path) -> None:
    model, processor = vlm
    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match="no requests"):
        answer(model, processor, [], path)
    nowhere = [Request({"id": 9}, tmp_path / "gone.jpg", "What?"), *requests]
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} lacks 1 of the 8 images, such as gone\.jpg"):
        answer(model, processor, nowhere, path)
    (tmp_path / "gone.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"gone\.jpg is not a readable image"):
        answer(model, processor, nowhere, tmp_path / "bad.jsonl")
    other = copy.deepcopy(processor)
    other.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        answer(model, other, requests, path)
    other.chat_template = None
    with pytest.raises(ValueError, match="LlavaProcessor has no chat template: give"):
        answer(model, other, requests, path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "USER: <image>"}, r"template must hold \{text\}"),
        ({"temperature": 0.5}, "no effect without do_sample"),
        ({"top_p": 0.5}, "no effect without do_sample"),
        ({"batch": 0}, "batch must lie between 1"),
        ({"max_tokens": 3}, "did you mean 'max_new_tokens'"),
    ],
)
def test_bad_generation_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationSettings.from_dict(settings)


def test_pope_on_a_model(vlm: tuple[Any, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = vlm
    prompts = []
    make = processor.apply_chat_template
    monkeypatch.setattr(processor, "apply_chat_template", lambda *a, **k: prompts.append(make(*a, **k)) or prompts[-1])
    scores = run_pope(model, processor, questions(), folder, tmp_path / "p.jsonl", suffix="Answer.", max_new_tokens=3)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["question_id", "image", "label", "question", "answer"]] * COUNT
    assert prompts[0] == f"USER: <image>\n{questions()[0].text} Answer. ASSISTANT:"
    said_no = [bool({"No", "no", "not"} & set(row["answer"].split(" "))) for row in rows]
    assert scores["accuracy"] == scores["yes_ratio"] == pytest.approx(1 - np.mean(said_no))  # every label is yes
    with pytest.raises(ValueError, match="There is no image folder 'nowhere'"):
        run_pope(model, processor, questions(), "nowhere", tmp_path / "q.jsonl")
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(tmp_path))} lacks 7 of the 7 images, such as 0\.png, 1\.png"
    ):
        run_pope(model, processor, questions(), tmp_path, tmp_path / "q.jsonl")
    with pytest.raises(ValueError, match="did you mean 'batch'"):
        run_pope(model, processor, questions(), folder, tmp_path / "q.jsonl", bacth=3)


def test_chair_on_a_model(vlm: tuple[Any, Any], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "synonyms.txt").write_text(shapes.synonym_table())
    objects = {f"{index}.png": list(scene.objects) for index, scene in enumerate(shapes.scenes(0, COUNT))}
    scores = run_chair(*vlm, objects, folder, tmp_path / "synonyms.txt", tmp_path / "c.jsonl", max_new_tokens=5)
    captions = [json.loads(line)["answer"] for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert scores["mean_length"] == pytest.approx(np.mean([len(re.findall(r"\w+", text)) for text in captions]))
    assert set(scores) == {"chair_s", "chair_i", "recall", "mean_length", "mentions_per_caption"}
    with pytest.raises(ValueError, match="no synonym table"):
        run_chair(*vlm, objects, folder, tmp_path / "none.txt", tmp_path / "d.jsonl")
    assert not (tmp_path / "d.jsonl").exists()


# Files


def test_the_official_files(data_dir: Path) -> None:
    files = sorted((data_dir / "pope").glob("*/*.json"))
    assert len(files) == 9
    for path in files:
        found = read_pope(path)
        labels = re.findall(r'"label": "(\w+)"', path.read_text())
        assert [question.label for question in found] == labels
        assert len(found) == 3000 == 2 * labels.count("yes")
        assert all(question.text.startswith("Is there a") and question.image.endswith(".jpg") for question in found)


GOOD = '{"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "yes"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: no questions"),
        ("[]", "line 1: no questions"),
        (f"{GOOD}\n{{", "line 2: not valid JSON: "),
        (f"{GOOD}\n\n", "line 2: not valid JSON: "),
        (f"[\n{GOOD},\n{{]", "line 3: not valid JSON: "),
        (f"{GOOD}\n{GOOD}", "line 2: question_id 1 has been used above"),
        (f"[\n\n  {GOOD}\n,\n {GOOD}]", "line 5: question_id 1 has been used above"),
        (f"{GOOD}\n3", "line 2: expected an object, got 3"),
        (GOOD.replace("yes", "Yes"), "line 1: label must be 'yes' or 'no', got 'Yes'"),
        (GOOD.replace('"a.jpg"', "5"), "line 1: image must be str, got 5"),
        (GOOD.replace("text", "query"), "line 1: text must be str, got None"),
        (GOOD.replace("1,", "true,"), "line 1: question_id must be int, got True"),
    ],
)
def test_bad_question_files_name_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "pope.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        read_pope(path)


def test_question_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no file .*gone\.json"):
        read_pope(tmp_path / "gone.json")
    (tmp_path / "latin.json").write_bytes(GOOD.encode() + "\né".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json, line 2: not UTF-8"):
        read_pope(tmp_path / "latin.json")


def test_lists_and_lines_are_read_alike(tmp_path: Path) -> None:
    rows = [json.loads(GOOD), {**json.loads(GOOD), "question_id": 2, "label": "no"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=4))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    assert read_pope(tmp_path / "list.json") == read_pope(tmp_path / "lines.json")
    assert read_pope(tmp_path / "list.json")[1] == PopeQuestion(2, "a.jpg", "Is there a cat?", "no")


def test_objects_of_coco_images(data_dir: Path) -> None:
    objects = read_objects(data_dir / "chair" / "coco2014_imid_to_objects.json")
    assert len(objects) == 123_287
    assert objects["COCO_val2014_000000039769.jpg"] == ["bed", "cat", "couch", "remote"]


def test_objects_are_those_segmented_and_those_named(tmp_path: Path) -> None:
    (tmp_path / "synonyms.txt").write_text("cat, kitten\ndog\nsofa, couch\n")
    images = [{"id": 3, "file_name": "3.jpg"}, {"id": 4, "file_name": "4.jpg"}]
    instances = {
        "images": images,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [{"image_id": 3, "category_id": 1}, {"image_id": 3, "category_id": 1}],
    }
    captions = {
        "images": images,
        "annotations": [{"image_id": 3, "caption": "Kittens on a couch"}, {"image_id": 3, "caption": "a pet"}],
    }
    paths = []
    for name, content in (("instances.json", instances), ("captions.json", captions)):
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps(content))
    assert objects_from_coco(paths[:1], paths[1:], tmp_path / "synonyms.txt") == {"3.jpg": ["cat", "sofa"], "4.jpg": []}
    with pytest.raises(ValueError, match=r"captions\.json must hold an object with lists under .*categories"):
        objects_from_coco(paths[1:], [], tmp_path / "synonyms.txt")
    (tmp_path / "synonyms.txt").write_text("cat\n")
    with pytest.raises(ValueError, match=r"the categories dog are not in .*synonyms\.txt"):
        objects_from_coco(paths[:1], [], tmp_path / "synonyms.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no file"),
        ('{\n"3": [,]}', "line 2: not valid JSON"),
        ("[]", "must hold an object, got a list"),
        ('{"x": []}', "'x': expected an image id and a list of names"),
        ('{"3": "cat"}', "'3': expected an image id and a list of names, got 'cat'"),
    ],
)
def test_bad_object_files(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "objects.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_objects(tmp_path / "objects.json")
