"""LogN: logits grow with the log of the length beyond the trained one. Qwen Technical Report, arXiv 2309.16609."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchattn_kernels import scale_tokens

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import Attend, AttentionOutput, Variant, VariantConfig, VariantInfo


@dataclass(frozen=True, kw_only=True)
class LogNConfig(VariantConfig):
    """Settings of LogN; every field is described by `patchattn info logn`."""

    train_length: int | None = option(
        None,
        help="Length up to which nothing changes. None: the one the model was trained on, by its configuration.",
        source="Qwen-1's released code: its seq_length",
        unit="tokens",
        minimum=2,
    )


class LogN(Variant):
    """Attention with logits times `max(1, log n / log L)`: n is what a query sees, L the trained length."""

    config_class = LogNConfig
    config: LogNConfig
    splits_by_head = True

    def __init__(self, config: LogNConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        length = site.max_positions if config.train_length is None else config.train_length
        if length is None or length < 2:
            raise ValueError(
                f"LogN cannot tell the length that {site.module_class} ({site.name}) was trained on; give train_length."
            )
        self.train_length = length

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"train_length": 1 << 30}

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        log_counts = call.mask.log_counts(torch.promote_types(call.query.dtype, torch.float32))
        factor = (log_counts / math.log(self.train_length)).clamp(min=1.0)
        scaled = call.replace(query=scale_tokens(call.query, factor))
        self.report(scaled, query_temperature=factor)
        return inner(scaled)

    def fold(self, plain: nn.Module) -> None:
        raise NotImplementedError(
            "its factor grows with the number of keys, which no configuration of transformers says. Without it the "
            f"model is the same up to {self.train_length} tokens: call patchattn.unpatch_model"
        )


register_variant(
    VariantInfo(
        name="logn",
        variant=LogN,
        title="Qwen Technical Report",
        arxiv_id="2309.16609",
        year=2023,
        code="https://github.com/QwenLM/Qwen",
        summary="Logits grow with the log of the number of visible keys beyond the length the model was trained on.",
        extra_parameters="none",
        needs_training=False,
        examples=({"train_length": 3},),
    )
)
