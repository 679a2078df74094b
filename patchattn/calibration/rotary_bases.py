"""Rotary bases whose waves complement each other: where one has a trough, another has a peak. arXiv 2312.04455."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..core.selection import base_model, causal_sites, expect_model, input_device, select_sites
from ..positions.looking import find_rotations
from ..positions.rotary import Rotary, Rotation

# Of the released code: how many peaks and troughs a wave has at most, how far apart, and how far the next peak may be.
POINTS, PEAKS_APART, TROUGHS_APART, REACH = 6, 50, 60, 500
CANDIDATES = tuple(round(1 + step / 20, 2) for step in range(1, 41))


@dataclass(frozen=True)
class Wave:
    """Distances at which a base makes attention high, and low, ascending, in tokens."""

    peaks: tuple[int, ...]
    troughs: tuple[int, ...]


@dataclass(frozen=True)
class RotaryBases:
    """Bases that complement the model's own.

    Attributes:
        bases: multiples of the model's own base, ascending.
        waves: of the model's own base, and of each of these.
        troughs: how many troughs all these waves have.
        covered: how many of them a peak of another wave covers.
    """

    bases: tuple[float, ...]
    waves: tuple[Wave, ...]
    troughs: int
    covered: int


def rotary_frequencies(model: nn.Module) -> tuple[torch.Tensor, int]:
    """`(r / 2,)` float64 frequencies of a decoder in radians per position, and the length that it was trained to.

    Raises:
        TypeError: no model.
        ValueError: layers rotate by different frequencies, or none does.
        NotImplementedError: as `find_rotations`, or the model does not tell its length.
    """
    expect_model("rotary_frequencies", model)
    base = base_model(model)
    sites = causal_sites(model, select_sites(base))
    known = find_rotations(base, sites, by="rotary_frequencies")
    rotaries = [Rotary(Rotation.from_dict(known[site.name]), base) for site in sites]
    found = [_frequencies(base, rotary) for rotary in rotaries if rotary.is_rotated]
    if not found:
        raise ValueError(f"No layer of {type(base).__name__} rotates queries and keys, so that it has no base.")
    if any(len(own) != len(found[0]) or not torch.allclose(own, found[0], rtol=1e-5) for own in found):
        raise ValueError(
            f"Layers of {type(base).__name__} rotate by different frequencies: search with complementary_bases() for "
            "those of each."
        )
    length = sites[0].max_positions
    if length is None:
        raise NotImplementedError(f"{type(base).__name__} does not tell how long a text it was trained to.")
    return found[0], length


def _frequencies(model: nn.Module, rotary: Rotary) -> torch.Tensor:
    cos, sin = rotary.tables(torch.ones(1, 1, dtype=torch.long, device=input_device(model)), torch.float64)
    return torch.atan2(sin, cos).flatten().cpu()


def wave_of(frequencies: torch.Tensor, multiple: float, distances: tuple[int, int]) -> Wave:
    """Peaks and troughs of `sum_c cos(m w_c)`, for distances m and the frequencies of a multiple of the base.

    From its highest local maximum on, the next peak is the highest one behind it, more than `PEAKS_APART` away and no
    farther than that and `REACH`. From its lowest local minimum back, the next trough is the lowest one before it, more
    than `TROUGHS_APART` away.

    Args:
        frequencies: `(n,)` those of the model, in radians per position.
        multiple: of its base.
        distances: the first and the last distance, in tokens.
    """
    pairs = torch.arange(len(frequencies), dtype=torch.float64)
    own = frequencies.double() * multiple ** (-pairs / len(frequencies))
    first, last = distances
    height = (torch.arange(first, last + 1, dtype=torch.float64)[:, None] * own).cos().sum(1).tolist()
    inner = range(1, len(height) - 1)
    high = [m for m in inner if height[m - 1] < height[m] > height[m + 1]]
    low = [m for m in inner if height[m - 1] > height[m] < height[m + 1]]
    peaks: list[int] = []
    troughs: list[int] = []
    reachable = high
    while reachable and len(peaks) < POINTS:
        peaks.append(max(reachable, key=lambda m: height[m]))
        after = peaks[-1] + PEAKS_APART
        reachable = [m for m in high if after < m <= after + REACH]
    while low and len(troughs) < POINTS:
        troughs.append(min(low, key=lambda m: height[m]))
        low = [m for m in low if m < troughs[-1] - TROUGHS_APART]
    return Wave(tuple(first + m for m in peaks), tuple(first + m for m in reversed(troughs)))


def complementary_bases(
    frequencies: torch.Tensor,
    *,
    count: int = 5,
    distances: tuple[int, int] = (1000, 4090),
    candidates: Sequence[float] = CANDIDATES,
    within: int = 3,
) -> RotaryBases:
    """Choose bases one by one, so that peaks of each cover troughs of those before, and the other way round.

    A trough is covered if a peak of another wave is no more than `within` tokens away, and a peak likewise. Each base
    is the one that covers most of what is not covered yet; of several the one whose squared distances to that are least
    in the mean, then the smaller one. The search ends early where none covers anything.

    Args:
        frequencies: `(r / 2,)` those of the model, in radians per position (`rotary_frequencies`).
        count: how many bases at most, beside the model's own.
        distances: the first and the last distance that counts, in tokens.
        candidates: multiples of the model's base, above 0.
        within: how far a peak may be from what it covers, in tokens.

    Raises:
        ValueError: settings outside of what is said here, or the model's own wave has no peak or no trough there.
    """
    _check(frequencies, count, distances, candidates, within)
    chosen = {1.0: wave_of(frequencies, 1.0, distances)}
    if not chosen[1.0].peaks or not chosen[1.0].troughs:
        raise ValueError(
            f"Between the distances {distances[0]} and {distances[1]} the model's own base has no peak or no trough: "
            "look at more distances."
        )
    left = {each: wave_of(frequencies, each, distances) for each in sorted(set(map(float, candidates)) - {1.0})}
    while left and len(chosen) <= count:
        peaks, troughs = _uncovered(list(chosen.values()), within)
        ranks = {}
        for each, wave in left.items():
            offsets = _offsets(troughs, wave.peaks, within) + _offsets(peaks, wave.troughs, within)
            mean = math.fsum(offset**2 for offset in offsets) / len(offsets) if offsets else math.inf
            ranks[each] = (-len(offsets), mean, each)
        best = min(left, key=ranks.__getitem__)
        if ranks[best][0] == 0:
            break
        chosen[best] = left.pop(best)
    waves = [chosen[each] for each in (1.0, *sorted(chosen.keys() - {1.0}))]
    troughs_of_all = sum(len(wave.troughs) for wave in waves)
    return RotaryBases(
        bases=tuple(sorted(chosen.keys() - {1.0})),
        waves=tuple(waves),
        troughs=troughs_of_all,
        covered=troughs_of_all - len(_uncovered(waves, within)[1]),
    )


def _uncovered(waves: Sequence[Wave], within: int) -> tuple[list[int], list[int]]:
    """Peaks and troughs of waves that no trough, and no peak, of these waves covers."""
    peaks, troughs = [m for wave in waves for m in wave.peaks], [m for wave in waves for m in wave.troughs]
    return (
        [m for m in peaks if not _offsets([m], troughs, within)],
        [m for m in troughs if not _offsets([m], peaks, within)],
    )


def _offsets(places: Sequence[int], others: Sequence[int], within: int) -> list[int]:
    """Of each place that one of the others covers, how far the nearest of them is."""
    nearest = (min((abs(place - other) for other in others), default=within + 1) for place in places)
    return [offset for offset in nearest if offset <= within]


def _check(
    frequencies: torch.Tensor, count: int, distances: tuple[int, int], candidates: Sequence[float], within: int
) -> None:
    if frequencies.dim() != 1 or not len(frequencies) or not bool(torch.isfinite(frequencies).all()):
        raise ValueError(f"Frequencies are finite numbers (r / 2,), got {tuple(frequencies.shape)}.")
    if count < 1 or within < 0:
        raise ValueError(f"count must be from 1 on and within from 0 on, got {count} and {within}.")
    if not 0 <= distances[0] < distances[1]:
        raise ValueError(f"Distances are the first and the last one, from 0 on and ascending, got {distances}.")
    if not candidates or not all(0 < each < math.inf for each in candidates):
        raise ValueError(f"Candidates are multiples of the model's base above 0, got {list(candidates)}.")
