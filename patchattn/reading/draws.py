"""Numbers that are drawn once for all: by a seed, a layer and a place, alike in every call on every device."""

import math

import torch

BITS = 32
_ODD = (0x4F1BBCDD, 0x6C8E9CF5)  # factors of 31 bits, so that products stay within int64


def drawn_numbers(place: torch.Tensor, seed: int, layer: int) -> torch.Tensor:
    """int64 numbers of 32 bits in the shape of places, as if drawn evenly for each."""
    mixed = place.long() + (layer + 1) * 0x9E3779B1
    for more in (0, 2):
        mixed = (mixed + seed) % 2**BITS
        for shift, factor in zip((16, 15), _ODD, strict=True):
            mixed = (mixed ^ (mixed >> shift)) * (factor + more) % 2**BITS
    return mixed ^ (mixed >> 15)


def uniform(place: torch.Tensor, seed: int, layer: int) -> torch.Tensor:
    """float64 numbers from 0 to below 1."""
    return drawn_numbers(place, seed, layer).double() / 2**BITS


def normal(place: torch.Tensor, seed: int, layer: int) -> torch.Tensor:
    """float64 numbers of the standard normal distribution."""
    radius, angle = (uniform(2 * place + n, seed, layer) for n in (0, 1))
    return (-2.0 * torch.log1p(-radius)).sqrt() * torch.cos(2.0 * math.pi * angle)
