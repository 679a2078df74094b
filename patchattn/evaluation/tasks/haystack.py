"""Long prompts of an exact number of tokens: a text, and statements placed between its sentences."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...files.documents import read_text

ChatTemplate = Literal["auto", "always", "never"]

_CONTENT = "[content-of-the-prompt]"  # stands in a chat template for what comes there
# \u2019 and \u201d close quotes; the last three are the Chinese full stop, exclamation and question mark
_SENTENCE = re.compile(r".+?(?:[.!?][\"')\]\u2019\u201d]*(?=\s)|[\u3002\uff01\uff1f]|$)")
_FILLER_SENTENCES = 4000
_BLOCK = 64  # sentences tokenized at once

_TIMES = "at dawn|in spring|after the rain|every evening|before supper|on quiet days|in late autumn|by candlelight"
_WHO = "the baker|a tall sailor|our neighbour|the old gardener|a young painter|the miller|a travelling singer|the nurse"
_DOES = "repaired|carried|admired|forgot|borrowed|polished|drew|sold"
_WHAT = "a wooden chair|the green lantern|some warm bread|a torn map|the silver bell|a basket of pears|two clay pots"
_WHERE = "beside the mill|near the harbour|under the bridge|in the orchard|behind the chapel|on the hill|by the well"


@dataclass(frozen=True)
class Prompt:
    """What a model is given.

    Attributes:
        tokens: with special tokens and chat template.
        depths: where each statement came to stand, percent of the text's tokens that lie before it.
    """

    tokens: list[int]
    depths: list[float]


@dataclass(frozen=True)
class Frame:
    """What stands around the text.

    Attributes:
        instruction: before the text.
        question: behind it.
        start: the beginning of the answer, which the model continues; with a chat template it is in the model's turn.
    """

    instruction: str
    question: str
    start: str


def read_texts(data: str) -> str:
    """The text of a file, or of all `.txt` files of a folder in the order of their names, an empty line between them.

    Raises:
        ValueError: there is no such file, no text in it, or it is not UTF-8.
    """
    path = Path(data)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise ValueError(f"There is no text in {data!r}: expected a text file, or a folder with .txt files.")
    text = "\n\n".join(read_text(file, encoding="utf-8-sig") for file in files)
    if not text.strip():
        raise ValueError(f"{data} holds no text.")
    return text


def filler(seed: int) -> str:
    """A text of short sentences about nothing in particular, the same for the same seed."""
    draw = np.random.default_rng((seed, 0))
    parts = [words.split("|") for words in (_TIMES, _WHO, _DOES, _WHAT, _WHERE)]
    choices = [draw.integers(len(words), size=_FILLER_SENTENCES) for words in parts]
    sentences = []
    for places in zip(*choices, strict=True):
        time, *rest = (words[place] for words, place in zip(parts, places, strict=True))
        sentences.append(f"{time.capitalize()}, {' '.join(rest)}.")
    return " ".join(sentences)


def sentences(text: str) -> list[str]:
    """A text cut behind its sentences, each with the space before it; other white space becomes one space.

    A sentence ends where a full stop, question or exclamation mark is followed by white space, quotes and brackets
    closed; Chinese marks need none. So an abbreviation ends one too.
    """
    return _SENTENCE.findall(" " + " ".join(text.split()))


class PromptBuilder:
    """Builds prompts of exact lengths for one tokenizer.

    Prompts are put together of tokens, not of text, so that any number of tokens can be met. Pieces are tokenized as
    they would be behind a word, and begin with white space, where tokenizers cut anyway.

    Args:
        tokenizer: of the model.
        text: sentences between instruction and question; where more are needed, they start again.
        chat_template: use the tokenizer's; auto: if it has one.

    Raises:
        ValueError: a chat template is asked for and there is none, or it does not hold the message once.
    """

    def __init__(self, tokenizer: Any, text: Sequence[str], chat_template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self._text = _Pieces(self, text)
        self.chat = chat_template == "always" or (chat_template == "auto" and bool(tokenizer.chat_template))
        self._around = ("", "")
        if self.chat:
            self._around = _chat_parts(tokenizer)

    def build(
        self,
        length: int,
        frame: Frame,
        statements: Sequence[tuple[float, str]],
        *,
        start: int = 0,
        text: Sequence[str] | None = None,
    ) -> Prompt:
        """A prompt.

        Args:
            length: tokens of the prompt, with everything in it.
            frame: what stands around the text.
            statements: depth in percent and sentence, each placed at the sentence end nearest to its depth; those that
                meet keep their order.
            start: index of the sentence that the text begins near: it ends with a whole sentence, and at its beginning
                tokens are left out until the length is met.
            text: sentences to take in place of the builder's own.

        Raises:
            ValueError: all but the text takes more than the length.
        """
        before, behind = self._around
        head = f"{before}{frame.instruction}\n\n"
        # chat templates write the special tokens themselves
        head_tokens = list(self.tokenizer(head, add_special_tokens=not self.chat)["input_ids"])
        turn = behind if self.chat else "\n"
        (tail,) = self.tokens([f"\n\n{frame.question}{turn}{frame.start}"])
        placed = self.tokens([f" {sentence}" for _, sentence in statements])
        room = length - len(head_tokens) - len(tail) - sum(map(len, placed))
        if room < 0:
            raise ValueError(f"Prompts of {length} tokens are too short: without any text they have {length - room}.")
        filling, ends = _fill(self._text if text is None else _Pieces(self, text), room, start)
        cuts = [min(ends, key=lambda end: abs(end - room * depth / 100)) for depth, _ in statements]
        tokens, last = head_tokens, 0
        for index in sorted(range(len(cuts)), key=lambda index: (cuts[index], statements[index][0])):
            tokens = [*tokens, *filling[last : cuts[index]], *placed[index]]
            last = cuts[index]
        depths = [100 * cut / room if room else 0.0 for cut in cuts]
        return Prompt([*tokens, *filling[last:], *tail], depths)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of pieces of text as they are behind a letter: some tokenizers put a space before what comes first."""
        letter = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        found = self.tokenizer([f"a{text}" for text in texts], add_special_tokens=False)["input_ids"]
        pieces = [list(tokens[len(letter) :]) for tokens in found]
        for index, tokens in enumerate(found):
            if list(tokens[: len(letter)]) != letter:  # one without a space before it, as Chinese sentences have none
                pieces[index] = list(self.tokenizer(texts[index], add_special_tokens=False)["input_ids"])
        return pieces


