"""VHR: heads whose output an image changes most count more in every token of the answer. arXiv 2412.13949."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.given import real_tokens
from ...core.hooks import Hook, called_with
from ...core.kv_caches import find_cache
from ...core.registry import register_variant
from ...core.run import RUN, ModelRun, current_run, running
from ...core.selection import base_model
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantConfig, VariantInfo
from ...decoding.answering import answering_rows, note_asked
from ...decoding.text import text_generator
from ...vision.images import needed_layout
from ...vision.marks import IMAGE_TOKENS
from ...vision.variant import ImageTokenVariant, language_model_sites

_TEXT = "vhr.text"  # a note of a run over the text alone: what the heads of each attention module gave
_LATE = "vhr.late"  # a fact of a run: images came behind cached tokens


@dataclass(frozen=True, kw_only=True)
class VHRConfig(VariantConfig):
    """Settings of VHR; every field is described by `patchattn info vhr`."""

    alpha: float = option(
        2.0,
        help="Factor of what the chosen heads give; 1 changes nothing.",
        source="paper, second-hand",
        minimum=0.0,
        maximum=100.0,
    )
    last_layers: int = option(
        14,
        help="How many last layers of the language model are acted in.",
        source="paper, second-hand: LLaVA-1.5 7B; 18 in InstructBLIP",
        minimum=0,
    )
    second_layer: bool = option(
        True, help="Whether the second layer is acted in as well.", source="paper, second-hand: LLaVA-1.5 7B"
    )


class VHR(ImageTokenVariant):
    """What the more vision-aware half of a layer's heads gives is multiplied, from the prompt's last token on.

    Reports, where they are chosen, `divergence` `(B, H)` and `vision_aware` `(B, H)` bool.
    """

    config_class = VHRConfig
    config: VHRConfig

    @classmethod
    def fit(
        cls, config: VHRConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[VHRConfig, Sequence[AttentionSite]]:
        inside = language_model_sites(sites, needed_layout(model, "vhr"), by="VHR")
        if config.alpha == 1.0:
            return config, inside
        chosen = [site for site in inside if _acts_in(config, site)]
        if not chosen:
            raise ValueError(
                f"VHR leaves all of the chosen layers alone with last_layers={config.last_layers} and "
                f"second_layer={config.second_layer}."
            )
        return config, chosen

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"alpha": 1.0}

    @property
    def is_identity(self) -> bool:
        return self.config.alpha == 1.0

    @property
    def keeps_state(self) -> bool:
        return True

    def hooks(self, model: nn.Module) -> list[Hook]:
        base: Any = base_model(model)
        generator = Hook(base.get_submodule(text_generator(base)), "before", self.before_generator)
        return [generator, *super().hooks(model)]

    def before_generator(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not current_run().branch:
            note_asked(module, args, kwargs)

    def before_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = super().before_language_model(module, args, kwargs)
        run, marks = kwargs[RUN], kwargs[RUN].facts[IMAGE_TOKENS]
        given, cache = called_with(module, args, kwargs), find_cache([*args, *kwargs.values()])
        begins = cache is None or int(cache.get_seq_length()) == 0
        embeddings = given.get("inputs_embeds")
        if run.branch or _TEXT in current_run().notes or embeddings is None or not bool(marks.any()):
            return args, kwargs
        if not begins:
            return args, {**kwargs, RUN: run.handed_down({_LATE: marks})}
        real = real_tokens(
            given.get("attention_mask"), queries=marks.shape[1], keys=marks.shape[1], device=marks.device
        )
        heads = text_alone(module, embeddings.detach(), real & ~marks)
        return args, {**kwargs, RUN: run.handed_down({f"vhr.{name}": gave for name, gave in heads.items()})}

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        output, weights = inner(call)
        of_text = current_run().notes.get(_TEXT)
        if of_text is not None:
            of_text[self.site.name] = output[:, -1].detach()
        if of_text is not None or call.branch:
            return output, weights
        state, text = call.context.sequence_state("vhr"), call.run.facts.get(f"vhr.{self.site.name}")
        factor = None if state is None else state.tensors.get("factor")
        if factor is None and text is None:  # no image so far
            if _LATE in call.run.facts:
                raise NotImplementedError(
                    "VHR compares what heads give at a prompt's end with a run over its text, and images came behind "
                    "cached tokens: give them with the start of the text, in one call, and start with a new cache."
                )
            return output, weights
        rows = answering_rows(call, "vhr")
        is_scaled = torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)
        if factor is None:
            if rows is None:
                raise NotImplementedError(
                    "VHR compares what heads give at a prompt's end with a run over its text: the prompt must come in "
                    "one call."
                )
            factor = self._factors(call, output.detach(), rows[:, 0])
            is_scaled = torch.zeros_like(is_scaled).scatter(1, rows, value=True)
            if state is not None:
                state.write("factor", factor)
        gate = torch.where(is_scaled[..., None], factor.to(output.device)[:, None], 1.0)
        return output * gate[..., None].to(output.dtype), weights

    def _factors(self, call: AttentionCall, output: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """`(B, H)` float32 of the heads, by what they give `(B, Tq, H, D)` in the prompt's last row `(B,)`."""
        with_image = output[torch.arange(len(output), device=output.device), last]
        divergence = vision_divergence(with_image, call.run.facts[f"vhr.{self.site.name}"])
        chosen = divergence > divergence.median(-1, keepdim=True).values
        self.report(call, divergence=divergence, vision_aware=chosen)
        return torch.where(chosen, self.config.alpha, 1.0)


