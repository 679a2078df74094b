"""A branch whose image is distorted, as VCD (arXiv 2311.16922) contrasts with, against two models run by hand."""

from typing import Any

import pytest
import torch

import patchattn
from patchattn.core.registry import temporarily_registered
from patchattn.core.variant import VariantConfig, VariantInfo
from patchattn.decoding.text import TextDecodingVariant, decoder_sites
from patchattn.decoding.variant import BranchStep, Step

from .families import FAMILIES

ALPHA, BETA, DIMMED = 1.0, 0.1, 0.3
LAST_OF_TOWER = {"llava": "model.multi_modal_projector", "qwen2_5_vl": "model.visual.merger"}


class Distorts(TextDecodingVariant):
    config_class = VariantConfig

    @classmethod
    def fit(cls, config: Any, model: Any, sites: Any) -> Any:
        return config, decoder_sites(model, sites)[-1:]

    def branches(self, step: Step) -> list[BranchStep]:
        branch = self.same(step)
        branch.embeddings = torch.where(branch.image[..., None], DIMMED * step.embeddings, step.embeddings)
        return [branch]

    def combine(self, logits: torch.Tensor, branch_logits: list[torch.Tensor]) -> torch.Tensor:
        return contrasted(logits, branch_logits[0])


def contrasted(logits: torch.Tensor, distorted: torch.Tensor) -> torch.Tensor:
    least = logits.amax(-1, keepdim=True) + torch.tensor(BETA).log()
    return ((1 + ALPHA) * logits - ALPHA * distorted).masked_fill(logits < least, -torch.inf)


def test_the_worked_example() -> None:
    found = contrasted(torch.tensor([2.0, 1.0, -3.0]), torch.tensor([2.0, 0.0, -9.0]))
    assert found.tolist() == [2.0, 2.0, -torch.inf]


@pytest.mark.parametrize("family", LAST_OF_TOWER)
def test_a_branch_may_see_another_image(family: str) -> None:
    """By hand: the tower's features are dimmed by a hook, and both models read the whole text at every step."""
    model, inputs = FAMILIES[family].make().double(), FAMILIES[family].inputs()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    dim = {"on": False}
    model.get_submodule(LAST_OF_TOWER[family]).register_forward_hook(
        lambda module, args, output: DIMMED * output if dim["on"] else None
    )
    ids, want = inputs["input_ids"], []
    for _ in range(4):
        given = {**inputs, "input_ids": ids}
        for name in ("attention_mask", "mm_token_type_ids"):
            if name in inputs:
                extra = torch.full_like(ids[:, inputs["input_ids"].shape[1] :], int(name == "attention_mask"))
                given[name] = torch.cat([inputs[name], extra.to(inputs[name].dtype)], dim=1)
        with torch.no_grad():
            plain = model(**given).logits[:, -1]
            dim["on"] = True
            other = model(**given).logits[:, -1]
            dim["on"] = False
        assert (plain - other).abs().max() > 1e-3
        want.append(contrasted(plain, other))
        ids = torch.cat([ids, want[-1].argmax(-1, keepdim=True)], dim=1)
    info = VariantInfo(
        name="distorts",
        variant=Distorts,
        title="",
        arxiv_id=None,
        year=2023,
        summary="A toy.",
        extra_parameters="none",
        needs_training=False,
    )
    with temporarily_registered(info):
        patchattn.patch_model(model, "distorts")
        how = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
        found = model.generate(**inputs, **how, eos_token_id=None)
        patchattn.unpatch_model(model)
    assert found.sequences.tolist() == ids.tolist()
    for left, right in zip(found.logits, want, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5, check_dtype=False)
