"""DAMRO: contrast with what the language model says of the vision encoder's outlier tokens alone. arXiv 2410.04514."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.hooks import Hook
from ...core.registry import register_variant
from ...core.selection import base_model
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantConfig, VariantInfo
from ...decoding.variant import BranchStep, DecodingVariant, Step, only_plausible
from ...vision.images import image_layout
from ...vision.latest import forget_pass, latest_pass
from ...vision.outliers import Picture, attention_received, highest, kept_positions, reordered, unknown_images

# Per model type: k, and alpha of the two tasks of the paper. Qwen2.5-VL's are those of LLaVA, ours.
_DEFAULTS = {"instructblip": (4, {"pope": 0.5, "chair": 1.5})}
_LLAVA_DEFAULTS = (10, {"pope": 2.0, "chair": 0.5})


@dataclass(frozen=True, kw_only=True)
class DAMROConfig(VariantConfig):
    """Settings of DAMRO; every field is described by `patchattn info damro`."""

    alpha: float | None = option(
        None,
        help="Strength of the contrast: (1 + alpha) logits - alpha negative logits. None: from the paper, by "
        "model and task.",
        source="paper and released code: LLaVA 2 and 0.5, InstructBLIP 0.5 and 1.5 (pope, chair)",
        minimum=0.0,
        maximum=1000.0,
    )
    beta: float = option(
        0.1,
        help="Only tokens at least beta times as probable as the most probable one can be chosen; 0 allows all.",
        source="released code",
        minimum=0.0,
        maximum=1.0,
    )
    top_k: int | None = option(
        None,
        help="Number of outlier tokens that the negative branch sees. None: the paper's, by model.",
        source="paper and released code: LLaVA 10, InstructBLIP 4",
        unit="tokens",
        minimum=1,
    )
    task: Literal["pope", "chair"] = option(
        "pope", help="Which of the paper's two alphas to take where alpha is None.", source="ours"
    )
    score: Literal["cls", "received"] = option(
        "cls",
        help="What makes a patch an outlier. cls: the attention that the class token pays to it. received: the mean "
        "attention that all patches pay to it, for encoders without a class token.",
        source="paper (cls); received is our extension",
    )
    attention: Literal["heads", "one_wide_head"] = option(
        "heads",
        help="How the vision encoder's attention is taken. heads: its own, mean over heads. one_wide_head: logits "
        "summed over heads and scaled by the whole width before one softmax.",
        source="released code for InstructBLIP (heads), for LLaVA (one_wide_head)",
    )
    vision_layer: int | None = option(
        None,
        help="Layer of the vision encoder to take attention from, negative ones counted from the last. None: the one "
        "whose output the image tokens are made of; of InstructBLIP the last but one.",
        source="released code",
    )


class DAMRO(DecodingVariant):
    """Contrastive decoding against the same text with only the k most attended image tokens."""

    config_class = DAMROConfig
    config: DAMROConfig
    name = "damro"

    @property
    def seen(self) -> SimpleNamespace:
        """Of the vision encoder: .is_open, .scores, .states, .merged, .pictures, .queries, .replaced."""
        return latest_pass(self.name)

    @classmethod
    def fit(
        cls, config: DAMROConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[DAMROConfig, Sequence[AttentionSite]]:
        layout = image_layout(model)
        if config.score == "cls" and not layout.has_class_token:
            raise NotImplementedError(
                f"The vision encoder of {type(base_model(model)).__name__} has no class token (CLS), whose attention "
                'DAMRO chooses by. score="received", our extension, does without one.'
            )
        encoder = {s.layer_index: s for s in sites if s.name.startswith(f"{layout.tower}.")}
        count = max(encoder, default=-1) + 1
        layer = config.vision_layer
        if layer is None:
            layer = layout.feature_layer - (layout.query_former is not None)
        index = layer + count if layer < 0 else layer
        if index not in encoder:
            raise ValueError(
                f"DAMRO finds no attention in layer {layer} of {layout.tower}, which has {count} layers that call "
                "transformers' attention interface."
            )
        return config, [encoder[index]]

    def prepare(self, model: nn.Module) -> None:
        layout = self.layout = image_layout(model)
        self.generator = layout.generator
        super().prepare(model)
        config: Any = model.config
        windows = getattr(config.vision_config, "fullatt_block_indexes", None)
        if windows is not None and self.site.layer_index not in windows:
            raise NotImplementedError(
                f"Layer {self.site.layer_index} of {layout.tower} attends within windows only; set vision_layer to one "
                f"of {list(windows)}."
            )
        top_k, alphas = _DEFAULTS.get(config.model_type, _LLAVA_DEFAULTS)
        self.top_k = top_k if self.config.top_k is None else self.config.top_k
        self.alpha = alphas[self.config.task] if self.config.alpha is None else self.config.alpha

    def hooks(self, model: nn.Module) -> list[Hook]:
        layout = self.layout
        found = [
            Hook(model.get_submodule(layout.tower), "before", self.before_tower),
            Hook(model.get_submodule(layout.tower), "finally", self.leave_tower),
            Hook(model.get_submodule(layout.features), "after", self.after_features),
        ]
        if layout.merger is not None:
            found.append(Hook(model.get_submodule(layout.merger), "after", self.after_merger))
        if layout.query_former is not None:
            found.append(Hook(model.get_submodule(layout.query_former), "after", self.after_query_former))
        if layout.merger is None and layout.query_former is None:
            found.append(Hook(model.get_submodule(layout.tower), "after", self.after_tower))
        return [*super().hooks(model), *found]

    @property
    def is_identity(self) -> bool:
        return self.config.alpha == 0.0 and self.config.beta == 0.0

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"alpha": 0.0, "beta": 0.0}

    def combine(self, logits: torch.Tensor, branch_logits: list[torch.Tensor]) -> torch.Tensor:
        alpha = self.alpha
        return only_plausible((1.0 + alpha) * logits - alpha * branch_logits[0], logits, self.config.beta)

    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.is_active and output is None:  # pictures may be passed on to later forwards, of one that succeeded
            forget_pass(self.name)
        super().after_model(module, args, kwargs, output)

    # The vision encoder: which tokens are outliers.

    def before_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forget_pass(self.name)
        self.seen.scores, self.seen.is_open = [], True

    def leave_tower(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.seen.is_open = False

    def after_tower(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        states = getattr(output, "hidden_states", None)
        self.seen.states = None if states is None else states[self.layout.feature_layer + 1]

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if not getattr(self.seen, "is_open", False):  # run again by activation checkpointing
            return inner(call)
        lengths = call.kwargs.get("cu_seq_lens_q")  # flash attention gets packed pictures as one row
        sizes = [call.query.shape[2]] if lengths is None else lengths.diff().tolist()
        for query, key in zip(call.query.split(sizes, 2), call.key.split(sizes, 2), strict=True):
            scores = attention_received(
                query.detach(),
                key.detach(),
                call.scaling,
                score=self.config.score,
                one_wide_head=self.config.attention == "one_wide_head",
            )
            self.report(call, outlier_score=scores)
            self.seen.scores += scores.unbind(0)
        return inner(call)

    def _patch_scores(self) -> list[torch.Tensor]:
        """Scores of each picture's tokens, the class token, if any, at -1: it is none of the patches."""
        scores = [row.clone() for row in self.seen.scores]
        for row in scores if self.layout.has_class_token else ():
            row[0] = -1.0
        return scores

    def after_merger(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        self.seen.merged = output.detach()

    def after_features(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self.is_active:
            return
        layout, scores = self.layout, self._patch_scores()
        if layout.query_former is not None:
            self.seen.pictures = [Picture(tokens, tokens) for tokens in output.detach()]
            self.seen.replaced = module.forward(self.seen.queries)
        elif layout.merger is not None:
            scores = [row.view(-1, layout.merge**2).mean(-1) for row in scores]
            sizes = [len(row) for row in scores]
            tokens = output.pooler_output.detach().split(sizes), self.seen.merged.split(sizes)
            self.seen.pictures = [
                Picture(own, highest(reordered(row, merged, own), self.top_k))
                for row, own, merged in zip(scores, *tokens, strict=True)
            ]
        else:
            self._check_layer(args[0])
            self.seen.pictures = [  # a call may ask for the encoder's first token to be kept or left out
                Picture(tokens, highest(row[len(row) - len(tokens) :], self.top_k))
                for tokens, row in zip(output.detach(), scores, strict=True)
            ]

    def _check_layer(self, states: torch.Tensor) -> None:
        """Refuse image tokens made of other hidden states `(B, P, C)` than scores are taken for."""
        known = self.seen.states  # none where the call asks the encoder for another layer
        made_here = known is not None and torch.equal(known[:, known.shape[1] - states.shape[1] :], states)
        if self.config.vision_layer is None and not made_here:
            raise NotImplementedError(
                f"DAMRO takes its scores from the layer of {self.layout.tower} that the model's configuration names, "
                "which is not the one that this call's image tokens are made of: set vision_feature_layer there before "
                "patching, or give vision_layer."
            )

    def after_query_former(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """The queries of InstructBLIP once more, with the outliers as all there is to see."""
        states, queries = kwargs["encoder_hidden_states"], kwargs["query_embeds"]
        chosen = torch.stack([highest(row, self.top_k) for row in self._patch_scores()]).to(states.device)
        states = states.gather(1, chosen[..., None].expand(-1, -1, states.shape[-1]))
        mask = torch.ones(states.shape[:-1], dtype=torch.long, device=states.device)
        again = module.forward(*args, **{**kwargs, "encoder_hidden_states": states, "encoder_attention_mask": mask})
        self.seen.queries = again[0][:, : queries.shape[1]]

    # The language model: the same text with the outliers alone.

    def branches(self, step: Step) -> list[BranchStep]:
        image = step.where(self.layout.image_token_id)
        video = self.layout.video_token_id
        if video is not None and bool(step.where(video).any()):
            raise NotImplementedError("DAMRO does not support videos.")
        if step.is_first and not bool(image.any(dim=-1).all()):
            row = int((~image.any(dim=-1)).nonzero()[0])
            raise ValueError(
                f"DAMRO contrasts what is said of an image: there is no image in row {row} of the input. Unpatch the "
                "model, or use `with patchattn.unpatched(model):`, for text alone; a prompt must come in one piece."
            )
        positions = torch.arange(image.shape[1], device=image.device)
        source = positions.expand(image.shape).masked_fill(image, -1)
        if not bool(image.any()):
            return [BranchStep(step.embeddings, step.real, source, image)]
        if self.layout.query_former is not None:
            return [BranchStep(self._with_replaced(step.embeddings, image), step.real, source, image)]
        pictures, is_tiled = getattr(self.seen, "pictures", []), self.layout.is_tiled
        kept = [
            kept_positions(row, where, pictures, is_tiled=is_tiled)
            for row, where in zip(step.embeddings, image, strict=True)
        ]
        length = max(map(len, kept))
        index = torch.stack([nn.functional.pad(row, (length - len(row), 0), value=-1) for row in kept])
        embeddings = step.embeddings.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, step.embeddings.shape[-1]))
        real = step.real.gather(1, index.clamp(min=0)) & (index >= 0)
        for row, where in enumerate(kept):
            source[row, where] = torch.arange(length - len(where), length, device=source.device)
        outliers = image.gather(1, index.clamp(min=0)) & (index >= 0)
        return [BranchStep(embeddings, real, source.masked_fill(image, -1), outliers)]

    def _with_replaced(self, embeddings: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Image tokens replaced one by one by those that the query former made of the outliers."""
        pictures: list[Picture] = getattr(self.seen, "pictures", [])
        count = int(image.sum()) // max(sum(len(picture.tokens) for picture in pictures), 1)
        tokens = [picture.tokens for picture in pictures for _ in range(count)]
        if not tokens or not torch.equal(torch.cat(tokens).to(embeddings), embeddings[image]):
            raise unknown_images()
        replaced = self.seen.replaced.repeat_interleave(count, dim=0).flatten(0, 1)
        return embeddings.masked_scatter(image[..., None], replaced.to(embeddings))


register_variant(
    VariantInfo(
        name="damro",
        variant=DAMRO,
        title="DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination",
        arxiv_id="2410.04514",
        year=2024,
        code="https://github.com/coder-gx/DAMRO",
        summary="Next-token logits are contrasted with those given the vision encoder's outlier tokens alone.",
        extra_parameters="none",
        needs_training=False,
        capabilities=ALL_CAPABILITIES - {"static_cache", "compile", "without_images"},
        presets={"pope": {"task": "pope"}, "chair": {"task": "chair"}},
        examples=(
            {"top_k": 2},
            {"top_k": 3, "alpha": 1.0, "beta": 0.0, "attention": "one_wide_head", "score": "received"},
        ),
    )
)
