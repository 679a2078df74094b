"""VAR, Visual Attention Redistribution: heads that look at the image look less at sinks. arXiv 2503.03321."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from patchattn_kernels import split_attention

from ...core.call import AttentionCall
from ...core.hooks import Hook, enclosing_layer, with_residual
from ...core.linear import is_dispatched
from ...core.registry import register_variant
from ...core.renaming import Renaming
from ...core.selection import base_model, evaluating
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantConfig, VariantInfo
from ...vision.images import ImageLayout, needed_layout
from ...vision.marks import image_tokens
from ...vision.variant import ImageTokenVariant, language_model_sites


@dataclass(frozen=True, kw_only=True)
class VARConfig(VariantConfig):
    """Settings of VAR; every field is described by `patchattn info var`."""

    move_fraction: float = option(
        0.4,
        help="Share of the sinks' attention that moves to the other image tokens; 0 changes nothing.",
        source="released code, which keeps p = 0.6 of it; the paper moves 0.6 (preset=paper)",
        minimum=0.0,
        maximum=1.0,
    )
    sink_dims: tuple[int, ...] | None = option(
        None,
        help="Dimensions of the hidden state whose massive activations make a token a sink. None: found when the model "
        "is patched, and kept with the patch.",
        source="ours; the released code knows those of two models, the paper those of four",
        minimum=0,
    )
    sink_threshold: float = option(
        20.0,
        help="A token is a sink in a layer if one of the sink_dims of the layer's input exceeds this many times its "
        "root mean square (tau).",
        source="released code",
        minimum=0.0,
        maximum=1e6,
    )
    max_sink_share: float = option(
        0.5,
        help="A head moves attention in rows in which visual sinks have at most this share of the image's attention; "
        "1 - rho in the paper, rho in the released code.",
        source="released code; the paper's rho of 0.8, 0.5 and 0.9 is 0.2, 0.5 and 0.1 here (presets)",
        minimum=0.0,
        maximum=1.0,
    )
    min_image_share: float = option(
        0.2,
        help="A head moves attention in rows in which the image has at least this share of all attention (summ).",
        source="released code",
        minimum=0.0,
        maximum=1.0,
    )
    first_layer: int = option(
        2, help="First layer of the language model to act in, counted from 0.", source="released code", minimum=0
    )
    except_last: bool = option(
        True, help="Leave the last layer alone.", source="paper; the released code's flag has no effect"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink_dims == ():
            raise ValueError("sink_dims is empty: name dimensions, or leave it out to have them found.")


class VAR(ImageTokenVariant):
    """Attention of a language model that moves weight from sinks to the image tokens that are none.

    Reports `sink_keys` `(B, Tk)`, `image_keys` `(B, Tk)`, and `image_centric` `(B, Tq, H)`, where weight was moved.
    """

    config_class = VARConfig
    config: VARConfig

    def __init__(self, config: VARConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        self.layer = enclosing_layer(site.name)
        if site.input_size is not None and config.sink_dims and max(config.sink_dims) >= site.input_size:
            raise ValueError(
                f"sink_dims must lie between 0 and {site.input_size - 1}, the width of {site.name}, got "
                f"{list(config.sink_dims)}."
            )

    def rename(self, site: AttentionSite, config: Any, renaming: Renaming) -> None:
        super().rename(site, config, renaming)
        self.layer = enclosing_layer(site.name)

    @classmethod
    def fit(
        cls, config: VARConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[VARConfig, Sequence[AttentionSite]]:
        name = type(base_model(model)).__name__
        layout = needed_layout(model, "var")
        if layout.query_former is not None:
            raise NotImplementedError(
                f"VAR is for image tokens that are patches of the image; those of {name} come from a query former."
            )
        inside = language_model_sites(sites, layout, by="VAR")
        if config.move_fraction > 0.0:
            inside = [site for site in inside if _acts_in(config, site)]
            if not inside:
                raise ValueError(
                    f"VAR leaves all of the chosen layers alone with first_layer={config.first_layer} and "
                    f"except_last={config.except_last}."
                )
            if config.sink_dims is None:
                layers = [site.layer_index for site in inside]
                config = replace(config, sink_dims=massive_dimensions(model, layout, layers, config.sink_threshold))
        return config, inside

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"move_fraction": 0.0}

    @property
    def is_identity(self) -> bool:
        return self.config.move_fraction == 0.0 or not _acts_in(self.config, self.site)

    def hooks(self, model: nn.Module) -> list[Hook]:
        layer = base_model(model).get_submodule(self.layer)
        return [*super().hooks(model), Hook(layer, "before", self.before_layer)]

    def before_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_residual(args, kwargs)

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        """A token keeps the marks that it came with."""
        return {"var.sink": self._are_sinks(call.context.residual()), "var.image": image_tokens(call)}

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        output, weights = inner(call)
        is_image = image_tokens(call)
        sinks, image = (call.key_fact(name)[:, 0] for name in ("var.sink", "var.image"))
        others = image & ~sinks
        heads, rule = call.query.shape[1], call.rule()

        def split(keys: torch.Tensor, **known: torch.Tensor) -> Any:
            per_head = keys[:, None].expand(-1, heads, -1)
            return split_attention(call.query, call.key, call.value, per_head, rule, **known)

        from_sinks = split(sinks, output=output.transpose(1, 2))
        known = {"lse": from_sinks.lse, "output": from_sinks.output}
        to_others, visual = split(others, **known), split(image & sinks, **known).mass
        share = visual + to_others.mass
        chosen = (share >= self.config.min_image_share) & (visual <= self.config.max_sink_share * share)
        # Without a visual sink among the keys that a row sees, or with nowhere to move attention to, nothing changes.
        chosen = chosen & (visual > 0) & (to_others.mass > 0) & ~is_image[:, None]
        moved = self.config.move_fraction * chosen.to(share.dtype)
        gain = moved * from_sinks.mass / to_others.mass.where(chosen, 1.0)
        self.report(call, sink_keys=sinks, image_keys=image, image_centric=chosen.transpose(1, 2))

        changed = from_sinks.output - moved[..., None] * from_sinks.part + gain[..., None] * to_others.part
        if weights is not None:
            shift = gain[..., None] * others[:, None, None] - moved[..., None] * sinks[:, None, None]
            weights = (weights * (1.0 + shift)).to(weights.dtype)
        return changed.transpose(1, 2).to(output.dtype), weights

    def _are_sinks(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(B, T)` bool: which hidden states `(B, T, E)` have a massive activation in one of the sink dimensions."""
        ratios = activation_ratios(hidden)  # a list of dimensions would first have to go to the device
        largest = torch.stack([ratios[..., dim] for dim in self.config.sink_dims or ()]).amax(dim=0)
        return largest > self.config.sink_threshold


