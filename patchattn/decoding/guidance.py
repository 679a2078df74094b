"""Answers drawn to the image: attention to image tokens is raised where tokens are chosen, and logits are contrasted
with those of the same prompt without its images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.hooks import Hook
from ..core.host import host
from ..core.settings import option
from ..core.sites import AttentionSite
from ..core.variant import Attend, AttentionOutput, VariantConfig
from ..softmax.rows import attend_rows
from ..vision.images import image_layout, needed_layout
from ..vision.marks import image_tokens, with_true_image_tokens
from ..vision.variant import language_model_sites
from .answering import answering_rows, note_asked
from .text import TextDecodingVariant
from .variant import BranchStep, Step, only_plausible


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig(VariantConfig):
    """Settings of the contrast with a prompt without its images, and of where attention is raised."""

    gamma: float = option(
        1.1,
        help="Strength of the contrast: gamma logits - (gamma - 1) logits without the images. 1: none, and then no cut "
        "and no second pass.",
        source="released code",
        minimum=0.0,
        maximum=1000.0,
    )
    beta: float = option(
        0.1,
        help="With a contrast: only tokens at least beta times as probable as the most probable one can be chosen; 0 "
        "allows all.",
        source="released code",
        minimum=0.0,
        maximum=1.0,
    )
    first_layer: int = option(
        2, help="First layer of the language model to act in, counted from 0.", source="released code", minimum=0
    )
    last_layer: int | None = option(
        None,
        help="Last layer of the language model to act in. None: its last.",
        source="released code: 31, the last of LLaVA-1.5 7B",
        minimum=0,
    )


class GuidedVariant(TextDecodingVariant):
    """Logits `s_j + a_j |s_j|` of image tokens j, in the rows that tokens are chosen by; guidance by a second branch.

    A subclass says by `boosts` and `raises` how large a_j is. Register it as `innermost`, without `sinks`,
    `position_bias` and `without_images`. The second branch has no images, and its attention is as it was.
    """

    config: GuidanceConfig
    attends = True
    name = ""  # in the registry

    @classmethod
    def raises(cls, config: Any) -> bool:
        """Whether these settings change attention at all."""
        raise NotImplementedError(f"{cls.__name__} must define raises(config).")

    def boosts(self, call: AttentionCall) -> torch.Tensor:
        """`(B or 1, 1, Tk)` float32: a_j of every key."""
        raise NotImplementedError(f"{type(self).__name__} must define boosts(call).")

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        layout = needed_layout(model, cls.name)
        inside = language_model_sites(sites, layout, by=cls.__name__)
        if not cls.raises(config):
            return config, inside[-1:]
        last = math.inf if config.last_layer is None else config.last_layer
        chosen = [site for site in inside if config.first_layer <= site.layer_index <= last]
        if not chosen:
            raise ValueError(
                f"{cls.__name__} leaves all layers alone: {layout.language_model} has {inside[-1].layer_count}, and "
                f"first_layer is {config.first_layer}, last_layer {config.last_layer}."
            )
        return config, chosen

    @property
    def is_identity(self) -> bool:
        return self.config.gamma == 1.0 and not self.raises(self.config)

    @property
    def keeps_state(self) -> bool:
        return not self.is_identity

    def hooks(self, model: nn.Module) -> list[Hook]:
        generator: Any = model.get_submodule(self.generator)
        own = [
            Hook(generator, "before", self.before_asked),
            Hook(model.get_submodule(image_layout(model).language_model), "before", self.before_language_model),
        ]
        if self.config.gamma != 1.0 or not self.raises(self.config):
            return [*super().hooks(model), *own]
        return [  # attention alone is changed, and what is asked of logits is nobody's business
            Hook(generator.get_input_embeddings(), "before", self.before_embedding),
            *own,
            Hook(generator.get_decoder(), "finally", self.after_decoder),
            Hook(model, "finally", self.after_model),
        ]

    def before_asked(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_active:
            note_asked(module, args, kwargs)

    def before_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner = type(self).__name__
        return with_true_image_tokens(owner, self.placeholders, module, self.before_embedding, args, kwargs)

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        return {f"{self.name}.image": image_tokens(call)}

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        rows = None if call.branch or not self.raises(self.config) else answering_rows(call, self.name)
        if rows is None:
            return inner(call)
        boosts = self.boosts(call)[:, :, None]

        def weigh(logits: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
            more = boosts.to(logits.dtype) * logits.abs()
            return (logits + more.where(visible, 0.0)).softmax(-1)

        if call.query.shape[2] == 1:
            output, own = attend_rows(call, weigh)
            asked = call.kwargs.get("output_attentions") or not host().computes_softmax(call.base)
            return output, own if asked else None
        output, weights = inner(call)
        place = rows[:, None, :, None]
        query = call.query.gather(2, place.expand(-1, call.query.shape[1], -1, call.query.shape[3]))
        raised, theirs = attend_rows(call.replace(query=query, mask=call.mask.of_rows(rows)), weigh)
        if weights is not None:
            weights = weights.scatter(2, place.expand_as(theirs), theirs.to(weights.dtype))
        return output.scatter(1, rows[..., None, None].expand_as(raised), raised.to(output.dtype)), weights

    def branches(self, step: Step) -> list[BranchStep]:
        images = self.same(step).image
        return [self.without(step, images)]

    def combine(self, logits: torch.Tensor, branch_logits: list[torch.Tensor]) -> torch.Tensor:
        gamma = self.config.gamma
        guided = gamma * logits + (1.0 - gamma) * branch_logits[0]
        return only_plausible(guided, logits, 0.0 if gamma == 1.0 else self.config.beta)
