"""HiPrune: before the language model, image tokens are chosen by the vision encoder's layers. arXiv 2508.00553."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.hooks import Hook
from ...core.registry import register_variant
from ...core.run import current_run
from ...core.selection import base_model
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantConfig, VariantInfo
from ...vision.images import image_layout, needed_layout
from ...vision.latest import latest_pass
from ...vision.outliers import attention_received, places_of, unknown_images
from ...vision.token_pruning import PruningStep, TokenPruning


@dataclass(frozen=True, kw_only=True)
class HiPruneConfig(VariantConfig):
    """Settings of HiPrune; every field is described by `patchattn info hiprune`."""

    keep_ratio: float = option(
        1 / 3,
        help="Share of an image's tokens that are kept; 1 changes nothing.",
        source="released code: 192, 128 or 64 of 576",
        minimum=0.0,
        maximum=1.0,
    )
    alpha: float = option(
        0.1,
        help="Share of the kept tokens that are anchors and their neighbours.",
        source="released code",
        minimum=0.0,
        maximum=1.0,
    )
    middle_layer: int = option(
        8,
        help="Layer of the vision encoder that anchors are chosen by, counted from 0.",
        source="released code: the ninth of CLIP's 24",
        minimum=0,
    )


class HiPrune(TokenPruning):
    """What is kept are the most attended tokens of a middle layer of the vision encoder, their neighbours, and those of
    a deep one.

    Reports, from the vision encoder, `attention_received` `(pictures, N)` of two of its layers.
    """

    config_class = HiPruneConfig
    config: HiPruneConfig
    name = "hiprune"
    place = ""  # in the vision encoder: which of its two layers

    @property
    def seen(self) -> SimpleNamespace:
        """Of the vision encoder: .middle, .deep `(pictures, N)` attention that patches get in two layers; .tokens
        `(M, E)` image tokens made of it, .kept `(M,)` bool."""
        return latest_pass(self.name)

    @classmethod
    def first_pruned(cls, config: HiPruneConfig) -> int:
        return 0

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        layout = needed_layout(model, cls.name)
        if layout.query_former is not None or layout.merger is not None or layout.is_tiled:
            raise NotImplementedError(
                f"HiPrune prunes images whose tokens are the patches of one picture, row by row; those of "
                f"{type(base_model(model)).__name__} are tiles, merged patches or queries."
            )
        config, inside = super().fit(config, model, sites)
        encoder = {site.layer_index: site for site in sites if site.name.startswith(f"{layout.tower}.")}
        wanted = {config.middle_layer, layout.feature_layer}
        if config.keep_ratio < 1.0 and not wanted <= encoder.keys():
            raise ValueError(
                f"HiPrune finds no attention in layers {sorted(wanted)} of {layout.tower}, which has {len(encoder)}: "
                "set middle_layer."
            )
        return config, [*inside, *(encoder[number] for number in sorted(wanted) if number in encoder)]

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        layout = image_layout(model)
        self.columns = (layout.grid or (0, 0))[1]
        places = {"middle": self.config.middle_layer, "deep": layout.feature_layer}
        if self.site.name.startswith(f"{layout.tower}."):
            self.place = " ".join(name for name, number in places.items() if self.site.layer_index == number)
            self.skips = int(layout.has_class_token)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"keep_ratio": 1.0}

    @property
    def is_identity(self) -> bool:
        return self.config.keep_ratio == 1.0

    @property
    def is_pruned(self) -> bool:
        return not self.place

    def hooks(self, model: nn.Module) -> list[Hook]:
        base = base_model(model)
        features = Hook(base.get_submodule(image_layout(base).features), "after", self.after_features)
        return [*super().hooks(model), features]

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if not self.place:
            return super().attend(call, inner)
        scores = attention_received(call.query.detach(), call.key.detach(), call.scaling, score="received")
        self.report(call, attention_received=scores[:, self.skips :])
        for name in self.place.split():
            setattr(self.seen, name, scores[:, self.skips :])
        return inner(call)

    def after_features(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        if current_run().branch:
            return
        pairs = zip(self.seen.middle, self.seen.deep, strict=True)
        kept = torch.stack([chosen(*each, self.columns, self.config.keep_ratio, self.config.alpha) for each in pairs])
        spare = output.shape[1] - kept.shape[1]  # a class token among the image tokens is no patch, and stays
        self.seen.tokens = output.detach().flatten(0, 1)
        self.seen.kept = nn.functional.pad(kept, (spare, 0), value=True).flatten()

    def keep(self, step: PruningStep) -> torch.Tensor:
        tokens, known = step.hidden[step.image], getattr(self.seen, "tokens", None)
        places = None if known is None else places_of(known.to(tokens), tokens)
        if places is None or not bool((places >= 0).all()):
            raise unknown_images()
        return torch.ones_like(step.image).masked_scatter(step.image, self.seen.kept.to(places.device)[places])


def chosen(middle: torch.Tensor, deep: torch.Tensor, columns: int, ratio: float, alpha: float) -> torch.Tensor:
    """`(N,)` bool: which tokens of a picture are kept.

    Anchors are the highest of the middle layer; then come their neighbours above, below, left and right, then the
    highest of the deep layer, until there are enough.

    Args:
        middle: `(N,)` attention that each token gets in the middle layer.
        deep: the same of the deep one.
        columns: tokens in a row of the picture.
        ratio: share of tokens that are kept.
        alpha: share of those that are anchors and neighbours.
    """
    count = len(middle)
    wanted = round(ratio * count)
    order = middle.argsort(descending=True, stable=True)
    anchors = order[: round(wanted * alpha / 5)]
    row, column = anchors // columns, anchors % columns
    near = torch.zeros_like(middle, dtype=torch.bool)
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        exists = (
            (row + down >= 0) & (row + down < count // columns) & (column + right >= 0) & (column + right < columns)
        )
        near[(anchors + down * columns + right)[exists]] = True
    is_anchor = torch.zeros_like(near)
    is_anchor[anchors] = True
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(count, device=order.device)
    last = torch.empty_like(order)
    last[deep.argsort(descending=True, stable=True)] = torch.arange(count, device=order.device)
    place = torch.where(is_anchor, ranks, torch.where(near, count + ranks, 2 * count + last))
    return torch.zeros_like(near).scatter(0, place.argsort()[:wanted], value=True)


register_variant(
    VariantInfo(
        name="hiprune",
        variant=HiPrune,
        title="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
        arxiv_id="2508.00553",
        year=2025,
        code="https://github.com/Danielement321/HiPrune",
        summary="Before the language model, image tokens are chosen by attention in the vision encoder.",
        extra_parameters="none",
        needs_training=False,
        capabilities=ALL_CAPABILITIES - {"cross", "compile", "position_bias", "without_images"},
        examples=({"keep_ratio": 0.5, "alpha": 0.6, "middle_layer": 0},),
    )
)
