"""SSA: every token has its own softmax temperature. Selective Self-Attention, arXiv 2411.12892."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from patchattn_kernels import scale_tokens

from ...core.call import AttentionCall
from ...core.patching import active_chains
from ...core.registry import register_variant
from ...core.selection import base_model
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.surroundings import LayerContext
from ...core.variant import Attend, AttentionOutput, Variant, VariantConfig, VariantInfo

STREAMS = ("query", "key", "value")
_START = {"sigmoid": -7.0, "exp_neg_exp": 2.0, "none": 1e-5}  # position coefficients of 9e-4, 6e-4 and 1e-5


@dataclass(frozen=True, kw_only=True)
class SSAConfig(VariantConfig):
    """Settings of SSA; every field is described by `patchattn info ssa`."""

    query: bool = option(True, help="Scale queries: how sharply a token attends.", source="paper: main recipe")
    key: bool = option(False, help="Scale keys: how sharply others attend to a token.", source="paper: an ablation")
    value: bool = option(True, help="Scale values: how much a token gives to others.", source="paper: main recipe")
    token_aware: bool = option(
        True,
        help="Let the temperature depend on the token: tanh of a learned vector times its features.",
        source="paper",
    )
    position_aware: bool = option(
        True, help="Let the temperature grow with log n, n the number of keys the token sees.", source="paper"
    )
    features: Literal["input", "projection"] = option(
        "input",
        help="What the token part reads. input: the layer's input. projection: GELU of the stream's own projection of "
        "it, whose weights it shares.",
        source="ours; the paper has both kinds, and its exact function was not found",
    )
    squash: Literal["sigmoid", "exp_neg_exp", "none"] = option(
        "sigmoid",
        help="How alpha becomes the coefficient of log n: sigmoid(alpha), exp(-exp(alpha)) or alpha itself.",
        source="paper (sigmoid); the released code has the other two",
    )
    initial_alpha: float | None = option(
        None,
        help="Start of alpha. None: -7, 2 or 1e-5, by squash; each is close to the identity.",
        source="ours (-7), for pretrained models, the paper's start was not found; released code (2 and 1e-5)",
        minimum=-1000.0,
        maximum=20.0,
    )


class SSA(Variant):
    """Attention with inverse temperatures `tau = 1 + tanh(w f(x)) + squash(alpha) log n` on queries, keys or values.

    The leading 1 makes an untrained patch close to identity; it is ours, the rest is the paper's. Keys and values are
    scaled before the kv cache stores them, since their temperature belongs to the token that made them.
    """

    config_class = SSAConfig
    config: SSAConfig

    def __init__(self, config: SSAConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        self.streams = tuple(name for name in STREAMS if getattr(config, name))
        if not self.streams:
            raise ValueError("SSA scales nothing: set at least one of query, key and value.")
        if not (config.token_aware or config.position_aware):
            raise ValueError("SSA has no temperature left: set token_aware or position_aware.")
        start = _START[config.squash] if config.initial_alpha is None else config.initial_alpha
        if config.squash == "exp_neg_exp" and start > 4.0:
            raise ValueError(f"SSA with exp(-exp(alpha)) learns nothing from alpha = {start}: start at most at 4.")
        for stream in self.streams:
            if config.token_aware:
                self.register_parameter(f"{stream}_token", nn.Parameter(torch.zeros(self._width(stream))))
            if config.position_aware:
                # One value in a vector, not a scalar: FSDP2 does not shard scalars.
                self.register_parameter(f"{stream}_alpha", nn.Parameter(torch.full((1,), float(start))))

    def _width(self, stream: str) -> int:
        site = self.site
        if self.config.features == "projection":
            return site.projection_sizes[self._projection(stream)]
        fact = "memory_size" if stream != "query" and site.is_cross else "input_size"
        return site.require(fact, by="SSA", instead="set token_aware=False")

    def _projection(self, stream: str) -> str:
        """Role of the projection that makes a stream; a fused one makes all, but the queries of cross attention."""
        roles = [stream] if stream == "query" and self.site.is_cross else [stream, "fused"]
        role = next((role for role in roles if role in self.site.projection_sizes), None)
        if role is None:
            raise NotImplementedError(
                f"SSA finds no projection in {self.site.module_class} ({self.site.name}) that makes its {stream} from "
                'the layer\'s input; set features="input".'
            )
        return role

    @property
    def needs_context(self) -> bool:
        return self.config.token_aware and self.config.query

    @property
    def changes_cache(self) -> bool:
        return self.config.key or self.config.value

    @property
    def splits_by_head(self) -> bool:
        """A whole projection is that of all heads."""
        return self.config.features == "input" or not self.config.token_aware

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        # sigmoid is 0 in float32, and the token part starts at 0
        return {"squash": "sigmoid", "initial_alpha": -1000.0}

    def fast_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if name.endswith("_alpha")]

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if self.config.query:
            features = None
            if self.config.token_aware:
                features = self.features("query", call.module, call.context.layer_input())
            tau = self.temperature("query", features, call.mask.log_counts(self._dtype("query")))
            call = call.replace(query=scale_tokens(call.query, tau))
            if self.observers:
                self.report(call, query_temperature=tau)
        return inner(call)

    def before_cache(
        self, key: torch.Tensor, value: torch.Tensor, context: LayerContext, visible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = None
        if self.config.token_aware:
            tokens = context.tokens(key.shape[0], key.shape[2], memory=self.site.is_cross)
        states = {"key": key, "value": value}
        for stream in ("key", "value"):
            if stream in self.streams:
                features = None if tokens is None else self.features(stream, context.module, tokens)
                tau = self.temperature(stream, features, context.log_counts(visible, self._dtype(stream)))
                states[stream] = scale_tokens(states[stream], tau)
                if self.observers:
                    self.report(context, **{f"{stream}_temperature": tau})
        return states["key"], states["value"]

    def features(self, stream: str, module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, T, E)` what the token part of a stream reads, from `(B, T, E')`, what the stream is made of."""
        if self.config.features == "input":
            return tokens
        projection = module.get_submodule(self.site.projections[self._projection(stream)])
        return nn.functional.gelu(projection(tokens))

    def _dtype(self, stream: str) -> torch.dtype:
        """What temperatures of a stream are computed in: that of its parameters, or float32."""
        name = f"{stream}_token" if self.config.token_aware else f"{stream}_alpha"
        return torch.promote_types(getattr(self, name).dtype, torch.float32)

    def temperature(self, stream: str, features: torch.Tensor | None, log_counts: torch.Tensor) -> torch.Tensor:
        """Inverse temperatures, in float32 at least.

        Args:
            stream: `query`, `key` or `value`.
            features: `(B, T, E)` what the token part reads, `None` without one.
            log_counts: `(B or 1, T or 1)` logarithm of the number of keys each token sees, `(B or 1, T or 1, H)` under
                a mask per head.

        Returns:
            `(B or 1, T)`, with heads if `log_counts` has them.
        """
        tau = log_counts.new_ones(()) if features is None else self._token_part(stream, features, log_counts).add(1.0)
        if not self.config.position_aware:
            return tau
        return torch.addcmul(tau, self.position_coefficient(stream), log_counts)

    def _token_part(self, stream: str, features: torch.Tensor, log_counts: torch.Tensor) -> torch.Tensor:
        token = getattr(self, f"{stream}_token")
        product = (features if features.dtype == token.dtype else features.to(token.dtype)) @ token
        part = (product if product.dtype == log_counts.dtype else product.to(log_counts.dtype)).tanh()
        return part if log_counts.dim() == 2 else part.unsqueeze(-1)

    def fold(self, plain: nn.Module) -> None:
        """Only the constant part of the temperatures, 1, is in the weights already."""
        for stream in self.streams:
            by_token = self.config.token_aware and getattr(self, f"{stream}_token").any()
            if by_token or (self.config.position_aware and self.position_coefficient(stream).any()):
                raise NotImplementedError(f"its {stream} temperature is not the same for all tokens")

    def position_coefficient(self, stream: str) -> torch.Tensor:
        """`(1,)` what multiplies log n for a scaled stream, in float32 at least."""
        alpha = getattr(self, f"{stream}_alpha")
        wide = torch.promote_types(alpha.dtype, torch.float32)
        alpha = alpha if alpha.dtype == wide else alpha.to(wide)
        if self.config.squash == "sigmoid":
            return alpha.sigmoid()
        return (-alpha.exp()).exp() if self.config.squash == "exp_neg_exp" else alpha


_RELEASED = {"value": False, "token_aware": False}


@torch.no_grad()
def position_coefficients(model: nn.Module) -> dict[str, dict[str, float]]:
    """What multiplies log n in SSA's temperatures, as learned.

    Returns:
        Name of the attention module to stream (`query`, `key`, `value`) to coefficient.

    Raises:
        ValueError: no layer carries SSA with a position part.
    """
    found: dict[str, dict[str, float]] = {}
    for name, chain in active_chains(base_model(model)).items():
        for variant in chain.children():
            if isinstance(variant, SSA) and variant.config.position_aware:
                found[name] = {stream: float(variant.position_coefficient(stream)) for stream in variant.streams}
    if not found:
        raise ValueError(f"No layer of {type(model).__name__} carries SSA with position_aware=True.")
    return found


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
        presets={
            "released": {**_RELEASED, "squash": "exp_neg_exp", "initial_alpha": 2.0},
            "released_gpt2": {**_RELEASED, "squash": "exp_neg_exp", "initial_alpha": 1.5},
            "released_linear": {**_RELEASED, "squash": "none", "initial_alpha": 1e-5},
        },
        examples=({}, {"key": True, "features": "projection", "squash": "exp_neg_exp"}),
    )
)
