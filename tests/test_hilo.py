"""HiLo (LITv2, arXiv 2205.13213) against average pooling and windows, head by head."""

import pytest
import torch
import torch.nn.functional as F

import patchattn

from .grid_masks import image
from .grids import first, make, vit


@pytest.mark.parametrize(
    ("shape", "size", "alpha", "high"),
    [((4, 4), 2, 0.5, 2), ((4, 6), 2, 0.3, 3), ((3, 6), 3, 1.0, 0), ((2, 4), 2, 0.0, 4)],
)
def test_heads_read_windows_or_their_means(shape: tuple[int, int], size: int, alpha: float, high: int) -> None:
    how = {"hidden_size": 32, "num_attention_heads": 4}
    model, calls = patchattn.patch_model(make(lambda: vit(**how)), "hilo", size=size, alpha=alpha), []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: calls.append((call, output))):
        model(**image(*shape))
    assert len(calls) == 2
    window = [y // size * 100 + x // size for y in range(shape[0]) for x in range(shape[1])]
    within = F.pad(torch.tensor([[one == other for other in window] for one in window]), (1, 0), value=True)
    for call, output in calls:
        query, key, value = (states.double() for states in (call.query, call.key, call.value))
        for head in range(4):
            one, keys, values = query[:, head], key[:, head], value[:, head]
            expected = [(one[:, :1] @ keys.mT * call.scaling).softmax(-1) @ values]
            patches, hidden = one[:, 1:], ~within
            if head >= high:
                pooled = []
                for states in (keys, values):
                    maps = states[:, 1:].mT.unflatten(-1, shape)
                    pooled.append(torch.cat([states[:, :1], F.avg_pool2d(maps, size).flatten(2).mT], dim=1))
                keys, values = pooled
                hidden = torch.zeros(len(window), keys.shape[1], dtype=torch.bool)
            logits = (patches @ keys.mT * call.scaling).masked_fill(hidden, -torch.inf)
            expected.append(logits.softmax(-1) @ values)
            torch.testing.assert_close(output[:, :, head].double(), torch.cat(expected, 1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_windows_of_one_patch_are_the_model() -> None:
    model = make(vit)
    plain = first(model, image(3, 4))
    with patchattn.patched(model, "hilo", size=1):
        assert torch.equal(first(model, image(3, 4)), plain)


def test_windows_that_do_not_divide_are_refused_with_those_that_do() -> None:
    model = patchattn.patch_model(make(vit), "hilo", size=4)
    with pytest.raises(ValueError, match=r"4 x 4 do not divide the 4 x 6 patches .* Sizes that fit: 1, 2\."):
        model(**image(4, 6))
