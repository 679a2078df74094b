"""Gated attention: what heads give is gated by the layer's input. Gated Attention, arXiv 2505.06708."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from patchattn_kernels.rows import full_precision

from ...core.call import AttentionCall
from ...core.linear import LinearView
from ...core.patching import active_chains
from ...core.registry import register_variant
from ...core.selection import base_model
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import VariantConfig, VariantInfo
from ...softmax.gates import GateVariant
from ...surgery.folding import fold_factors
from ...surgery.projections import output_projection


@dataclass(frozen=True, kw_only=True)
class GatedConfig(VariantConfig):
    """Settings of gated attention; every field is described by `patchattn info gated`."""

    per: Literal["head", "element"] = option(
        "head",
        help="One gate for every head, or for every channel of every head.",
        source="ours: a hundredth of the parameters; the paper studies both and favours elements",
    )
    factor: float = option(
        2.0,
        help="Factor of the sigmoid. 2 starts at the model, whose gates are then 1; 1 is the paper's form.",
        source="ours, for pretrained models; the paper has 1",
        minimum=0.01,
        maximum=100.0,
    )


class Gated(GateVariant):
    """Attention whose output is multiplied by `factor * sigmoid(W x)`, x the layer's input and W zero at the start."""

    config_class = GatedConfig
    config: GatedConfig
    splits_by_head = True

    def __init__(self, config: GatedConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads, width = (site.require(fact, by="gated attention") for fact in ("query_heads", "input_size"))
        size = 1 if config.per == "head" else site.require("head_dim", by="gated attention", instead='set per="head"')
        self.weight = nn.Parameter(torch.zeros(heads * size, width))  # by head, and by channel in it

    @property
    def needs_context(self) -> bool:
        return True

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.weight]

    def gate(self, call: AttentionCall, output: torch.Tensor) -> torch.Tensor:
        states = call.context.layer_input()
        opening = full_precision(nn.functional.linear(states.to(self.weight.dtype), self.weight))
        gate = (opening.sigmoid() * self.config.factor).unflatten(-1, (output.shape[2], -1))
        if self.observers:
            self.report(call, gate=gate.mean(-1))
        return gate

    def fold(self, plain: nn.Module) -> None:
        if self.weight.any():
            raise NotImplementedError(
                f"its gates depend on the token, and {self.site.module_class} has none. For a class that has, take the "
                "weights that patchattn.variants.gating.gated.fold returns"
            )
        heads = self.site.require("query_heads", by="gated attention")
        fold_factors(plain, self.site, "output", torch.full((heads,), self.config.factor / 2))


@torch.no_grad()
def fold(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the same attention with a plain sigmoid as its gate, such as models have that are trained with one.

    The factor of the sigmoid becomes one of the output projection. The model stays as it is.

    Args:
        model: patched with `gated`.

    Returns:
        For every patched attention module `<module>.gate.weight` `(H or H * D, E)`, by head and by channel in it, and
        `<path of its output projection>.weight`, in the layout that it has in the model.

    Raises:
        ValueError: no layer carries gated attention, or an output projection carries a PEFT adapter.
        NotImplementedError: an output projection is not known, or quantised.
    """
    inside, folded = base_model(model), {}
    for name, chain in active_chains(inside).items():
        for variant in chain.children():
            if not isinstance(variant, Gated):
                continue
            path = output_projection(inside, variant.site)
            view = LinearView.at(inside, path)
            weight = view.weight * variant.config.factor
            folded[f"{name}.gate.weight"] = variant.weight.clone()
            folded[f"{path}.weight"] = weight.mT if view.stores_inputs_first else weight
    if not folded:
        raise ValueError(f"No layer of {type(model).__name__} carries gated attention.")
    return folded


register_variant(
    VariantInfo(
        name="gated",
        variant=Gated,
        title="Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
        arxiv_id="2505.06708",
        year=2025,
        code="https://github.com/qiuzh20/gated_attention",
        summary="What every head gives is multiplied by a sigmoid of the layer's input.",
        extra_parameters="the layer's width per query head and layer, or per channel of the heads",
        needs_training=True,
        presets={"paper": {"per": "element", "factor": 1.0}},
        examples=({}, {"per": "element"}),
    )
)
