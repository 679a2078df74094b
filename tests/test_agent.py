"""Agent attention (arXiv 2312.08874) against loops: adaptive means, enlarged tables, two softmaxes, a convolution."""

import math

import pytest
import torch

import patchattn

from .behaviour import randomise, variants_in
from .grid_masks import image
from .grids import first, make, vit


def enlarged(table: torch.Tensor, size: int) -> torch.Tensor:
    """The last dimension, of 7, as `size` numbers: linear between the middles of cells, constant outside of these."""
    found = []
    for place in range(size):
        at = min(max((place + 0.5) * 7 / size - 0.5, 0.0), 6.0)
        low = min(int(at), 5)
        found.append(table[..., low] * (1 - (at - low)) + table[..., low + 1] * (at - low))
    return torch.stack(found, -1)


@pytest.mark.parametrize(("shape", "side"), [((4, 4), 2), ((5, 3), 2), ((3, 8), 3)])
def test_tokens_read_agents_that_read_tokens(shape: tuple[int, int], side: int) -> None:
    model, calls = patchattn.patch_model(make(vit), "agent", agents=side), []
    randomise(model)
    with torch.no_grad(), patchattn.probed(model, lambda call, output: calls.append((call, output))):
        model(**image(*shape))
    assert len(calls) == 2
    rows, columns = shape
    for (call, output), variant in zip(calls, variants_in(model), strict=True):
        query, key, value = (states.double() for states in (call.query, call.key, call.value))
        learned = {name: parameter.detach().double() for name, parameter in variant.named_parameters()}
        biases = {}
        for way in (0, 1):
            grown = enlarged(enlarged(learned["patches"][way], columns).mT, rows).mT
            lines = (
                enlarged(learned["down"][way], rows)[..., None]
                + enlarged(learned["across"][way], columns)[..., None, :]
            )
            biases[way] = torch.cat([learned["others"][way][..., None], (grown + lines).flatten(2)], -1)
        for sequence, head in ((sequence, head) for sequence in range(2) for head in range(2)):
            own, keys, values = query[sequence, head], key[sequence, head], value[sequence, head]
            agents = []
            for i in range(side):
                for j in range(side):
                    down = range(i * rows // side, math.ceil((i + 1) * rows / side))
                    across = range(j * columns // side, math.ceil((j + 1) * columns / side))
                    agents.append(torch.stack([own[1 + y * columns + x] for y in down for x in across]).mean(0))
            means = torch.stack(agents)
            read = (means @ keys.T * call.scaling + biases[0][head]).softmax(-1) @ values
            expected = (own @ means.T * call.scaling + biases[1][head].T).softmax(-1) @ read
            channels = slice(16 * head, 16 * (head + 1))
            taps, offset = learned["convolution"][channels, 0], learned["offset"][channels]
            for y in range(rows):
                for x in range(columns):
                    expected[1 + y * columns + x] += offset
                    for i, j in ((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
                        if 0 <= y + i < rows and 0 <= x + j < columns:
                            near = values[1 + (y + i) * columns + x + j]
                            expected[1 + y * columns + x] += taps[:, i + 1, j + 1] * near
            torch.testing.assert_close(output[sequence, :, head].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_mask_is_refused() -> None:
    model = patchattn.patch_model(make(vit), ["window", "agent"], {"window": {"size": 2}})
    with pytest.raises(NotImplementedError, match="agent has no place for a mask"):
        first(model, image(4, 4))
