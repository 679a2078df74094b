"""CHAIR against hand-computed cases, the official table and the official rules."""

import json
from pathlib import Path

import evaluate
import pytest

from patchattn.evaluation.metrics import chair as module
from patchattn.evaluation.metrics.chair import Chair, SynonymTable, chair_scores, singular, split_words

# A few lines in the form of the official table; the official one is tested below.
TABLE = """person, woman, child, children, baby, passenger, adult, people
train
airplane, jet
boat, ferry
bird, goose
cat, kitten
dog, puppy
cow, calf
knife, knive
tie, bow, bow tie
skis, ski
wine glass
cup
chair, seat
dining table,  table
toilet
oven, stove, stove top oven
hot dog
traffic light
bus
mouse, iMouse
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "synonyms.txt").write_text(TABLE)
    return tmp_path / "synonyms.txt"


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("A cat on a table.", ["cat", "dining table"]),
        ("Cats, kittens and CATS", ["cat", "cat", "cat"]),
        ("two hot dogs and a dog", ["hot dog", "dog"]),  # a double word is one mention
        ("so hot, dogs sleep", ["dog"]),
        ("an adult, cats and a dog", ["person", "cat", "dog"]),
        ("a wooden dining table", ["dining table"]),
        ("the man's wine glasses", ["wine glass"]),
        ("a woman's tie, the women's bow ties", ["person", "tie", "person", "tie"]),
        ("a baby bird with an adult cow", ["bird", "cow"]),  # no persons
        ("a baby with a goose, geese and a gosling", ["person", "bird", "bird"]),
        ("a baby kitten", ["person", "cat"]),  # the official rule knows the objects' names alone
        ("a baby animal", []),
        ("a passenger train and passengers on a passenger jet", ["train", "person", "airplane"]),
        ("a train on the train tracks", ["train"]),
        ("a cup at home plate", ["cup"]),
        ("a toilet seat", ["toilet"]),
        ("the seat of the toilet", ["toilet"]),
        ("the seat of the train", ["chair", "train"]),
        ("a stove top oven, a stove", ["oven", "oven"]),
        ("skis, a ski, the skies", ["skis", "skis"]),
        ("buses, busses, a bus", ["bus"] * 3),
        ("knives and calves; mice, iMouse", ["knife", "cow", "mouse", "mouse"]),
        ("puppies on ferries; children of a child", ["dog", "boat", "person", "person"]),
        ("a catalogue of cat-like, doglike things", []),  # whole words, hyphens join
        ("", []),
    ],
)
def test_objects_of_a_caption(table: Path, caption: str, objects: list[str]) -> None:
    assert SynonymTable(table).mentions(caption) == objects


def test_scores_by_hand(table: Path) -> None:
    captions = ["a cat, a cat and a dog", "a train", "nothing to see here", "a cup with a cup on a knife"]
    objects = [["cat", "cup"], ["train", "train"], ["bus"], ["cat"]]
    # mentions 3 + 1 + 0 + 3, wrong 1 + 0 + 0 + 3; objects 2 + 1 + 1 + 1, named 1 + 1; words 7 + 2 + 4 + 8
    expected = {
        "chair_s": 2 / 4,
        "chair_i": 4 / 7,
        "recall": 2 / 5,
        "mean_length": 21 / 4,
        "mentions_per_caption": 7 / 4,
    }
    assert chair_scores(captions, objects, table) == pytest.approx(expected)


def test_a_model_that_says_nothing_has_a_perfect_chair(table: Path) -> None:
    silent = chair_scores(["", "."], [["cat", "dog"], ["bus"]], table)
    assert silent == dict.fromkeys(["chair_s", "chair_i", "recall", "mean_length", "mentions_per_caption"], 0.0)
    one_word = chair_scores(["cat", "bus"], [["cat", "dog"], ["bus"]], table)
    assert (one_word["chair_s"], one_word["chair_i"]) == (0, 0)
    assert one_word["recall"] == pytest.approx(2 / 3)  # this tells the two apart


def test_evaluate_loads_the_file_without_a_hub(table: Path, tmp_path: Path) -> None:
    loaded = evaluate.load(module.__file__, cache_dir=str(tmp_path))
    for metric in (loaded, Chair(cache_dir=str(tmp_path))):
        metric.add_batch(predictions=["a cat", ""], references=[["cat", "dog"], []])
        scores = metric.compute(synonyms=str(table))
        assert scores == pytest.approx(
            {"chair_s": 0, "chair_i": 0, "recall": 1 / 2, "mean_length": 1, "mentions_per_caption": 1 / 2}
        )
        with pytest.raises(ValueError, match="needs synonyms="):
            metric.compute(predictions=["a cat"], references=[["cat"]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no objects"),
        ("\n , \n", "holds no objects"),
        ("cat, kitten\ndog, kitten\n", "line 2: 'kitten' is 'cat' and 'dog'"),
        (None, "There is no synonym table"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "bad.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        SynonymTable(tmp_path / "bad.txt")


@pytest.mark.parametrize(
    ("captions", "objects", "message"),
    [
        ([], [], "at least one, got 0, 0"),
        (["a cat"], [], "one list of objects per caption .* got 1, 0"),
        (["a cat"], [["cta"]], r"'cta' is not an object of .*synonyms\.txt; did you mean 'cat'"),
        (["a cat"], [["kitten"]], "'kitten' is not an object of"),
    ],
)
def test_bad_arguments_are_refused(table: Path, captions: list[str], objects: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chair_scores(captions, objects, table)


def test_words() -> None:
    assert split_words("The dog's bowl, isn\u2019t it? T-shirt 3") == [
        "the",
        "dog",
        "bowl",
        "isn",
        "t",
        "it",
        "t-shirt",
        "3",
    ]


@pytest.fixture(scope="module")
def official(data_dir: Path) -> SynonymTable:
    return SynonymTable(data_dir / "chair" / "synonyms.txt")


def test_the_official_table(official: SynonymTable, data_dir: Path) -> None:
    """It is read as its authors read it, but for spaces and capitals that stop theirs from ever matching."""
    inverse = json.loads((data_dir / "chair" / "inverse_synonym_dict.json").read_text())
    expected = {word.strip().lower(): name for word, name in inverse.items() if word}
    assert {" ".join(phrase): name for phrase, name in official.objects.items()} == expected
    assert len(official.names) == 80


IRREGULAR = {
    "person": "people", "child": "children", "grandchild": "grandchildren", "goose": "geese", "mouse": "mice",
    "ox": "oxen", "calf": "calves", "knife": "knives", "pocketknife": "pocketknives", "loaf": "loaves",
}  # fmt: skip
UNCHANGED = {
    "people", "children", "cattle", "oxen", "sheep", "luggage", "skis", "scissors", "broccoli", "bison", "fowl",
    "waterfowl", "peafowl", "shorebird",
}  # fmt: skip


def plural(word: str) -> list[str]:
    """The plurals of a word as a grammar gives them."""
    if word in UNCHANGED:
        return [word]
    if word in IRREGULAR:
        return [IRREGULAR[word]]
    if word.endswith("man"):
        return [f"{word[:-3]}men"]
    if word.endswith("y") and word[-2] not in "aeiou":
        return [f"{word[:-1]}ies"]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return [f"{word}es"]
    return [f"{word}s", f"{word}es"] if word.endswith("o") else [f"{word}s"]


def test_every_plural_of_the_official_table_is_understood(official: SynonymTable) -> None:
    for phrase, name in official.objects.items():
        *before, last = phrase
        for form in [last, *plural(last)]:
            assert official.mentions(" ".join([*before, form])) == [name], (phrase, form)


def test_singular_words_stay(official: SynonymTable) -> None:
    words = frozenset(word for phrase in official.objects for word in phrase)
    for word in words:
        assert singular(word, words) == word
    for word in ("skies", "grass", "news", "has", "this", "species", "clothes", "buss", "teas", "glassy"):
        assert singular(word, words) == word


def test_the_official_examples(official: SynonymTable, data_dir: Path) -> None:
    """Two captions of an LLaVA, their mentions counted by hand."""
    rows = [json.loads(line) for line in (data_dir / "chair" / "example_inputs.jsonl").read_text().splitlines()]
    truth = json.loads((data_dir / "chair" / "coco2014_imid_to_objects.json").read_text())
    first, second = (official.mentions(row["caption"]) for row in rows)
    cake = ["person", "chair", "cake", "dining table", "cake", "person", "person", "person", "cake", "cup"]
    assert first == [*cake, "dining table", "cake", "person"]
    assert second == ["bear"] * 4
    captions, shown = [row["caption"] for row in rows], [truth[str(row["image_id"])] for row in rows]
    right = chair_scores(captions, shown, official.path)
    assert (right["chair_s"], right["chair_i"], right["recall"]) == (0, 0, 6 / 7)
    swapped = chair_scores(captions, shown[::-1], official.path)  # five persons of the first are in the other image
    assert swapped["chair_s"] == 1
    assert swapped["chair_i"] == pytest.approx(12 / 17)
    assert swapped["recall"] == pytest.approx(1 / 7)
