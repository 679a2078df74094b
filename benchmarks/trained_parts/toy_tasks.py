"""Small tasks that attention alone must solve. Labels stand where transformers looks for them: one token further on."""

from collections.abc import Callable
from typing import NamedTuple

import torch

Batch = dict[str, torch.Tensor]
COUNTS = 10  # answers of counting, the last of which means as many or more
KEYS = VALUES = 8  # of memory
LETTERS, BLOCKS, BLOCK = 16, 6, 5  # of block search
PLACES = 32


class Kind(NamedTuple):
    """A kind of rows: their length, and how likely a token is that changes nothing."""

    length: int
    idle: float = 0.0


class Task(NamedTuple):
    """A task.

    Attributes:
        make: rows of a kind, from their number and a generator.
        vocabulary: tokens.
        train, tests: kinds of rows; those that are trained on, and by name those that are asked.
        rows: of a step.
        steps: of training.
        says: what is asked, for the page.
    """

    make: Callable[[int, Kind, torch.Generator], Batch]
    vocabulary: int
    train: Kind
    tests: dict[str, Kind]
    rows: int
    steps: int
    says: str


def answered(ids: torch.Tensor, is_asked: torch.Tensor, answers: torch.Tensor) -> Batch:
    """Rows `(B, T)` whose tokens that ask are to be followed by an answer, which is not in them."""
    labels = torch.full_like(ids, -100)
    labels[:, 1:] = answers.where(is_asked, -100)[:, :-1]
    return {"input_ids": ids, "labels": labels}


def counting(rows: int, kind: Kind, generator: torch.Generator) -> Batch:
    """How often was a variable raised since it was last set to zero?"""
    raise_, zero, ask = 1, 2, 3
    rest = 1 - kind.idle
    odds = torch.tensor([kind.idle, 0.75 * rest, 0.1 * rest, 0.15 * rest])
    ids = torch.multinomial(odds.expand(rows, -1), kind.length, True, generator=generator)
    ids[:, 0] = zero
    raised = (ids == raise_).long().cumsum(1)
    before = raised.where(ids == zero, -1).cummax(1).values
    return answered(ids, ids == ask, 4 + (raised - before).clamp(max=COUNTS - 1))


def flip_flop(rows: int, kind: Kind, generator: torch.Generator) -> Batch:
    """Pairs of an instruction and a bit: what was the bit that was last written? Others are to be ignored."""
    write, read = 1, 2
    rest = (1 - kind.idle) / 2
    count = kind.length // 2
    does = torch.multinomial(torch.tensor([kind.idle, rest, rest]).expand(rows, -1), count, True, generator=generator)
    does[:, 0] = write
    bits = torch.randint(2, (rows, count), generator=generator)
    last = torch.arange(count).expand(rows, -1).where(does == write, 0).cummax(1).values
    bits = bits.gather(1, last).where(does == read, bits)
    ids = torch.stack([does, 3 + bits], dim=2).flatten(1)
    asked = torch.stack([torch.zeros_like(does), (does == read).long()], dim=2).flatten(1).bool()
    return {"input_ids": ids, "labels": ids.where(asked, -100)}


def memory(rows: int, kind: Kind, generator: torch.Generator) -> Batch:
    """One token says a key's value, another asks for it: what was said last holds."""
    shape = (rows, kind.length)
    keys, values = (torch.randint(n, shape, generator=generator) for n in (KEYS, VALUES))
    is_said = torch.rand(shape, generator=generator) < 0.5
    places = torch.arange(kind.length).expand(rows, -1)
    last = [places.where(is_said & (keys == key), -1).cummax(1).values for key in range(KEYS)]
    source = torch.stack(last, dim=2).gather(2, keys[..., None])[..., 0]
    answers = KEYS * VALUES + KEYS + values.gather(1, source.clamp(min=0))
    ids = (keys * VALUES + values).where(is_said, KEYS * VALUES + keys)
    return answered(ids, ~is_said & (source >= 0), answers)


def positions(rows: int, kind: Kind, generator: torch.Generator) -> Batch:
    """All tokens are the same: which one is this?"""
    ids = torch.zeros(rows, kind.length, dtype=torch.long)
    return answered(ids, ids == 0, torch.arange(kind.length).expand(rows, -1))


def block_search(rows: int, kind: Kind, generator: torch.Generator) -> Batch:
    """Blocks of letters, and two letters that stand together in one of them alone: how does it begin?"""
    stop, ask = LETTERS, LETTERS + 1
    draw = torch.rand(rows, BLOCKS, LETTERS, generator=generator).argsort(-1)[..., :BLOCK]
    place = torch.randint(BLOCKS, (rows,), generator=generator)
    block = draw[torch.arange(rows), place]
    pair = block.gather(1, torch.rand(rows, BLOCK, generator=generator).argsort(-1)[:, :2])
    # Others that hold both lose the second: it becomes the one letter of the smallest number that they do not have.
    holds = (draw[..., None] == pair[:, None, None, :]).any(2)  # (rows, BLOCKS, 2)
    has = torch.zeros(rows, BLOCKS, LETTERS).scatter(2, draw, 1.0)
    spare = has.argmin(2)[..., None]
    wrong = holds.all(2) & (torch.arange(BLOCKS) != place[:, None])
    swapped = spare.expand_as(draw).where(draw == pair[:, None, 1:], draw)
    letters = swapped.where(wrong[..., None], draw)
    told = torch.cat([letters, torch.full((rows, BLOCKS, 1), stop)], dim=2).flatten(1)
    end = torch.tensor([[ask, stop]]).expand(rows, -1)  # an answer stands one token further on
    ids = torch.cat([told, pair, end], dim=1)
    return answered(ids, ids == ask, block[:, :1].expand_as(ids))


TASKS = {
    "counting": Task(
        counting,
        4 + COUNTS,
        Kind(64, 0.3),
        {"as trained": Kind(64, 0.3), "longer and sparser": Kind(192, 0.75)},
        32,
        600,
        "Tokens that raise a variable, set it to zero, ask for it or do nothing; 64 of them, 30 % of which do nothing, "
        "then 192 and 75 %",
    ),
    "flip-flop": Task(
        flip_flop,
        5,
        Kind(128, 0.8),
        {"as trained": Kind(128, 0.8), "sparser": Kind(128, 0.98)},
        16,
        600,
        "Bits that are written, read or to be ignored, 64 of them, of which 80 % are to be ignored, then 98 %; wrong "
        "reads",
    ),
    "memory": Task(
        memory,
        KEYS * VALUES + KEYS + VALUES,
        Kind(96),
        {"as trained": Kind(96), "4 x longer": Kind(384)},
        32,
        600,
        f"{KEYS} keys, whose values are said anew all the time and asked for; 96 tokens, then 384",
    ),
    "positions": Task(
        positions,
        PLACES,
        Kind(PLACES),
        {"as trained": Kind(PLACES)},
        1,
        400,
        f"{PLACES} tokens that are all the same, each of which is to say its place: all that rotary embedding tells "
        "weights is lost where all values are equal",
    ),
    "blocks": Task(
        block_search,
        LETTERS + 2,
        Kind(BLOCKS * (BLOCK + 1) + 4),
        {"as trained": Kind(BLOCKS * (BLOCK + 1) + 4)},
        64,
        1200,
        f"{BLOCKS} blocks of {BLOCK} letters, then two letters that are together in one of them alone, whose first "
        "letter is to be told",
    ),
}