def _chat_parts(tokenizer: Any) -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise ValueError("chat_template is 'always', and the tokenizer has no chat template.")
    messages = [{"role": "user", "content": _CONTENT}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if whole.count(_CONTENT) != 1:
        raise ValueError("The chat template does not hold the user's message once: give chat_template='never'.")
    before, _, behind = whole.partition(_CONTENT)
    return before, behind


class _Pieces:
    """Tokens of sentences, made when they are needed and kept: texts may be far longer than prompts."""

    def __init__(self, builder: PromptBuilder, texts: Sequence[str]) -> None:
        self._builder, self._texts = builder, texts
        self._blocks: dict[int, list[list[int]]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> list[int]:
        block = index // _BLOCK
        if block not in self._blocks:
            self._blocks[block] = self._builder.tokens(self._texts[block * _BLOCK : (block + 1) * _BLOCK])
        return self._blocks[block][index % _BLOCK]


def _fill(pieces: _Pieces, room: int, start: int) -> tuple[list[int], list[int]]:
    """So many tokens that end with a whole piece, and where pieces end among them, the beginning included."""
    tokens: list[int] = []
    lengths: list[int] = []
    while len(tokens) < room:
        if not tokens and len(lengths) == len(pieces):
            raise ValueError("The tokenizer makes no tokens of the text that prompts are to be filled with.")
        piece = pieces[(start + len(lengths)) % len(pieces)]
        tokens += piece
        lengths.append(len(piece))
    excess = len(tokens) - room
    return tokens[excess:], [0, *(end - excess for end in accumulate(lengths) if end > excess)]
