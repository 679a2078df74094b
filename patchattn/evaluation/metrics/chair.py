"""CHAIR (arXiv 1809.02156, Section 2): how often captions name objects that the image does not show.

    table = "a.txt"  # a line per object: its name, then its synonyms, separated by commas
    Chair().compute(predictions=["a cat on a sofa"], references=[["cat"]], synonyms=table)["chair_i"]  # 0.5

`evaluate.load(path_of_this_file)` gives the same object; nothing is fetched for it. That is why this file stands alone:
`evaluate` copies it.

A model that says nothing has a perfect CHAIR: `chair_s` and `chair_i` are 0 for empty captions. So they are never
given without `recall` and `mean_length`, which are 0 as well then.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError(f'CHAIR needs {error.name}: pip install "patchattn[eval]"') from error

Phrase = tuple[str, ...]

# Pairs of words that are not what their parts say, by the official rules: a baby bird is not a person, a train track
# not a train. `None` is no object.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
SPECIAL_PAIRS: dict[Phrase, str | None] = {
    **{(age, animal): animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{("passenger", vehicle): vehicle for vehicle in ("jet", "train")},
    ("toilet", "seat"): "toilet",
    ("home", "plate"): None,
    ("train", "track"): None,
}
_IRREGULAR = {"mice": "mouse", "geese": "goose", "oxen": "ox", "feet": "foot", "teeth": "tooth"}


class SynonymTable:
    """Which words name which object.

    Args:
        path: a text file with a line per object: its name, then its synonyms, separated by commas. Case and spaces
            around a synonym do not count. A synonym may have several words.

    Raises:
        ValueError: no such file, an empty one, or a synonym of two objects; the message names file and line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not Path(path).is_file():
            raise ValueError(f"There is no synonym table {str(path)!r}.")
        self.path = str(path)
        self.objects: dict[Phrase, str] = {}
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text.") from error
        for number, line in enumerate(lines, 1):
            phrases = [tuple(synonym.split()) for synonym in line.lower().split(",") if synonym.strip()]
            for phrase in phrases:
                name = " ".join(phrases[0])
                if (before := self.objects.setdefault(phrase, name)) != name:
                    raise ValueError(f"{path}, line {number}: {' '.join(phrase)!r} is {before!r} and {name!r}.")
        if not self.objects:
            raise ValueError(f"{path} holds no objects.")
        self.names = frozenset(self.objects.values())
        special = {pair: self.objects.get((word,)) if word else None for pair, word in SPECIAL_PAIRS.items()}
        self._phrases: Mapping[Phrase, str | None] = {**special, **self.objects}
        self._words = frozenset(word for phrase in self._phrases for word in phrase)
        self._longest = max(map(len, self._phrases))

    def mentions(self, caption: str) -> list[str]:
        """The objects a caption names, one entry per mention, in order.

        Words are made singular, then the longest known phrase without punctuation inside is taken at each place. As
        officially, "seat" is no chair in a caption that has "toilet" too.
        """
        words = [singular(word, self._words) for word in _tokens(caption)]
        found: list[tuple[Phrase, str | None]] = []
        start = 0
        while start < len(words):
            for length in range(min(self._longest, len(words) - start), 0, -1):
                phrase = tuple(words[start : start + length])
                if phrase in self._phrases:
                    found.append((phrase, self._phrases[phrase]))
                    break
            start += length
        has_toilet = any("toilet" in phrase for phrase, _ in found)
        return [name for phrase, name in found if name is not None and not (has_toilet and phrase == ("seat",))]


def split_words(caption: str) -> list[str]:
    """The words of a text in lower case, without punctuation and possessive endings; hyphens join."""
    return [token for token in _tokens(caption) if token[0].isalnum()]


def _tokens(caption: str) -> list[str]:
    """Words, and signs of punctuation one by one."""
    return re.findall(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]", re.sub(r"['\u2019]s\b", "", caption.lower()))


def singular(word: str, known: frozenset[str]) -> str:
    """The known word that this one is, or is the plural of; the word itself if there is none.

    Knowing the words settles what no rule can: ties are a tie, ponies a pony, buses a bus, and skies are no ski.

    Args:
        word: in lower case.
        known: singular words.
    """
    return next((form for form in _singular_forms(word) if form in known), word)


def _singular_forms(word: str) -> Iterator[str]:
    """What a word may be the plural of, the likeliest first."""
    yield word
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
    if word.endswith("men"):
        yield f"{word[:-2]}an"
    if word.endswith("children"):
        yield word[:-3]
    if not word.endswith("s") or word.endswith("ss"):
        return
    if word.endswith("ies"):
        yield f"{word[:-3]}y"
    if word.endswith("ves"):
        yield from (f"{word[:-3]}f", f"{word[:-3]}fe")
    yield word[:-1]
    if re.search(r"(?:s|x|z|ch|sh|o)es$", word):
        yield word[:-2]
    if re.search(r"(ss|zz)es$", word):
        yield word[:-3]  # busses


def chair_scores(
    captions: Sequence[str], objects: Sequence[Sequence[str]], synonyms: str | os.PathLike[str]
) -> dict[str, float]:
    """How many of the objects that captions name are not there.

    Args:
        captions: of the model.
        objects: names of the objects that each image shows.
        synonyms: path of a table; see `SynonymTable`.

    Returns:
        `chair_s`: share of captions that name an object which is not there. `chair_i`: share of mentions, of all
        captions together, that name one; 0 without mentions. `recall`: share of the objects of all images that their
        captions name. `mean_length`: words per caption. `mentions_per_caption`: objects named per caption, repetitions
        counted.

    Raises:
        ValueError: no captions, numbers that differ, an object that is not in the table, or a bad table.
    """
    if not captions or len(captions) != len(objects):
        raise ValueError(f"Give one list of objects per caption and at least one, got {len(captions)}, {len(objects)}.")
    table = SynonymTable(synonyms)
    truths = [set(names) for names in objects]
    for name in set().union(*truths):
        if name not in table.names:
            close = difflib.get_close_matches(name, table.names, n=1)
            raise ValueError(
                f"{name!r} is not an object of {synonyms}{f'; did you mean {close[0]!r}?' if close else '.'}"
            )
    named = [table.mentions(caption) for caption in captions]
    wrong = [sum(name not in truth for name in names) for names, truth in zip(named, truths, strict=True)]
    seen = sum(len(truth.intersection(names)) for names, truth in zip(named, truths, strict=True))
    mentions = sum(map(len, named))
    return {
        "chair_s": sum(count > 0 for count in wrong) / len(captions),
        "chair_i": sum(wrong) / max(mentions, 1),
        "recall": seen / max(sum(map(len, truths)), 1),
        "mean_length": sum(len(split_words(caption)) for caption in captions) / len(captions),
        "mentions_per_caption": mentions / len(captions),
    }


class Chair(evaluate.Metric):
    """CHAIR with recall and length of a list of captions; see `chair_scores`. `compute` needs `synonyms=PATH`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of captions (chair_s) and of named objects (chair_i) that are hallucinated.",
            citation="Rohrbach et al.: Object Hallucination in Image Captioning, EMNLP 2018.",
            inputs_description="predictions: captions. references: a list of the image's objects per caption.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            reference_urls=["https://arxiv.org/abs/1809.02156"],
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        synonyms: str | os.PathLike[str] | None = None,
    ) -> dict[str, float]:
        if synonyms is None:
            raise ValueError("compute() of CHAIR needs synonyms=, the path of a synonym table.")
        return chair_scores(list(predictions), list(references), synonyms)
