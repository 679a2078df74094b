"""H2O against loops in float64: attention that keys have received since they came, of those that were there."""

from typing import Any

import pytest
import torch

from .evictions import extended, kept_by_loops, padded, registered, watched


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1, 1, 10]])
@pytest.mark.parametrize(
    "settings", [{"budget": 6}, {"budget": 7, "recent_share": 0.2}, {"budget": 5, "event": "chunk"}]
)
def test_the_set_after_every_call(settings: dict[str, Any], sizes: list[int]) -> None:
    budget, event = settings["budget"], settings.get("event", "call")
    last = int(budget * settings.get("recent_share", 0.5))
    ids, real = padded()
    more = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(2))
    ids, real = torch.cat([ids, more], dim=1), extended(real, 20)
    with registered():
        _, layers, _ = watched("h2o", settings, ids, real, [*sizes, *[1] * 8])
    for calls in layers:
        keys = torch.cat([call["key"][:, :, -call["query"].shape[2] :] for call in calls], dim=2)
        for row in range(3):
            for head in range(2):
                received: dict[int, float] = {}
                end = 0
                for call in calls:
                    rows = call["query"].shape[2]
                    start, end = end, end + rows
                    received |= {place: 0.0 for place in range(start, end) if real[row, place]}
                    if not received:
                        continue
                    for query in range(start, end):
                        if not real[row, query]:
                            continue
                        seen = [place for place in received if place <= query]
                        assert call["seen"][row, 2 * head, query - start].nonzero()[:, 0].tolist() == seen
                        for query_head in (2 * head, 2 * head + 1):
                            own = call["query"][row, query_head, query - start]
                            logits = torch.stack([own @ keys[row, head, place] for place in seen])
                            for place, weight in zip(seen, (logits * 8**-0.5).softmax(0).tolist(), strict=True):
                                received[place] += weight
                    if rows > 1 or event == "call":
                        held = list(received)
                        scores = list(received.values())
                        kept = kept_by_loops(scores, [True] * len(held), budget, last)
                        received = {held[place]: scores[place] for place in kept}