def vision_divergence(with_image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """`(B, H)` distance between what heads give with the image and without it, both `(B, H, D)`; 0 of outliers.

    An outlier diverges by more than a standard deviation above the mean of its layer's heads, and gives, for the text
    alone, a vector whose squared norm is as far above theirs.
    """
    dtype = torch.promote_types(text.dtype, torch.float32)
    with_image, text = with_image.to(dtype), text.to(dtype)
    distance, size = (with_image - text).norm(dim=-1), text.square().sum(-1)
    return distance.masked_fill(_stands_out(distance) & _stands_out(size), 0.0)


def _stands_out(values: torch.Tensor) -> torch.Tensor:
    return values > values.mean(-1, keepdim=True) + values.std(-1, keepdim=True)


@torch.no_grad()
def text_alone(module: nn.Module, embeddings: torch.Tensor, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the heads of each attention module with VHR give at the end of what is kept, `(B, H, D)` by its name.

    Args:
        module: the language model.
        embeddings: `(B, T, E)`.
        kept: `(B or 1, T)` bool. Those left over move to the right end, and their positions close up.
    """
    kept = kept.expand(len(embeddings), -1)
    length = max(int(kept.sum(-1).max()), 1)
    index = kept.long().argsort(dim=-1, stable=True)[:, -length:]
    real = kept.gather(1, index)
    found: dict[str, torch.Tensor] = {}
    run = ModelRun(facts={IMAGE_TOKENS: torch.zeros_like(real)}, notes={_TEXT: found})
    with running(run):
        module(
            inputs_embeds=embeddings.gather(1, index[..., None].expand(-1, -1, embeddings.shape[-1])),
            attention_mask=real.long(),
            position_ids=(real.long().cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            **{RUN: run},
        )
    return found


def _acts_in(config: VHRConfig, site: AttentionSite) -> bool:
    is_second = config.second_layer and site.layer_index == 1
    return is_second or site.layer_index >= site.layer_count - config.last_layers


register_variant(
    VariantInfo(
        name="vhr",
        variant=VHR,
        title="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        arxiv_id="2412.13949",
        year=2024,
        code="https://github.com/jinghan1he/VHR",
        summary="Heads whose output an image changes most are multiplied where tokens are chosen.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "compile", "without_images"},
        presets={"instructblip": {"last_layers": 18, "second_layer": False}},
        examples=({"last_layers": 2},),
    )
)
