"""TOVA against loops in float64: after every call, the keys that the last token attends to most."""

import pytest
import torch

from .evictions import extended, kept_by_loops, padded, registered, watched

BUDGET = 5


@pytest.mark.parametrize("sizes", [[12], [5, 7]])
def test_the_set_after_every_call(sizes: list[int]) -> None:
    ids, real = padded()
    more = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(2))
    ids, real = torch.cat([ids, more], dim=1), extended(real, 20)
    with registered():
        _, layers, cache = watched("tova", {"budget": BUDGET}, ids, real, [*sizes, *[1] * 8])
    for calls, layer in zip(layers, cache.layers, strict=True):
        keys = torch.cat([call["key"][:, :, -call["query"].shape[2] :] for call in calls], dim=2)
        for row in range(3):
            held: list[int] = []
            end = 0
            for call in calls:
                start, end = end, end + call["query"].shape[2]
                held = [*held, *(place for place in range(start, end) if real[row, place])]
                for head in range(4):
                    assert call["seen"][row, head, -1].nonzero()[:, 0].tolist() == held
                if not held:
                    continue
                weights = torch.zeros(len(held), dtype=torch.float64)
                for head in range(4):
                    logits = torch.stack([call["query"][row, head, -1] @ keys[row, head // 2, key] for key in held])
                    weights += (logits * 8**-0.5).softmax(0) / 4
                held = [held[place] for place in kept_by_loops(weights.tolist(), [True] * len(held), BUDGET)]
            for head in layer.columns()[row]:
                assert head[head >= 0].tolist() == held
        assert layer.columns().shape[1] == 1  # one set for all heads, said by shape
        assert layer.keys.shape[2] == BUDGET
