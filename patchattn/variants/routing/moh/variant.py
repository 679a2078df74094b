"""MoH: every token keeps only some of the query heads. Mixture-of-Head Attention, arXiv 2410.11842."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from patchattn_kernels import (
    apply_head_gate,
    head_norms,
    may_be_routed,
    normalized_scores,
    routed_attention_if_faster,
    select_top_k,
    straight_through,
)

from ....core.call import AttentionCall
from ....core.registry import register_variant
from ....core.settings import option
from ....core.sites import AttentionSite
from ....core.variant import Attend, AttentionOutput, Variant, VariantConfig, VariantInfo


def published(*stages: tuple[int, int, int]) -> dict[str, Any]:
    """Settings of a model trained from scratch: per stage its layers, shared heads, and heads chosen of the others."""
    shared = [shared for layers, shared, _ in stages for _ in range(layers)]
    active = [shared + chosen for layers, shared, chosen in stages for _ in range(layers)]
    return {"router": "learned", "shared_heads": shared, "active_heads": active}


@dataclass(frozen=True, kw_only=True)
class MoHConfig(VariantConfig):
    """Settings of MoH; every field is described by `patchattn info moh`."""

    active_ratio: float | tuple[float, ...] | None = option(
        None,
        help="Share of the query heads each token keeps, shared ones included; at least one head. A list has one entry "
        "per layer. None: 0.75, unless active_heads is given.",
        source="paper, Sec. 4.4 and Table 4: 24 of 32 heads for LLaMA3-8B",
        minimum=0.0,
        maximum=1.0,
    )
    shared_ratio: float | tuple[float, ...] | None = option(
        None,
        help="Share of the query heads that every token keeps: the first ones. A list has one entry per layer. None: "
        "two thirds of the active ones, unless shared_heads is given.",
        source="paper, Sec. 4.4: the first 16 of 32 heads, of 24 active",
        minimum=0.0,
        maximum=1.0,
    )
    active_heads: int | tuple[int, ...] | None = option(
        None,
        help="In place of active_ratio: the number of query heads each token keeps, shared ones included, or a list of "
        "one per layer.",
        source="ours; the released code counts heads per layer",
        minimum=1,
    )
    shared_heads: int | tuple[int, ...] | None = option(
        None,
        help="In place of shared_ratio: the number of query heads that every token keeps, or a list of one per layer.",
        source="ours; the released code counts heads per layer",
        minimum=0,
    )
    router: Literal["query_norm", "learned"] = option(
        "query_norm",
        help="What chooses heads for a token. query_norm: the norm of each head's query, no parameters, heads kept or "
        "dropped. learned: the two-stage router, which also weighs the heads.",
        source="paper, Sec. 4.4 (query_norm, pretrained models) and Sec. 3.2 (learned, from scratch)",
    )
    straight_through: Literal["all", "selected"] = option(
        "all",
        help="With the query_norm router, whose gates are 0 or 1: which gates hand their gradient to the router's "
        "scores while training, those of all routed heads, or of the selected ones alone, so that attention need not "
        "compute the others.",
        source="paper, Sec. 4.4, Eq. 9 and 10, read literally (all)",
    )
    router_std: float = option(
        0.02,
        help="Standard deviation of the learned router's initial weights; 0 gives uniform gates.",
        source="released code of MoH-ViT",
        minimum=0.0,
        maximum=10.0,
    )


class MoH(Variant):
    """Attention whose heads are gated per token, before the output projection (Sec. 3.1).

    The first `shared` heads are always on; of the others, `routed` are chosen per token: `budget` of them, or more
    while `patchattn.training` lowers the active ratio step by step. With the learned router, `gate = a_1 * g_shared`
    and `a_2 * g_routed` with the released code's factors, so that uniform scores give ones.

    Reports `gate` `(B, T, H)` and, where there is something to choose, `router_probability` and `router_choice`
    `(B, T, R)` of the R heads that are not shared.
    """

    config_class = MoHConfig
    config: MoHConfig
    splits_by_head = True

    def __init__(self, config: MoHConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        site.require("query_heads", by="MoH")
        self.heads = heads = site.heads_in_all[0] or 0
        active = self._count("active", config.active_ratio, config.active_heads)
        active = max(1, int(0.75 * heads + 0.5)) if active is None else active
        shared = self._count("shared", config.shared_ratio, config.shared_heads)
        self.shared = int(active * 2 / 3 + 0.5) if shared is None else shared
        self.budget = self.routed = active - self.shared
        if self.budget < 0:
            raise ValueError(
                f"MoH keeps {active} of {heads} heads in {site.name}, fewer than the {self.shared} shared ones: give "
                "more active heads or fewer shared ones."
            )
        if config.router == "learned":
            self._add_router(heads - self.shared)

    def _count(
        self, name: str, ratio: float | tuple[float, ...] | None, count: int | tuple[int, ...] | None
    ) -> int | None:
        """Heads of this layer, from a ratio or a count; None if neither is given."""
        if ratio is not None and count is not None:
            raise ValueError(f"MoH takes either {name}_ratio or {name}_heads, got {ratio} and {count}.")
        given = ratio if count is None else count
        if isinstance(given, tuple):
            layers = self.site.layer_count
            if len(given) != layers:
                raise ValueError(
                    f"MoH's {name} heads are given for {len(given)} layers, but {self.site.tower or 'the model'} has "
                    f"{layers}: give one entry per layer, or choose one tower with modules=..."
                )
            given = given[self.site.layer_index]
        if given is None:
            return None
        if count is not None and given > self.heads:
            raise ValueError(f"MoH is to keep {given} {name} heads, but {self.site.name} has {self.heads}.")
        lowest = 1 if name == "active" else 0
        return max(lowest, int(given * self.heads + 0.5)) if count is None else int(given)

    def _add_router(self, candidates: int) -> None:
        width = self.site.require("input_size", by="MoH", instead="set router='query_norm'")
        rows = {
            "routed_weight": candidates if self.budget else 0,
            "shared_weight": self.shared if self.shared > 1 else 0,
            "type_weight": 2 if self.budget and self.shared else 0,
        }
        for name, count in rows.items():
            weight = nn.Parameter(torch.empty(count, width).normal_(std=self.config.router_std)) if count else None
            self.register_parameter(name, weight)

    @property
    def is_identity(self) -> bool:
        return self.config.router == "query_norm" and self.shared + self.budget == self.heads

    @property
    def routes(self) -> bool:
        return self.budget > 0 and not self.is_identity

    @property
    def needs_context(self) -> bool:
        return self.config.router == "learned" or self.site.query_norm is not None

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        # a uniform learned router is neutral up to rounding only
        return {"router": "query_norm", "active_ratio": 1.0, "active_heads": None}

    def anneal(self, progress: float) -> None:
        """Choose how many heads are on: all of them at progress 0, falling linearly to the budget at 1."""
        candidates = self.heads - self.shared
        self.routed = self.budget + int((candidates - self.budget) * (1.0 - progress) + 0.5) if self.budget else 0

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        gate, routing = self.norm_gate(call) if self.config.router == "query_norm" else self.learned_gate(call)
        if self.observers:
            self.report(call, gate=gate, **{name: call.alike(value) for name, value in routing.items()})
        gate = call.of_own_heads(gate, -1)
        through_closed = self._passes_all(gate)
        if not through_closed and may_be_routed(call.query, call.key) and call.stands_alone:
            active = (self.shared + self.routed) / self.heads
            operands = (call.query, call.key, call.value, gate, call.rule())
            routed = routed_attention_if_faster(*operands, active=active)
            if routed is not None:
                return routed.transpose(1, 2), None
        output, weights = inner(call)
        return apply_head_gate(output, gate, through_closed), weights

    def _passes_all(self, gate: torch.Tensor) -> bool:
        """Whether the gradient of closed gates counts, for which dropped heads must be computed."""
        if self.config.router == "learned" or self.config.straight_through == "selected":
            return False
        return self.training and torch.is_grad_enabled() and gate.requires_grad

    def norm_gate(self, call: AttentionCall) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`(B, Tq, H)` of 0 and 1; while training with the straight-through gradient of scores."""
        norms = call.of_all_heads(head_norms(call.context.raw_query()), -1)[..., self.shared :]
        choice = mask = select_top_k(norms, self.routed)
        routing = {}
        if self.budget and (self.training or self.observers):
            scores = normalized_scores(norms)
            routing = {"router_probability": scores, "router_choice": choice}
            if self.training:
                mask = straight_through(choice, scores, self.config.straight_through == "all")
        return torch.cat([mask.new_ones(*mask.shape[:2], self.shared), mask], dim=-1), routing

    def learned_gate(self, call: AttentionCall) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`(B, Tq, H)` weights whose mean over the active heads is about one."""
        tokens = call.context.layer_input()
        shape = tokens.shape[:2]
        shared = self._softmax(tokens, "shared_weight", self.shared) if self.shared > 1 else None
        parts = [torch.ones(*shape, self.shared, device=tokens.device) if shared is None else shared]
        if not self.budget:
            parts.append(torch.zeros(*shape, self.heads - self.shared, device=tokens.device))
            return torch.cat(parts, dim=-1), {}
        scores = self._softmax(tokens, "routed_weight", 1)
        choice = select_top_k(scores, self.routed)
        chosen = scores * choice
        total = chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).eps)
        parts.append(chosen / total * self.routed)
        if self.shared:
            balance = self._softmax(tokens, "type_weight", 2).split(1, dim=-1)
            parts = [part * share for part, share in zip(parts, balance, strict=True)]
        return torch.cat(parts, dim=-1), {"router_probability": scores, "router_choice": choice}

    def _softmax(self, tokens: torch.Tensor, name: str, factor: int) -> torch.Tensor:
        weight = getattr(self, name)
        logits = nn.functional.linear(tokens.to(weight.dtype), weight)
        scores = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return scores if factor == 1 else scores * factor


def anneal_active_heads(model: nn.Module, step: int, steps: int) -> None:
    """Set how many heads MoH keeps at one step of continued training: all at step 0, its budget from `steps` on.

    What falls, linearly and rounded per layer, is the number of heads chosen among those that are not shared.

    Args:
        model: patched with `moh`, in whatever wrapper.
        step: counted from 0.
        steps: length of the fall.

    Raises:
        ValueError: the model has no MoH, or `step` is negative.
    """
    variants = [module for module in model.modules() if isinstance(module, MoH)]
    if not variants:
        raise ValueError(f"This {type(model).__name__} is not patched with MoH; it has no active heads to lower.")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}.")
    for variant in variants:
        variant.anneal(min(1.0, step / steps) if steps else 1.0)


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
        presets={
            "llama3_8b_75": {"router": "query_norm", "shared_ratio": 0.5, "active_ratio": 0.75},
            "dit_s_75": published((2, 2, 1), (4, 3, 1), (4, 3, 2), (2, 6, 0)),
            "dit_s_90": published((8, 3, 2), (4, 6, 0)),
            "dit_b_75": published((2, 4, 2), (8, 6, 3), (2, 12, 0)),
            "dit_b_90": published((5, 6, 4), (5, 7, 4), (2, 12, 0)),
            "dit_l_75": published((8, 8, 0), (8, 8, 4), (8, 12, 4)),
            "dit_l_90": published((8, 8, 0), (8, 16, 0), (8, 16, 3)),
            "dit_xl_75": published((9, 8, 0), (10, 10, 2), (9, 14, 2)),
            "dit_xl_90": published((9, 8, 0), (10, 16, 0), (9, 16, 3)),
            "vit_s_75": published((5, 3, 0), (5, 6, 0), (22, 3, 6), (5, 4, 12)),
            "vit_s_80": published((5, 3, 0), (5, 6, 0), (22, 3, 6), (5, 8, 12)),
            "vit_b_50": published((5, 2, 2), (5, 2, 4), (23, 2, 6), (5, 4, 8)),
            "vit_b_75": published((5, 4, 0), (5, 8, 0), (23, 4, 8), (5, 5, 16)),
        },
        examples=(
            {},
            {"router": "learned", "shared_ratio": 0.25},
            {"router": "learned", "active_heads": 2, "shared_heads": 0},
        ),
    )
)
