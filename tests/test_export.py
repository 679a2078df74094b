"""`torch.export` of a patched model, with a length that is left open."""

from typing import Any

import pytest
import torch

import patchattn

from .families import FAMILIES, shortened


class Logits(torch.nn.Module):
    """A model without a cache, as a function of its tokens alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, use_cache=False).logits


@pytest.mark.parametrize(
    ("variant", "settings", "strict"),
    [
        ("act", {"alpha": 0.9}, False),
        ("act", {"heads": {0: [0, 3]}}, True),
        ("ssmax", {}, True),
    ],
    ids=str,
)
def test_an_exported_model_takes_any_length(variant: str, settings: dict[str, Any], strict: bool) -> None:
    model = patchattn.patch_model(shortened(FAMILIES["llama"].make()), variant, settings)
    generator = torch.Generator().manual_seed(0)
    tokens, others = (torch.randint(3, 60, (2, length), generator=generator) for length in (9, 14))
    shapes = ({1: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(Logits(model), (tokens,), dynamic_shapes=shapes, strict=strict).module()
    with torch.no_grad():
        for given in (tokens, others):
            torch.testing.assert_close(exported(given), Logits(model)(given), rtol=1e-4, atol=1e-4)
