"""DeCoRe: contrast with the same model whose retrieval heads are masked. arXiv 2410.18860."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.heads import HeadList, Heads, plain_heads
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.token_numbers import last_rows
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantConfig, VariantInfo
from ...decoding.text import TextDecodingVariant, decoder_sites
from ...decoding.variant import BranchStep, Step


@dataclass(frozen=True, kw_only=True)
class DeCoReConfig(VariantConfig):
    """Settings of DeCoRe; every field is described by `patchattn info decore`."""

    heads: Heads | None = option(
        None,
        parse=plain_heads,
        help="The query heads that the second branch masks: a file, such as `patchattn calibrate retrieval` writes, a "
        "mapping from layers to heads, or pairs of (layer, head). It must be given.",
        source="paper: retrieval heads; released code: the first 50 of a list per model",
    )
    alpha: float | None = option(
        None,
        help="Strength of the contrast: (1 + alpha) logits - alpha masked logits. None: the entropy of the model's "
        "next token, in nats.",
        source="paper and released code: entropy; 0.5 for the static form",
        minimum=0.0,
        maximum=1000.0,
    )
    alpha_cap: float | None = option(
        None, help="With entropy: alpha is at most this.", source="released code: none", minimum=0.0, maximum=1000.0
    )
    scale_alpha: bool = option(
        False, help="With entropy: divided by that of all tokens alike, ln V.", source="released code: off"
    )
    mask: Literal["output", "query"] = option(
        "output",
        help="What a masked head gives: nothing (output), or the plain mean of what it sees (query), as queries of "
        "zero do.",
        source="paper, second-hand (output); released code (query)",
    )
    rows: Literal["last", "all"] = option(
        "last",
        help="Where heads are masked in the second branch: from the prompt's last token on (last), or everywhere "
        "(all).",
        source="released code: last where it generates, all where it scores",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and (self.alpha_cap is not None or self.scale_alpha):
            raise ValueError("alpha_cap and scale_alpha are of the entropy: leave out alpha, or them.")

    @property
    def looks_ahead(self) -> bool:
        return self.rows == "last"


class DeCoRe(TextDecodingVariant):
    """Decoding by contrasting retrieval heads: logits against those of a branch without these heads."""

    config_class = DeCoReConfig
    config: DeCoReConfig
    attends = True
    splits_by_head = True

    def __init__(self, config: DeCoReConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        site.require("query_heads", by="DeCoRe")
        self.heads = () if config.heads is None else HeadList.parse(config.heads).of_site(site)

    @classmethod
    def fit(
        cls, config: DeCoReConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[DeCoReConfig, Sequence[AttentionSite]]:
        if config.heads is None:
            raise ValueError(
                "DeCoRe needs heads to mask: heads=FILE of `patchattn calibrate retrieval`, or a mapping from "
                "layers to heads."
            )
        inside, listed = decoder_sites(model, sites), HeadList.parse(config.heads)
        listed.check(model, inside)
        return config, [site for site in inside if listed.of_site(site)]

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"alpha": 0.0, "alpha_cap": None, "scale_alpha": False}

    @property
    def is_identity(self) -> bool:
        return self.config.alpha == 0.0

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if call.branch == 0:
            return inner(call)
        begins = call.mask.queries == call.mask.columns
        rows = self._from_the_prompts_end(call) if begins and self.config.rows == "last" else None
        if self.config.mask == "query":
            return inner(call.replace(query=self._masked(call.query, rows)))
        output, weights = inner(call)
        return self._masked(output.transpose(1, 2), rows).transpose(1, 2), weights

    def _from_the_prompts_end(self, call: AttentionCall) -> torch.Tensor:
        """`(B or 1, Tq)` bool: the prompt ends with the first token whose logits are asked for, or with the last one.

        Assisted decoding puts tokens that it proposes behind the prompt, in the same call.
        """
        count, asked = call.query.shape[2], call.run.asked
        if asked <= 1:
            return last_rows(call.mask)
        return torch.arange(count, device=call.query.device)[None] >= count - asked

    def _masked(self, states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """`(B, H, Tq, D)` with zeros in the heads, in rows `(B or 1, Tq)` or in all."""
        heads = torch.zeros(states.shape[1], 1, 1, dtype=torch.bool, device=states.device)
        heads[list(self.heads)] = True
        return states.masked_fill(heads if rows is None else heads & rows[:, None, :, None], 0.0)

    def branches(self, step: Step) -> list[BranchStep]:
        same = self.same(step)
        if self.config.rows == "last" and step.is_first and bool(step.real[:, -1].all()):
            # All but these tokens are in the branch as in the model.
            same = replace(same, fork=max(step.real.shape[1] - max(step.asked, 1), 0))
        return [same]

    def combine(self, logits: torch.Tensor, branch_logits: list[torch.Tensor]) -> torch.Tensor:
        alpha = self._alpha(logits)
        return (1.0 + alpha) * logits - alpha * branch_logits[0]

    def _alpha(self, logits: torch.Tensor) -> torch.Tensor | float:
        """`(B, n, 1)` strength of the contrast."""
        config = self.config
        if config.alpha is not None:
            return config.alpha
        log_probabilities = logits.log_softmax(-1)
        entropy = -(log_probabilities.exp() * log_probabilities).nan_to_num(0.0).sum(-1, keepdim=True)
        if config.scale_alpha:
            entropy = entropy / math.log(logits.shape[-1])
        return entropy if config.alpha_cap is None else entropy.clamp(max=config.alpha_cap)


register_variant(
    VariantInfo(
        name="decore",
        variant=DeCoRe,
        title="DeCoRe: Decoding by Contrasting Retrieval Heads to Mitigate Hallucinations",
        arxiv_id="2410.18860",
        year=2024,
        code="https://github.com/aryopg/DeCoRe",
        summary="Next-token logits are contrasted with those of the model without its retrieval heads.",
        extra_parameters="none",
        needs_training=False,
        capabilities=ALL_CAPABILITIES - {"static_cache", "compile"},
        presets={"static": {"alpha": 0.5}, "released_code": {"mask": "query"}},
        examples=(
            {"heads": [[1, 0], [1, 3]], "rows": "all", "alpha": 2.0},
            {"heads": [[0, 1], [1, 3]], "mask": "query"},
        ),
    )
)
