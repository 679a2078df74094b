"""SSA: every token has its own softmax temperature. Selective Self-Attention, arXiv 2411.12892."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchattn_kernels import scale_tokens

from ..call import AttentionCall, LayerContext
from ..settings import option
from ..sites import AttentionSite
from ..variant import Attend, AttentionOutput, Variant, VariantConfig, VariantInfo, register_variant


@dataclass(frozen=True, kw_only=True)
class SSAConfig(VariantConfig):
    """Settings of SSA; every field is described by `patchattn info ssa`."""

    query: bool = option(True, help="Scale queries: how sharply a token attends.", source="paper: main recipe")
    key: bool = option(False, help="Scale keys.", source="paper: an ablation")
    value: bool = option(True, help="Scale values: how much a token gives to others.", source="paper: main recipe")
    token_aware: bool = option(
        True, help="Let the temperature depend on the token: tanh of a learned vector times the input.", source="paper"
    )
    position_aware: bool = option(
        True, help="Let it grow with log n, n the number of keys the token sees.", source="paper"
    )
    initial_alpha: float = option(
        -7.0,
        help="Start of the position weight alpha; sigmoid(alpha) multiplies log n. Low: close to identity.",
        source="ours, for pretrained models: sigmoid(-7) is 0.0009; the paper's start was not found",
        minimum=-1000.0,
        maximum=1000.0,
    )


class SSA(Variant):
    """Attention with inverse temperatures `tau = 1 + tanh(w x) + sigmoid(alpha) log n` on queries, keys or values.

    The leading 1 makes an untrained patch close to identity; it is ours, the rest is the paper's. Keys and values are
    scaled before the kv cache stores them, since their temperature belongs to the token that made them.
    """

    config_class = SSAConfig
    config: SSAConfig

    def __init__(self, config: SSAConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        self.streams = tuple(name for name in ("query", "key", "value") if getattr(config, name))
        if not self.streams:
            raise ValueError("SSA scales nothing: set at least one of query, key and value.")
        if not (config.token_aware or config.position_aware):
            raise ValueError("SSA has no temperature left: set token_aware or position_aware.")
        if config.token_aware and site.input_size is None:
            raise NotImplementedError(f"SSA cannot tell the input width of {site.name}; set token_aware=False.")
        for stream in self.streams:
            if config.token_aware:
                self.register_parameter(f"{stream}_token", nn.Parameter(torch.zeros(self._width(stream))))
            if config.position_aware:
                # One value in a vector, not a scalar: FSDP2 does not shard scalars.
                alpha = torch.full((1,), float(config.initial_alpha))
                self.register_parameter(f"{stream}_alpha", nn.Parameter(alpha))

    def _width(self, stream: str) -> int:
        width = self.site.input_size if stream == "query" or not self.site.is_cross else self.site.memory_size
        if width is None:
            raise NotImplementedError(f"SSA cannot tell the width of the other sequence of {self.site.name}.")
        return width

    @property
    def needs_context(self) -> bool:
        return self.config.token_aware and self.config.query

    @property
    def changes_cache(self) -> bool:
        return self.config.key or self.config.value

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"initial_alpha": -1000.0}  # sigmoid is 0 in float32, and the token part starts at 0

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if not self.config.query:
            return inner(call)
        tokens = call.layer_input() if self.config.token_aware else None
        tau = self.temperature("query", tokens, call.visible_keys())
        self.report(call, query_temperature=tau)
        return inner(call.replace(query=scale_tokens(call.query, tau)))

    def before_cache(
        self, key: torch.Tensor, value: torch.Tensor, context: LayerContext, visible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = None
        if self.config.token_aware:
            tokens = context.tokens(key.shape[0], key.shape[2], memory=self.site.is_cross)
        if self.config.key:
            key = scale_tokens(key, self.temperature("key", tokens, visible))
        if self.config.value:
            value = scale_tokens(value, self.temperature("value", tokens, visible))
        return key, value

    def temperature(self, stream: str, tokens: torch.Tensor | None, visible: torch.Tensor) -> torch.Tensor:
        """Inverse temperatures, in float32 at least.

        Args:
            stream: `query`, `key` or `value`.
            tokens: `(B, T, E)` what the token part reads, `None` without one.
            visible: `(B or 1, T or 1)` number of keys each token sees. A padded token that sees none counts as one.

        Returns:
            `(B or 1, T)`.
        """
        token, alpha = (getattr(self, f"{stream}_{part}", None) for part in ("token", "alpha"))
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        tau = visible.new_ones((), dtype=dtype)
        if token is not None and tokens is not None:
            tau = tau + torch.tanh((tokens.to(token.dtype) @ token).to(dtype))
        if alpha is not None:
            tau = tau + alpha.to(dtype).sigmoid() * visible.clamp(min=1).to(dtype).log()
        return tau


register_variant(
    VariantInfo(
        name="ssa",
        variant=SSA,
        title="Selective Attention: Enhancing Transformer through Principled Context Control",
        arxiv_id="2411.12892",
        year=2024,
        code="https://github.com/umich-sota/selective_attention",
        summary="Every token has its own softmax temperature, from its content and its position.",
        extra_parameters="one vector of the layer's width and one value per scaled stream and layer",
        needs_training=True,
        examples=({}, {"key": True}),
    )
)
