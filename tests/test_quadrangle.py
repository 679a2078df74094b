"""Quadrangle attention (arXiv 2303.15105) against loops: a transformation of each place, and bilinear reading."""

import math

import pytest
import torch

import patchattn

from .behaviour import randomise, variants_in
from .grid_masks import image
from .grids import first, make, vit


def read(maps: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """`(D,)` of `(rows, columns, D)` between its cells, zero outside; x and y from -1 to 1 between their middles."""
    rows, columns = maps.shape[:2]
    column, row = (x + 1) / 2 * (columns - 1), (y + 1) / 2 * (rows - 1)
    found = torch.zeros(maps.shape[-1], dtype=maps.dtype)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < rows and 0 <= j < columns:
                found += (1 - abs(row - i)) * (1 - abs(column - j)) * maps[i, j]
    return found


def corner(at: tuple[int, int], start: tuple[int, int], size: int, shape: tuple[int, int], n: list[float]):
    """x and y of what a window's patch is moved to, by the nine numbers of its quadrangle."""
    (rows, columns), (t_x, t_y, s_x, s_y, h_x, h_y, p_x, p_y, angle) = shape, n
    place = [-1 + 2 * at[1] / (columns - 1), -1 + 2 * at[0] / (rows - 1)]
    middle = [-1 + 2 * (start[1] + (size - 1) / 2) / (columns - 1), -1 + 2 * (start[0] + (size - 1) / 2) / (rows - 1)]
    x, y = place[0] - middle[0], place[1] - middle[1]
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    shear = torch.tensor([[1.0, h_x], [h_y, 1.0]])
    moved = turn.double() @ shear.double() @ torch.tensor([(s_x + 1) * x, (s_y + 1) * y], dtype=torch.float64)
    depth = p_x * x + p_y * y + 1
    u, v = moved.tolist()
    return middle[0] + (u + t_x / (columns // size)) / depth, middle[1] + (v + t_y / (rows // size)) / depth


@pytest.mark.parametrize(("shape", "size"), [((4, 4), 2), ((3, 6), 3)])
def test_windows_read_quadrangles(shape: tuple[int, int], size: int) -> None:
    model, calls = patchattn.patch_model(make(vit), "quadrangle", size=size), []
    randomise(model)

    def see(call, output):
        calls.append((call, output, call.context.layer_input()))

    with torch.no_grad(), patchattn.probed(model, see):
        model(**image(*shape))
    assert len(calls) == 2
    rows, columns = shape
    for (call, output, states), variant in zip(calls, variants_in(model), strict=True):
        weight, bias = variant.weight.detach().double(), variant.bias.detach().double()
        for b, h in ((b, h) for b in range(2) for h in range(2)):
            query, key, value = (part[b, h].double() for part in (call.query, call.key, call.value))
            whole = (query[:1] @ key.T * call.scaling).softmax(-1) @ value
            torch.testing.assert_close(output[b, :1, h].double(), whole, rtol=1e-4, atol=1e-5)
            for top in range(0, rows, size):
                for left in range(0, columns, size):
                    window = [(top + i, left + j) for i in range(size) for j in range(size)]
                    mean = torch.stack([states[b, 1 + r * columns + c].double() for r, c in window]).mean(0)
                    learned = weight @ torch.where(mean < 0, 0.01 * mean, mean) + bias
                    numbers = learned[9 * h : 9 * h + 9].tolist()
                    keys, values = [key[0]], [value[0]]
                    for at in window:
                        x, y = corner(at, (top, left), size, shape, numbers)
                        keys.append(read(key[1:].view(rows, columns, -1), x, y))
                        values.append(read(value[1:].view(rows, columns, -1), x, y))
                    for r, c in window:
                        place = 1 + r * columns + c
                        weights = (query[place] @ torch.stack(keys).T * call.scaling).softmax(-1)
                        want = weights @ torch.stack(values)
                        torch.testing.assert_close(output[b, place, h].double(), want, rtol=1e-3, atol=1e-4)


def test_it_starts_as_window_attention_and_a_window_of_all_is_the_model() -> None:
    model = make(vit)
    given = image(4, 6)
    with torch.no_grad():
        plain = first(model, given)
        with patchattn.patched(model, "window", size=2, shifted="none"):
            want = first(model, given)
        with patchattn.patched(model, "quadrangle", size=2):
            torch.testing.assert_close(first(model, given), want, rtol=1e-4, atol=1e-5)
        with patchattn.patched(model, "quadrangle", size=6):
            assert torch.equal(first(model, given), plain)


def test_weights_say_what_of_each_patch_was_read() -> None:
    model = make(vit)
    model.set_attn_implementation("eager")
    patchattn.patch_model(model, "quadrangle", size=2)
    randomise(model)
    seen = []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: seen.append((call, output))):
        weights = model(**image(4, 4), output_attentions=True).attentions
    for (call, output), own in zip(seen, weights, strict=True):
        torch.testing.assert_close((own @ call.value).transpose(1, 2), output, rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_divide_and_masks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 x 3 do not divide the 4 x 4 patches.*Sizes that fit: 1, 2, 4"):
        first(patchattn.patch_model(make(vit), "quadrangle", size=3), image(4, 4))
    model = patchattn.patch_model(
        make(vit), ["window", "quadrangle"], {"window": {"size": 2}, "quadrangle": {"size": 2}}
    )
    with pytest.raises(NotImplementedError, match="quadrangle reads keys between tokens"):
        first(model, image(4, 4))
