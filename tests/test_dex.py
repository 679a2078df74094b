"""DEX against its formula in float64, from the model's output on, and folded into the output projection."""

from pathlib import Path
from typing import Any

import pytest
import torch

import patchattn

from .behaviour import randomise, variant_parameters
from .families import FAMILIES, outputs
from .reference import DIM, HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
SOME = [[0, 1], [0, 3]]


def live(**settings: Any) -> Any:
    model = patchattn.patch_model(tiny_llama(), "dex", **settings)
    randomise(model)
    return model


def look(model: Any, at: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: seen.append(output), at=at):
        model(TOKENS)
    return seen[0]


@pytest.mark.parametrize("heads", [None, SOME], ids=["all", "some"])
def test_a_projection_of_what_a_head_gives_is_taken_away(heads: Any) -> None:
    model = live(heads=heads)
    own = model.model.layers[0].self_attn.patchattn.dex
    chosen = range(HEADS) if heads is None else [head for _, head in heads]
    plain, got = look(model, "base"), look(model, "model")
    shares = dict(zip(chosen, own.share.tolist(), strict=True))
    for sequence in range(2):
        for row in range(TOKENS.shape[1]):
            for head in range(HEADS):
                want = plain[sequence, row, head].clone()
                for channel in range(DIM):
                    projected = own.projection[channel].detach() @ plain[sequence, row, head]
                    want[channel] -= shares.get(head, 0.0) * projected
                torch.testing.assert_close(got[sequence, row, head], want, rtol=0, atol=1e-12)


def test_it_starts_at_the_model_and_everything_learns_by_the_second_step() -> None:
    model = tiny_llama()
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "dex")
    assert torch.equal(outputs(model, input_ids=TOKENS)[0], before)
    assert patchattn.patch_info(model)["extra_parameters"] == DIM * DIM + HEADS
    parameters = list(variant_parameters(model).values())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (model(TOKENS).logits * torch.linspace(-1, 1, 50)).sum().backward()
        learns = [bool((parameter.grad.abs() > 0).any()) for parameter in parameters]
        assert learns == [step == 1, True]  # the projection stands behind a share of 0
        optimizer.step()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("heads", [None, SOME], ids=["all", "some"])
def test_it_folds_into_the_output_projection(family: str, heads: Any, tmp_path: Path) -> None:
    model = FAMILIES[family].make_exact()
    plain = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "dex", heads=heads)
    randomise(model)
    want = outputs(model, input_ids=TOKENS)[0]
    assert float((want - plain).abs().max()) > 1e-3
    assert patchattn.export(model, tmp_path / "plain") < 1e-8
    folded = type(model).from_pretrained(tmp_path / "plain", dtype=torch.float64)
    torch.testing.assert_close(outputs(folded, input_ids=TOKENS)[0], want, rtol=0, atol=1e-9)
    assert torch.equal(outputs(model, input_ids=TOKENS)[0], want)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="7"):
        patchattn.patch_model(tiny_llama(), "dex", heads=[[0, 7]])
    model = live()
    model.model.layers[0].self_attn.patchattn.dex.projection = torch.nn.Parameter(torch.eye(3))
    with pytest.raises(NotImplementedError, match="DEX projects 3 channels of a head of"):
        model(TOKENS)
