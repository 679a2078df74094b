"""Entmax: attention weights that can be zero, at a learned sparsity per head. arXiv 1909.00015."""

import math
from dataclasses import dataclass

import torch

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, VariantInfo
from ...softmax.blending import BlendConfig, BlendedVariant

_LEAST = 1.01  # closer to 1, the power that the weights are of loses the digits of float32


@dataclass(frozen=True, kw_only=True)
class EntmaxConfig(BlendConfig):
    """Settings of entmax; every field is described by `patchattn info entmax`."""

    alpha: float = option(
        1.5,
        help="Start of the exponent per head: near 1 it is softmax, 2 is sparsemax. Learned ones stay below 1.99.",
        source="paper: 1.5 in the middle of what it learns",
        minimum=_LEAST,
        maximum=2.0,
    )
    scale: float = option(
        0.35,
        help="Start of a learned factor of the logits per head: below 1, as many keys are seen as by softmax.",
        source="ours, for pretrained models; the paper has none, which is 1",
        minimum=0.01,
        maximum=10.0,
    )
    learned: bool = option(True, help="Train exponents, factors and shares; False holds them.", source="paper")


class Entmax(BlendedVariant):
    """Attention with `(1 - b) softmax(s) + b entmax_a(c s)`, where a, b and c are learned per query head."""

    config_class = EntmaxConfig
    config: EntmaxConfig
    sparsity: torch.Tensor
    scale: torch.Tensor
    splits_by_head = True

    def __init__(self, config: EntmaxConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        limit = 4.6 if config.learned else 20.0  # a sigmoid of 20 is 1 in float32; one of 4.6 still has a gradient
        least = 1 / (1 + math.exp(limit))
        share = min(max((config.alpha - _LEAST) / (2 - _LEAST), least), 1 - least)
        self.hold("sparsity", math.log(share / (1 - share)))
        self.hold("scale", config.scale)

    def normalised(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        dtype = logits.dtype
        scale = self.scale.to(dtype)[:, None, None]
        return entmax((logits * scale).where(visible, logits), self.alpha(dtype)[:, None, None])

    def alpha(self, dtype: torch.dtype) -> torch.Tensor:
        """`(H,)` the exponents."""
        return _LEAST + (2 - _LEAST) * self.sparsity.to(dtype).sigmoid()


def entmax(logits: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """`p_i = max((alpha - 1) s_i - t, 0) ^ (1 / (alpha - 1))`, where t makes the sum 1; with gradients for both.

    Args:
        logits: `(..., n)`.
        alpha: above 1 and up to 2; broadcast against `(..., 1)`.

    Returns:
        Weights of the shape of `logits`. The threshold is halved in until the dtype tells no more; a step of Newton's
        after that gives the implicit gradient.
    """
    power = 1 / (alpha - 1)
    shifted = (logits - logits.detach().amax(-1, keepdim=True)) * (alpha - 1)
    with torch.no_grad():
        low = torch.full_like(shifted[..., :1], -1.0)
        high = -torch.exp(-math.log(logits.shape[-1]) * (alpha - 1)).expand_as(low)
        for _ in range(1 - int(math.log2(torch.finfo(logits.dtype).eps))):
            middle = (low + high) / 2
            is_above = _mass(shifted - middle, power).sum(-1, keepdim=True) >= 1
            low, high = torch.where(is_above, middle, low), torch.where(is_above, high, middle)
        slope = -power * _mass(shifted - low, power - 1).sum(-1, keepdim=True)
    found = low - (_mass(shifted - low, power).sum(-1, keepdim=True) - 1) / slope
    return _mass(shifted - found, power)


def _mass(above: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """Of what is above the threshold its power, of the rest 0, as are their gradients."""
    is_above = above > 0
    return torch.where(is_above, above, 1.0).pow(power).where(is_above, 0.0)


register_variant(
    VariantInfo(
        name="entmax",
        variant=Entmax,
        title="Adaptively Sparse Transformers",
        arxiv_id="1909.00015",
        year=2019,
        code="https://github.com/deep-spin/entmax",
        summary="Attention weights can be zero, at a learned sparsity per head.",
        extra_parameters="three values per query head and layer",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"sinks"},
        presets={
            "paper": {"alpha": 1.5, "scale": 1.0, "blend": None},
            "sparsemax": {"alpha": 2.0, "scale": 1.0, "blend": None},
        },
        examples=({}, {"alpha": 1.2, "blend": None}),
    )
)