def activation_ratios(hidden: torch.Tensor) -> torch.Tensor:
    """Size of each activation `(..., E)` relative to the root mean square of its hidden state, in float32 at least."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    size = hidden.square().mean(dim=-1, keepdim=True).sqrt()
    return hidden.abs() / size.clamp(min=torch.finfo(size.dtype).tiny)


def massive_dimensions(
    model: nn.Module, layout: ImageLayout, layers: Sequence[int], threshold: float
) -> tuple[int, ...]:
    """Dimensions that are massive in the first token of a sequence, where language models have them whatever it is.

    Raises:
        ValueError: there are none, or the model has no weights yet.
    """
    base: Any = base_model(model)
    language_model = base.get_submodule(layout.language_model)
    start = getattr(base.config.get_text_config(), "bos_token_id", None)
    embedding = base.get_input_embeddings()
    parts = [part for part in language_model.modules() if not is_dispatched(part)]
    if any(weight.is_meta for part in parts for weight in part.parameters(recurse=False)):
        raise ValueError("VAR looks for sink_dims in the weights, which this model does not have yet: give sink_dims.")
    device = "cpu" if embedding.weight.is_meta else embedding.weight.device
    ids = torch.tensor([[start if isinstance(start, int) else 0]], device=device)
    with evaluating(base), torch.no_grad():
        states = language_model(inputs_embeds=embedding(ids), output_hidden_states=True, use_cache=False).hidden_states
    ratios = activation_ratios(torch.stack([states[layer].flatten() for layer in layers])).amax(dim=0)
    found = (ratios > threshold).nonzero().flatten().tolist()
    if not found:
        raise ValueError(
            f"VAR found no massive activation in {type(base).__name__}: the largest is {float(ratios.max()):.1f} times "
            f"the root mean square, in dimension {int(ratios.argmax())}, and sink_threshold is {threshold}. Give "
            "sink_dims, and a lower sink_threshold."
        )
    return tuple(found)


def _acts_in(config: VARConfig, site: AttentionSite) -> bool:
    last = site.layer_count - 1
    return config.first_layer <= site.layer_index and not (config.except_last and site.layer_index == last)


register_variant(
    VariantInfo(
        name="var",
        variant=VAR,
        title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        arxiv_id="2503.03321",
        year=2025,
        code="https://github.com/seilk/VisAttnSink",
        summary="Heads that look at the image move attention from sinks to the other image tokens.",
        extra_parameters="none",
        needs_training=False,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "dropout", "without_images"},
        presets={
            "paper": {"move_fraction": 0.6, "max_sink_share": 0.2},
            "paper_hallucination": {"move_fraction": 0.6, "max_sink_share": 0.5},
            "paper_vision_centric": {"move_fraction": 0.6, "max_sink_share": 0.1},
            "llava_1_5_7b": {"sink_dims": [1415, 2533]},
            "llava_1_5_13b": {"sink_dims": [2100, 4743]},
        },
        examples=(
            {
                "sink_dims": [3, 17],
                "sink_threshold": 1.0,
                "max_sink_share": 0.9,
                "min_image_share": 0.1,
                "first_layer": 0,
                "except_last": False,
            },
        ),
    )
)
