"""PAINT: attention to what the vision encoder attends to is raised, near and far. arXiv 2501.12206."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.hooks import Hook
from ...core.registry import register_variant
from ...core.run import RUN
from ...core.selection import base_model
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantInfo
from ...decoding.guidance import GuidanceConfig, GuidedVariant
from ...vision.images import image_layout, needed_layout
from ...vision.latest import latest_pass
from ...vision.marks import IMAGE_TOKENS
from ...vision.outliers import attention_received, places_of, unknown_images

_LOCAL, _SUMMARY = "paint.local", "paint.summary"


@dataclass(frozen=True, kw_only=True)
class PAINTConfig(GuidanceConfig):
    """Settings of PAINT; every field is described by `patchattn info paint`."""

    gamma: float = option(
        1.0,
        help="Strength of the contrast: gamma logits - (gamma - 1) logits without the images. 1: none, and then no cut "
        "and no second pass.",
        source="ours; the released command for captions has 1.1",
        minimum=0.0,
        maximum=1000.0,
    )
    local_alpha: float = option(
        0.7,
        help="By which share of its size a logit of a local token is raised.",
        source="released code",
        minimum=0.0,
        maximum=100.0,
    )
    summary_alpha: float = option(
        0.3,
        help="By which share of its size a logit of a summary token is raised.",
        source="released code; the paper finds 0.4 best",
        minimum=0.0,
        maximum=100.0,
    )
    local_share: float = option(
        0.25,
        help="Share of an image's tokens that are local, before those that are summary tokens are left out.",
        source="released code",
        minimum=0.0,
        maximum=1.0,
    )


class PAINT(GuidedVariant):
    """Logits of image tokens are `s + a |s|` where tokens are chosen, with an a for local and one for summary tokens.

    Reports, from the vision encoder, `class_attention` `(pictures, patches)` of two of its layers.
    """

    config_class = PAINTConfig
    config: PAINTConfig
    name = "paint"
    place = ""  # in the vision encoder: which of its two layers

    @property
    def seen(self) -> SimpleNamespace:
        """Of the vision encoder: .first, .last `(pictures, patches)` what the class token gave patches in two layers;
        .tokens `(M, E)` image tokens made of it; .local, .summary `(M,)` bool: which are raised."""
        return latest_pass(self.name)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"local_alpha": 0.0, "summary_alpha": 0.0, "gamma": 1.0}

    @classmethod
    def raises(cls, config: PAINTConfig) -> bool:
        return config.local_alpha != 0.0 or config.summary_alpha != 0.0

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        layout = needed_layout(model, cls.name)
        if layout.query_former is not None or not layout.has_class_token:
            raise NotImplementedError(
                f"PAINT ranks image tokens by the attention that the vision encoder's class token pays to patches; in "
                f"{type(base_model(model)).__name__} there is no class token, or tokens are no patches."
            )
        config, inside = super().fit(config, model, sites)
        if not cls.raises(config):
            return config, inside
        encoder = {site.layer_index: site for site in sites if site.name.startswith(f"{layout.tower}.")}
        if not {0, layout.feature_layer} <= encoder.keys():
            raise ValueError(f"PAINT finds no attention in layers 0 and {layout.feature_layer} of {layout.tower}.")
        return config, [*inside, *(encoder[number] for number in sorted({0, layout.feature_layer}))]

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        layout = image_layout(model)
        self.is_tiled = layout.is_tiled
        if self.site.name.startswith(f"{layout.tower}."):
            self.place = "".join(
                name
                for name, number in (("first", 0), ("last", layout.feature_layer))
                if self.site.layer_index == number
            )

    def hooks(self, model: nn.Module) -> list[Hook]:
        if not self.raises(self.config):
            return super().hooks(model)
        features = model.get_submodule(image_layout(model).features)
        return [*super().hooks(model), Hook(features, "after", self.after_features)]

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if not self.place:
            return super().attend(call, inner)
        if self.is_active:
            scores = attention_received(call.query.detach(), call.key.detach(), call.scaling, score="cls")[:, 1:]
            self.report(call, class_attention=scores)
            for name in ("first", "last"):
                if name in self.place:
                    setattr(self.seen, name, scores)
        return inner(call)

    def after_features(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        if not self.is_active:
            return
        local, summary = raised_patches(self.seen.first, self.seen.last, self.config.local_share)
        spare = output.shape[1] - local.shape[1]  # a class token among the image tokens is no patch
        self.seen.tokens = output.detach().flatten(0, 1)
        self.seen.local, self.seen.summary = (nn.functional.pad(one, (spare, 0)).flatten() for one in (local, summary))

    def before_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = super().before_language_model(module, args, kwargs)
        run, embeddings = kwargs[RUN], kwargs.get("inputs_embeds")
        marks = run.facts[IMAGE_TOKENS]
        facts = {name: torch.zeros_like(marks) for name in (_LOCAL, _SUMMARY)}
        if self.raises(self.config) and not run.branch and embeddings is not None and bool(marks.any()):
            tokens, known = embeddings[marks], getattr(self.seen, "tokens", None)
            places = None if known is None else places_of(known.to(tokens), tokens)
            if places is None or not bool((places >= 0).any() if self.is_tiled else (places >= 0).all()):
                raise unknown_images()
            for name, flags in ((_LOCAL, self.seen.local), (_SUMMARY, self.seen.summary)):
                chosen = flags.to(places.device)[places.clamp(min=0)] & (places >= 0)  # newlines are no patches
                facts[name] = facts[name].masked_scatter(marks, chosen)
        return args, {**kwargs, RUN: run.handed_down(facts)}

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        if self.place:
            return {}
        return {name: call.context.handed_down(name, "which image tokens to raise") for name in (_LOCAL, _SUMMARY)}

    def boosts(self, call: AttentionCall) -> torch.Tensor:
        local, summary = (call.key_fact(name).float() for name in (_LOCAL, _SUMMARY))
        return self.config.local_alpha * local + self.config.summary_alpha * summary


def raised_patches(first: torch.Tensor, last: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Local and summary patches of every picture, both `(pictures, patches)` bool.

    Summary patches are outliers of the late layer, above the third quartile by more than 1.5 times the range between
    quartiles; local ones the share that is attended to most in the first layer, but for summary ones.

    Args:
        first: `(pictures, patches)` the class token's attention in the first layer.
        last: the same of the late one.
        share: of patches.
    """
    low, high = torch.quantile(last, torch.tensor([0.25, 0.75], dtype=last.dtype, device=last.device), dim=-1)
    summary = last > (high + 1.5 * (high - low))[:, None]
    count = int(share * first.shape[-1])
    local = torch.zeros_like(summary).scatter(-1, first.topk(count).indices, value=True)
    return local & ~summary, summary


register_variant(
    VariantInfo(
        name="paint",
        variant=PAINT,
        title="Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
        arxiv_id="2501.12206",
        year=2025,
        code="https://github.com/hasanar1f/PAINT",
        summary="Attention to tokens that the vision encoder attends to is raised where tokens are chosen.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES
        - {"cross", "static_cache", "compile", "sinks", "position_bias", "without_images"},
        presets={"captions": {"local_alpha": 0.9, "gamma": 1.1}},
        examples=({"first_layer": 0, "gamma": 1.5, "local_share": 0.5},),
    )
)
