"""ThinK: keys of a prompt lose the channels that weigh least in its scores. Xu et al., arXiv 2407.21018."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...cache.state import SequenceState
from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import Attend, AttentionOutput, VariantConfig, VariantInfo
from ...reading.eviction import CAPABILITIES, EvictionVariant

_QUERY, _REAL, _DONE = "query", "real", "done"
_ROUNDING = 1e-6  # 0.3 * 10 may be less than 3 in floating point
_MAY_BE_GUESSES = (
    "chooses channels at the end of a prompt, and what it was just given may hold guesses that are taken back: no "
    "assisted decoding, and no crop before the next single token, under this variant."
)


@dataclass(frozen=True, kw_only=True)
class ThinKConfig(VariantConfig):
    """Settings of ThinK; every field is described by `patchattn info think`."""

    ratio: float = option(
        0.4,
        help="Share of a key's channels that is dropped, rounded down to whole ones.",
        source="released code: its scripts",
        minimum=0.0,
        maximum=1.0,
    )
    recent: int = option(
        32,
        help="Last keys of the prompt that stay whole, as do all that come later.",
        source="released code: its scripts",
        unit="keys",
        minimum=0,
    )
    window: int = option(
        32,
        help="Last queries of the prompt that say which channels matter.",
        source="released code",
        unit="tokens",
        minimum=1,
    )


class ThinK(EvictionVariant):
    """Attention to a prompt whose keys are stored without some channels, in each kv head others; values stay whole."""

    config_class = ThinKConfig
    config: ThinKConfig
    name = "think"
    splits_by_head = True

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"ratio": 0.0}

    @property
    def is_identity(self) -> bool:
        return self.config.ratio == 0.0

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        late = max(2, self.config.window)  # the end of a prompt, in one call, says all
        state = call.context.sequence_state(self.owner, late=late) if call.context.claim(self.owner) else None
        if state is None or _DONE in state.tensors:
            return inner(call)
        if call.query.shape[2] > 1:
            output = inner(call)
            self._observe(call, state)
            return output
        channels, count = self._chosen(call, state), call.key.shape[2] - 1 - self.config.recent
        state.settled = None
        for name in (_QUERY, _REAL):
            state.tensors.pop(name, None)
        if channels is None:
            return inner(call)
        dropped = torch.ones_like(call.key[:, :, :1], dtype=torch.bool).scatter_(-1, channels[:, :, None], False)
        earlier, later = call.key.tensor_split([count], dim=2)
        output = inner(call.replace(key=torch.cat([earlier.masked_fill(dropped, 0.0), later], dim=2)))
        call.context.narrow(self.owner, channels, count, call.key.shape[-1])
        state.write(_DONE, torch.ones(len(call.key), dtype=torch.bool, device=call.key.device))
        return output

    def _observe(self, call: AttentionCall, state: SequenceState) -> None:
        """Remember the last queries of the prompt so far."""
        count, batch = min(call.query.shape[2], self.config.window), len(call.query)
        query, real = call.query[:, :, -count:], call.mask.real().expand(batch, -1)[:, -count:]
        if _QUERY in state.tensors:
            query = torch.cat([state.tensors[_QUERY], query], dim=2)[:, :, -self.config.window :]
            real = torch.cat([state.tensors[_REAL], real], dim=1)[:, -self.config.window :]
        state.write(_QUERY, query.clone())
        state.write(_REAL, real.clone())
        state.settled = _MAY_BE_GUESSES

    def _chosen(self, call: AttentionCall, state: SequenceState) -> torch.Tensor | None:
        """`(B, Hkv, D')` int64, ascending: the channels that earlier keys keep; `None` where none is dropped."""
        width, keys = call.key.shape[-1], call.key.shape[2]
        drops = math.floor(self.config.ratio * width + _ROUNDING)
        if drops >= width:
            raise ValueError(f"ratio={self.config.ratio} leaves no channel of keys of {width}: give a smaller one.")
        if keys != call.mask.columns or len(call.query) != len(call.key):
            raise NotImplementedError(
                f"{self.owner} drops channels of the keys that the kv cache stores, and a variant outside of it hands "
                "on others: patch this one before that one."
            )
        if _QUERY not in state.tensors or drops == 0 or keys - 1 <= self.config.recent:
            return None
        self._refuse_padding_behind(call)
        order = self.scores(call, state).argsort(dim=-1, descending=True, stable=True)
        return order[..., : width - drops].sort(dim=-1).values

    def scores(self, call: AttentionCall, state: SequenceState) -> torch.Tensor:
        """`(B, Hkv, D)` how much channels of the prompt's keys matter, in float32 at least."""
        query, key = (
            tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            for tensor in (state.tensors[_QUERY], call.key[:, :, :-1])
        )
        real = _real_keys(call).expand(len(key), -1, -1)
        of_queries = query.square().masked_fill(~state.tensors[_REAL][:, None, :, None], 0.0).sum(2)
        of_keys = key.square().masked_fill(~real[..., None], 0.0).sum(2)
        return of_queries.unflatten(1, (key.shape[1], -1)).mean(2) * of_keys

    def _refuse_padding_behind(self, call: AttentionCall) -> None:
        recent = self.config.recent
        if recent == 0 or (call.mask.real_columns is None and call.mask.pairs is None):
            return
        real = _real_keys(call)
        last, held = real[..., -recent:].sum(-1), real.sum(-1)
        if bool((last < held.clamp(max=recent)).any()):
            raise NotImplementedError(
                f"{self.owner} keeps the last {recent} keys of a prompt whole, and padding stands among or behind "
                "them: pad prompts on the left."
            )


def _real_keys(call: AttentionCall) -> torch.Tensor:
    """`(B or 1, 1, Tk - 1)` bool: which of the keys before the newest one are text."""
    return call.mask.real_keys()[:, :1, :-1]


register_variant(
    VariantInfo(
        name="think",
        variant=ThinK,
        title="ThinK: Thinner Key Cache by Query-Driven Pruning",
        arxiv_id="2407.21018",
        year=2024,
        code="https://github.com/SalesforceAIResearch/ThinK",
        summary="The kv cache keeps the channels of a prompt's keys that weigh most in the scores of its last queries.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES,
        examples=({"ratio": 0.5, "recent": 3, "window": 4}, {"ratio": 0.3, "recent": 0, "window": 20}),
    )
)
