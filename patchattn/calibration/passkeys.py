"""Texts that gates of kv heads are learned on: passkeys of many words hidden in a long text, and all asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.tasks.haystack import Frame, PromptBuilder, filler, read_texts, sentences

_ALPHABET = (
    "alpha|bravo|charlie|delta|echo|foxtrot|golf|hotel|india|juliett|kilo|lima|mike|november|oscar|papa|quebec|romeo|"
    "sierra|tango|uniform|victor|whiskey|xray|yankee|zulu"
)
_INSTRUCTION = "Words that belong together are hidden in this text as passkeys. Keep them in mind."


@dataclass(frozen=True)
class PasskeyText:
    """One text.

    Attributes:
        tokens: all of it.
        asked: so many last ones are questions and answers.
    """

    tokens: list[int]
    asked: int


class PasskeyTexts:
    """Draws texts: the same ones for the same seed, whichever was drawn before.

    Args:
        tokenizer: of the model.
        lengths: of the texts, in tokens with all that is in them; one is drawn for each text.
        passkeys: how many are hidden in a text.
        words: of each, drawn from the 26 of the spelling alphabet.
        data: text that they are hidden in: a file, or a folder with `.txt` files; generated sentences by default.
        seed: of everything.

    Raises:
        ValueError: a number out of range, or a text that cannot be read.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        lengths: Sequence[int] = (2048, 4096),
        passkeys: int = 10,
        words: int = 32,
        data: str | None = None,
        seed: int = 0,
    ) -> None:
        if not lengths or min(*lengths, passkeys, words) < 1 or seed < 0:
            raise ValueError(
                f"Expected lengths, passkeys and words of at least 1 and a seed of at least 0, got {list(lengths)}, "
                f"{passkeys}, {words} and {seed}."
            )
        self.lengths, self.passkeys, self.words, self.seed = list(lengths), passkeys, words, seed
        self._text = sentences(filler(seed) if data is None else read_texts(data))
        self._builder = PromptBuilder(tokenizer, self._text, "never")

    def __call__(self, index: int) -> PasskeyText:
        """The text of this number, from 0; ValueError if its passkeys alone are longer than it is to be."""
        draw = np.random.default_rng((self.seed, index))
        alphabet = _ALPHABET.split("|")
        passkeys = [" ".join(draw.choice(alphabet, self.words)) for _ in range(self.passkeys)]
        length, start = int(draw.choice(self.lengths)), int(draw.integers(len(self._text)))
        depths = 5.0 + 90.0 * draw.integers(1000, size=self.passkeys) / 999.0
        hidden = [f"Passkey number {number} is: {passkey}." for number, passkey in enumerate(passkeys, start=1)]
        asked = [
            f"\nWhich words are passkey number {number}? They are: {passkey}."
            for number, passkey in enumerate(passkeys, start=1)
        ]
        block = [token for piece in self._builder.tokens(asked) for token in piece]
        context = self._builder.build(
            length - len(block),
            Frame(_INSTRUCTION, "", ""),
            list(zip(depths.tolist(), hidden, strict=True)),
            start=start,
        )
        return PasskeyText([*context.tokens, *block], len(block))
