"""Outlier tokens of a vision encoder: the patches that draw most of its attention, and where they are in the input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

_ROWS = 256  # queries whose attention is held at a time where all of them are summed


@dataclass(frozen=True, eq=False)
class Picture:
    """What went through a vision encoder as one.

    Attributes:
        tokens: `(P, E)` the image tokens made of it, as the language model gets them.
        outliers: `(k,)` indices of the most attended of them, the first of all first.
    """

    tokens: torch.Tensor
    outliers: torch.Tensor


def attention_received(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    *,
    score: Literal["cls", "received"],
    one_wide_head: bool = False,
) -> torch.Tensor:
    """Attention that each token gets, in float32 at least; never more than a few rows of it are held at a time.

    Args:
        query: `(B, H, N, D)`, of bidirectional attention without a mask.
        key: `(B, H, N, D)`.
        scaling: factor of the logits.
        score: `cls`, from the first token; `received`, from all tokens on average.
        one_wide_head: sum the logits over heads and scale them by the whole width before one softmax, instead of the
            mean over heads.

    Returns:
        `(B, N)`, every row with the sum 1.
    """
    if one_wide_head:
        query, key = (states.transpose(1, 2).flatten(2)[:, None] for states in (query, key))
        scaling = query.shape[-1] ** -0.5
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.to(dtype)
    rows = query[:, :, :1] if score == "cls" else query
    total = torch.zeros(key.shape[0], key.shape[2], dtype=dtype, device=key.device)
    for some in rows.split(_ROWS, dim=2):
        total += (some.to(dtype) @ key.mT * scaling).softmax(dim=-1).mean(dim=1).sum(dim=1)
    return total / rows.shape[2]


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """`(count,)` indices of the highest of `(N,)` scores, highest first; negative ones are not candidates.

    Raises:
        ValueError: there are fewer.
    """
    candidates = int((scores >= 0).sum())
    if count > candidates:
        raise ValueError(f"top_k is {count}, but an image has {candidates} tokens to choose from.")
    return scores.topk(count).indices


def reordered(scores: torch.Tensor, tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Scores `(n,)` of tokens `(n, E)` in the order in which the same tokens stand in `wanted`."""
    ids = torch.cat([tokens, wanted]).unique(dim=0, return_inverse=True)[1]
    given, asked = (part.argsort(stable=True) for part in ids.chunk(2))
    return torch.empty_like(scores).scatter_(0, asked, scores[given])


def places_of(known: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """`(W,)` the first of rows `(M, E)` that each of others `(W, E)` equals, -1 where none does."""
    ids = torch.cat([known, wanted]).unique(dim=0, return_inverse=True)[1]
    own, asked = ids.split([len(known), len(wanted)])
    first = torch.full((int(ids.max()) + 1,), len(known), device=ids.device)
    first = first.scatter_reduce(0, own, torch.arange(len(known), device=ids.device), "amin")
    places = first[asked]
    return places.masked_fill(places == len(known), -1)


def kept_positions(
    embeddings: torch.Tensor, image: torch.Tensor, pictures: Sequence[Picture], *, is_tiled: bool
) -> torch.Tensor:
    """What is left of one sequence if of every image only the outliers stay.

    Images are known by their tokens, since `generate` encodes them before the first forward, repeats them for beams,
    and hands on neither their sizes nor their numbers of tiles.

    Args:
        embeddings: `(T, E)` the sequence, image tokens in place.
        image: `(T,)` bool, which are image tokens.
        pictures: what went through the vision encoder.
        is_tiled: an image is the picture of the whole, parts of it, and a newline as its last token (LLaVA-NeXT). The
            outliers of the whole stay, and that newline.

    Returns:
        `(T',)` positions: text in its order, outliers in theirs.

    Raises:
        ValueError: an image is none of these pictures.
    """
    positions = torch.arange(len(image), device=image.device)
    spots = positions[image]
    tokens = embeddings[spots]
    pictures = [Picture(p.tokens.to(tokens), p.outliers.to(tokens.device)) for p in pictures]
    kept, start, text = [], 0, 0
    while start < len(spots):
        picture = _picture_at(tokens, start, pictures)
        if picture is None:
            raise unknown_images()
        end, chosen = start + len(picture.tokens), picture.outliers + start
        if is_tiled:
            end = _next_start(tokens, end, pictures)
            chosen = torch.cat([chosen, chosen.new_tensor([end - 1])])
        kept += [positions[text : int(spots[start])], spots[chosen]]
        text, start = int(spots[end - 1]) + 1, end
    return torch.cat([*kept, positions[text:]])


def unknown_images() -> ValueError:
    """The error where image tokens are none that were seen being made."""
    return ValueError(
        "The image tokens of this input were not made by the patched model's vision encoder just before: pass "
        "pixel_values to the patched model itself, with use_cache=True and the prompt in one piece."
    )


def _picture_at(tokens: torch.Tensor, start: int, pictures: Sequence[Picture]) -> Picture | None:
    """The picture whose tokens these `(n, E)` are from `start` on."""
    return next((p for p in pictures if torch.equal(tokens[start : start + len(p.tokens)], p.tokens)), None)


def _next_start(tokens: torch.Tensor, after: int, pictures: Sequence[Picture]) -> int:
    """Where the next image starts among a row's image tokens, or their end. Tiles are not images: newlines cut them."""
    firsts = torch.stack([(tokens[after:] == p.tokens[0]).all(dim=-1) for p in pictures]).any(dim=0)
    following = (int(at) + after for at in firsts.nonzero())
    return next((at for at in following if _picture_at(tokens, at, pictures) is not None), len(tokens))
