"""DEX: from what heads give a learned projection of it is taken away. Differential Extension, arXiv 2505.16333."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.heads import HeadList, Heads, plain_heads
from ...core.linear import LinearView
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import Attend, AttentionOutput, Variant, VariantConfig, VariantInfo
from ...surgery.projections import head_projections


@dataclass(frozen=True, kw_only=True)
class DexConfig(VariantConfig):
    """Settings of DEX; every field is described by `patchattn info dex`."""

    initial_lambda: float = option(
        0.0,
        help="Start of the learned share of the projection that is taken away, per head: at 0 the model.",
        source="ours; the paper raises it while it trains",
        minimum=-1.0,
        maximum=1.0,
    )
    heads: Heads | None = option(
        None,
        parse=plain_heads,
        help="Which query heads: a file, a mapping from layers to heads, or pairs of (layer, head). None: all.",
        source="ours; the paper chooses some of every layer",
    )


class Dex(Variant):
    """Attention `o - lambda_h P o` in chosen query heads, P a learned `(D, D)` of the layer, the identity at the start.

    It changes what heads give, and leaves attention weights, whose share it is, and the kv cache alone.
    """

    config_class = DexConfig
    config: DexConfig
    index: torch.Tensor  # the chosen heads

    def __init__(self, config: DexConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads, width = (site.require(fact, by="DEX") for fact in ("query_heads", "head_dim"))
        chosen = range(heads) if config.heads is None else HeadList.parse(config.heads).of_site(site)
        self.register_buffer("index", torch.tensor(list(chosen), dtype=torch.long), persistent=False)
        self.projection = nn.Parameter(torch.eye(width))
        self.share = nn.Parameter(torch.full((len(chosen),), float(config.initial_lambda)))

    @classmethod
    def fit(cls, config: DexConfig, model: nn.Module, sites: Any) -> tuple[DexConfig, Any]:
        """Leave out attention modules of which no head is chosen."""
        if config.heads is None:
            return config, sites
        heads = HeadList.parse(config.heads)
        heads.check(model, sites)
        return config, [site for site in sites if heads.of_site(site)]

    @property
    def splits_by_head(self) -> bool:
        """What is learned for chosen heads alone is not split as the heads are."""
        return self.config.heads is None

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"initial_lambda": 0.0}

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        output, weights = inner(call)
        if output.shape[-1] != len(self.projection):
            raise NotImplementedError(
                f"DEX projects {len(self.projection)} channels of a head of {self.site.name}, whose values are "
                f"{output.shape[-1]} wide."
            )
        dtype = torch.promote_types(output.dtype, torch.float32)
        taken = nn.functional.linear(output.to(self.projection.dtype), self.projection).to(dtype)
        return output - (taken * self._shares(output.shape[2]).to(dtype)[:, None]).to(output.dtype), weights

    def _shares(self, heads: int) -> torch.Tensor:
        """`(H,)`, 0 of heads that were not chosen."""
        if len(self.share) == heads:
            return self.share
        return self.share.new_zeros(heads).index_copy(0, self.index, self.share)

    @torch.no_grad()
    def fold(self, plain: nn.Module) -> None:
        """The output projection reads `o - lambda P o` as it reads o, by other weights."""
        part = head_projections(plain, self.site)[3]
        layer: Any = plain.get_submodule(part.projection)
        view = LinearView.at(plain, part.projection)
        weight, index = view.weight.double().clone(), part.index.to(layer.weight.device)
        projection = self.projection.to(weight)
        for share, channels in zip(self._shares(len(index)).to(weight), index, strict=True):
            weight[:, channels] -= share * weight[:, channels] @ projection
        weight = weight.mT if view.stores_inputs_first else weight
        layer.weight = nn.Parameter(weight.contiguous().to(layer.weight.dtype), layer.weight.requires_grad)


register_variant(
    VariantInfo(
        name="dex",
        variant=Dex,
        title="Understanding Differential Transformer Unchains Pretrained Self-Attentions",
        arxiv_id="2505.16333",
        year=2025,
        summary="From what heads give a learned projection of it is taken away, by a learned share.",
        extra_parameters="a matrix of a head's width per layer, and one value per chosen query head",
        needs_training=True,
        examples=({}, {"heads": [[0, 1], [1, 0], [1, 3]]}),
    )
)
