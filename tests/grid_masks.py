"""What patches see under a variant, however it is computed, against what a test says of every pair of patches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import patchattn
from patchattn.core.sites import AttentionSite
from patchattn.reading import grid_tiles

from .grids import make, pixels, vit

Place = tuple[int, int]


def image(rows: int, columns: int, batch: int = 2) -> dict[str, Any]:
    """Pixels for `vit` that make so many rows and columns of patches."""
    return {**pixels(batch, 3, 8 * rows, 8 * columns), "interpolate_pos_encoding": True}


def made(variant: str, layer: int = 0, heads: int = 2, **settings: Any) -> Any:
    """A variant as it is in some layer of a model."""
    info = patchattn.variant_info(variant)
    sizes = {"query_heads": heads, "kv_heads": heads, "head_dim": 16, "input_size": 32, "memory_size": None}
    names = {"name": f"layers.{layer}.attention", "tower": "", "module_class": "Attention", "input_argument": "x"}
    others = {"memory_argument": None, "mask_argument": None, "arguments": (), "max_positions": None}
    site = AttentionSite(
        layer_index=layer,
        layer_count=12,
        is_cross=False,
        projections={},
        projection_sizes={},
        query_norm=None,
        **names,
        **sizes,
        **others,
    )
    return info.variant(info.configure(settings), site)


def spelt(sets: Any) -> str:
    """`012 012 123` of what positions along an axis see."""
    return " ".join("".join(map(str, seen)) for seen in sets)


@contextmanager
def tiled(monkeypatch: pytest.MonkeyPatch, always: bool) -> Iterator[list[int]]:
    """Attention in tiles always, or never; yields a list of the numbers of tiles that were attended to."""
    counts: list[int] = []
    original = grid_tiles._attend_tile

    def counted(*args: Any) -> torch.Tensor:
        counts.append(len(args[3].queries))
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(grid_tiles, "_WORTH", float("inf") if always else 0.0)
        patch.setattr(grid_tiles, "_attend_tile", counted)
        yield counts


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, keep: Any) -> torch.Tensor:
    """`(B, T, H, D)` in float64 of `(B, H, T, D)`; `keep` `(H, T, T)`."""
    query, key, value = (states.double() for states in (query, key, value))
    logits = (query @ key.mT * scaling).masked_fill(~keep, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2)


def assert_sees(
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    settings: dict[str, Any],
    shape: tuple[int, int],
    sees: Callable[[int, int, Place, Place], bool],
    *,
    how: Callable[[], nn.Module] = vit,
    inputs: dict[str, Any] | None = None,
    prefix: int = 1,
) -> None:
    """AssertionError unless patches attend to those that `sees(layer, head, query, key)` says, and to no others.

    In tiles and under a mask. Tokens before the patches see all, and are seen by all.
    """
    places = [(row, column) for row in range(shape[0]) for column in range(shape[1])]
    inputs = image(*shape) if inputs is None else inputs
    wanted: dict[int, torch.Tensor] = {}
    model = patchattn.patch_model(make(how), variant, settings)
    for always in (True, False):
        calls: list[tuple[int, Any, torch.Tensor]] = []

        def note(call: Any, output: torch.Tensor, calls: list[Any] = calls) -> None:
            calls.append((call.site.layer_index, call, output))

        with torch.no_grad(), tiled(monkeypatch, always) as counts, patchattn.probed(model, note):
            model(**inputs)
        assert bool(counts) is always
        assert len(calls) == 2
        for layer, call, output in calls:
            if layer not in wanted:
                heads = range(call.query.shape[1])
                pairs = [[[sees(layer, head, q, k) for k in places] for q in places] for head in heads]
                wanted[layer] = F.pad(torch.tensor(pairs), (prefix, 0, prefix, 0), value=True)
            expected = attention(call.query, call.key, call.value, call.scaling, wanted[layer])
            torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
