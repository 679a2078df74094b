"""Expected Attention: keys that queries to come are expected to attend to stay. Devoto et al., arXiv 2510.00636."""

from dataclasses import dataclass

import torch

from ...cache.state import SequenceState
from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantInfo
from ...positions.rotary import Rotary
from ...positions.variant import RotaryConfig, RotaryVariant
from ...reading.eviction import CAPABILITIES, ScoredConfig, ScoredEviction

_COUNT, _SUM, _PRODUCT, _END = "queries.count", "queries.sum", "queries.product", "queries.end"
_SUMS = (
    "adds up all queries of a prompt, and what it was just given may hold guesses that are taken back: no assisted "
    "decoding, and no crop before the next single token, under this variant."
)


@dataclass(frozen=True, kw_only=True)
class ExpectedAttentionConfig(RotaryConfig, ScoredConfig):
    """Settings of Expected Attention; every field is described by `patchattn info expected_attention`."""

    future: int = option(
        512,
        help="Positions behind the text that queries to come are expected at, over which their rotation is averaged.",
        source="kvpress",
        unit="tokens",
        minimum=1,
        maximum=1 << 20,
    )
    sinks: int = option(
        4,
        help="First real tokens: their queries are not counted, and their keys are kept before all others.",
        source="kvpress",
        unit="tokens",
        minimum=0,
        maximum=1 << 30,
    )
    epsilon: float = option(
        0.0,
        help="Added to the expected weight of a key before it is multiplied by the length of its value.",
        source="kvpress: its default; 0.01 in its benchmark",
        minimum=0.0,
    )


class ExpectedAttention(RotaryVariant, ScoredEviction):
    """Attention to the keys whose expected weight, times the length of their value, is largest, in each kv head."""

    config_class = ExpectedAttentionConfig
    config: ExpectedAttentionConfig
    name = "expected_attention"
    default_budget = 2048
    splits_by_head = True

    def observe(self, call: AttentionCall, state: SequenceState) -> None:
        """Count the queries of a prompt as they are before rotation: how many, their sum and that of their products."""
        if call.query.shape[2] == 1 and self.config.event != "call":
            return
        batch = len(call.query)
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        real = call.mask.real().expand(batch, -1)
        counted = real & (call.mask.row_order() > self.config.sinks)
        places = self._rotary.rotated_by(call).expand(batch, -1) if self._rotary.is_rotated else real.long() - 1
        query = self._rotary.turned(call.query.to(dtype), places, torch.zeros_like(places[:, :1]))
        query = torch.where(counted[:, None, :, None], query, 0)
        found = {
            _COUNT: counted.sum(-1),
            _SUM: query.sum(2),
            _PRODUCT: query.mT @ query,
            _END: places.masked_fill(~real, -1).amax(-1) + 1,
        }
        before = state.tensors
        for name, now in found.items():
            if name in before:
                now = torch.maximum(now, before[name]) if name == _END else now + before[name]
            state.write(name, now)
        state.settled = _SUMS

    def scores(self, call: AttentionCall, state: SequenceState) -> torch.Tensor:
        rotary, known, scaling = self._rotary, state.tensors, call.scaling
        dtype = known[_SUM].dtype
        count = known[_COUNT].clamp(min=1).to(dtype)[:, None, None]
        mean = known[_SUM] / count
        covariance = known[_PRODUCT] / count[..., None] - mean[..., None] * mean[..., None, :]
        if rotary.is_rotated:
            ahead = known[_END][:, None] + torch.arange(self.config.future, device=mean.device)
            cos, sin = (table.mean(1)[:, None] for table in rotary.tables(ahead, dtype))
            mean = rotary.rotated(mean, cos, sin)
            for _ in range(2):
                covariance = rotary.rotated(covariance, cos[:, :, None], sin[:, :, None]).mT
        groups = call.key.shape[1]
        key = call.key.to(dtype)
        mean, covariance = mean.unflatten(1, (groups, -1)), covariance.unflatten(1, (groups, -1))
        logits = scaling * torch.einsum("bgrd,bgtd->bgrt", mean, key)
        of_heads = key[:, :, None]
        logits = logits + scaling**2 / 2 * ((of_heads @ covariance) * of_heads).sum(-1)
        order, real = call.mask.key_order(), call.mask.real_keys()
        rest = real & (order > self.config.sinks)
        weights = logits.masked_fill(~rest[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0).mean(2)
        scores = (weights + self.config.epsilon) * call.value.to(dtype).norm(dim=-1)
        return scores.masked_fill(real & ~rest, torch.inf)

    @property
    def _rotary(self) -> Rotary:
        if self.rotary is None:
            raise RuntimeError(f"{self.name} was not prepared for {self.site.name}: attach it by patch_model.")
        return self.rotary


register_variant(
    VariantInfo(
        name="expected_attention",
        variant=ExpectedAttention,
        title="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
        arxiv_id="2510.00636",
        year=2025,
        code="https://github.com/NVIDIA/kvpress",
        summary="The kv cache keeps the keys that queries to come are expected to attend to most.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES - {"softcap"},
        examples=(
            {"budget": 6, "future": 16},
            {"budget": 7, "event": "chunk", "sinks": 2, "epsilon": 0.01, "future": 8},
            {"compression_ratio": 0.4, "event": "call", "future": 4},
        ),
    )
)
