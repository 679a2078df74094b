"""MoH: every token keeps only some of the query heads. Mixture-of-Head Attention, arXiv 2410.11842."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from patchattn_kernels import apply_head_gate, head_norms, normalized_scores, select_top_k, straight_through

from ..call import AttentionCall
from ..settings import option
from ..sites import AttentionSite
from ..variant import Attend, AttentionOutput, Variant, VariantConfig, VariantInfo, register_variant


@dataclass(frozen=True, kw_only=True)
class MoHConfig(VariantConfig):
    """Settings of MoH; every field is described by `patchattn info moh`."""

    active_ratio: float = option(
        0.75,
        help="Share of the query heads each token keeps, shared ones included; at least one head.",
        source="paper, App. B.4: 24 of 32 heads for LLaMA3-8B",
        minimum=0.0,
        maximum=1.0,
    )
    shared_ratio: float | None = option(
        None,
        help="Share of the query heads that every token keeps: the first ones. None: two thirds of the active ones.",
        source="paper, App. B.4: the first 16 of 32 heads, of 24 active",
        minimum=0.0,
        maximum=1.0,
    )
    router: Literal["query_norm", "learned"] = option(
        "query_norm",
        help="query_norm: the norm of each head's query, no parameters, heads kept or dropped. learned: the two-stage "
        "router, which also weighs the heads.",
        source="paper, App. B.4 (query_norm, pretrained models) and Sec. 3.2 (learned, from scratch)",
    )
    router_std: float = option(
        0.02,
        help="Standard deviation of the learned router's initial weights; 0 gives uniform gates.",
        source="ours; the released code uses its framework's default",
        minimum=0.0,
    )


class MoH(Variant):
    """Attention whose heads are gated per token, before the output projection (Sec. 3.1).

    The first `shared` heads are always on; of the others, `routed` are chosen per token. With the learned router,
    `gate = a_1 * g_shared` and `a_2 * g_routed` with the released code's factors, so that uniform scores give ones.
    """

    config_class = MoHConfig
    config: MoHConfig

    def __init__(self, config: MoHConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads = site.query_heads
        if heads is None:
            raise NotImplementedError(f"MoH cannot tell the number of query heads of {site.name}.")
        self.heads = heads
        active = max(1, int(config.active_ratio * heads + 0.5))
        shared_ratio = active / heads * 2 / 3 if config.shared_ratio is None else config.shared_ratio
        self.shared = int(shared_ratio * heads + 0.5)
        self.routed = active - self.shared
        if self.routed < 0:
            raise ValueError(
                f"MoH keeps {active} of {heads} heads in {site.name}, fewer than the {self.shared} shared ones: raise "
                f"active_ratio ({config.active_ratio}) or lower shared_ratio ({config.shared_ratio})."
            )
        if config.router == "learned":
            self._add_router(heads - self.shared)

    def _add_router(self, candidates: int) -> None:
        width = self.site.input_size
        if width is None:
            raise NotImplementedError(f"MoH cannot tell the input width of {self.site.name} for its learned router.")
        rows = {
            "routed_weight": candidates if self.routed else 0,
            "shared_weight": self.shared if self.shared > 1 else 0,
            "type_weight": 2 if self.routed and self.shared else 0,
        }
        for name, count in rows.items():
            weight = nn.Parameter(torch.empty(count, width).normal_(std=self.config.router_std)) if count else None
            self.register_parameter(name, weight)

    @property
    def is_identity(self) -> bool:
        return self.config.router == "query_norm" and self.shared + self.routed == self.heads

    @property
    def needs_context(self) -> bool:
        return self.config.router == "learned" or self.site.query_norm is not None

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"active_ratio": 1.0, "router_std": 0.0}

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        gate = self.norm_gate(call) if self.config.router == "query_norm" else self.learned_gate(call)
        self.report(call, gate=gate)
        output, weights = inner(call)
        return apply_head_gate(output, gate), weights

    def norm_gate(self, call: AttentionCall) -> torch.Tensor:
        """`(B, Tq, H)` of 0 and 1; while training with the straight-through gradient of the chosen heads' scores."""
        norms = head_norms(call.raw_query()[:, self.shared :])
        mask = select_top_k(norms, self.routed)
        if self.training:
            mask = straight_through(mask, normalized_scores(norms))
        return torch.cat([mask.new_ones(*mask.shape[:2], self.shared), mask], dim=-1)

    def learned_gate(self, call: AttentionCall) -> torch.Tensor:
        """`(B, Tq, H)` weights whose mean over the active heads is about one."""
        tokens = call.layer_input()
        shape = tokens.shape[:2]
        shared = self._softmax(tokens, "shared_weight", self.shared) if self.shared > 1 else None
        parts = [torch.ones(*shape, self.shared, device=tokens.device) if shared is None else shared]
        if self.routed:
            scores = self._softmax(tokens, "routed_weight", 1)
            chosen = scores * select_top_k(scores.detach(), self.routed)
            total = chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).eps)
            parts.append(chosen / total * self.routed)
        else:
            parts.append(torch.zeros(*shape, self.heads - self.shared, device=tokens.device))
        if self.routed and self.shared:
            balance = self._softmax(tokens, "type_weight", 2)
            parts = [part * balance[..., i : i + 1] for i, part in enumerate(parts)]
        return torch.cat(parts, dim=-1)

    def _softmax(self, tokens: torch.Tensor, name: str, factor: int) -> torch.Tensor:
        weight = getattr(self, name)
        logits = nn.functional.linear(tokens.to(weight.dtype), weight)
        return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)) * factor


register_variant(
    VariantInfo(
        name="moh",
        variant=MoH,
        title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        arxiv_id="2410.11842",
        year=2024,
        code="https://github.com/SkyworkAI/MoH",
        summary="Every token keeps only the query heads it needs.",
        extra_parameters="none (query_norm); about heads + 2 vectors of the layer's width per layer (learned)",
        needs_training=True,
        examples=(
            {},
            {"router": "learned", "shared_ratio": 0.25},
            {"router": "learned", "shared_ratio": 0.5, "active_ratio": 1.0},
        ),
    )
)
