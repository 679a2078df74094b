"""FastV: image tokens that a shallow layer attends to least go no further. arXiv 2403.06764."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.hooks import Hook
from ...core.registry import register_variant
from ...core.run import current_run
from ...core.selection import base_model
from ...core.settings import option
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantConfig, VariantInfo
from ...decoding.answering import answering_rows, note_asked
from ...decoding.text import text_generator
from ...softmax.rows import attend_rows
from ...vision.token_pruning import PruningStep, TokenPruning

_SCORES = "fastv.scores"  # shared by the layers of a forward


@dataclass(frozen=True, kw_only=True)
class FastVConfig(VariantConfig):
    """Settings of FastV; every field is described by `patchattn info fastv`."""

    layer: int = option(
        2,
        help="So many layers see all tokens; the last of them ranks image tokens (K).",
        source="paper and released code",
        minimum=1,
    )
    ratio: float = option(
        0.5,
        help="Share of the image tokens of each sequence that is dropped behind them (R); 0 changes nothing.",
        source="paper and released code: 0.5, 0.75",
        minimum=0.0,
        maximum=1.0,
    )


class FastV(TokenPruning):
    """Image tokens that the prompt's last token attends to least in layer K - 1 do not go through layers from K on.

    Reports `image_attention` `(B, T)` of that row, mean over heads.
    """

    config_class = FastVConfig
    config: FastVConfig
    name = "fastv"

    @classmethod
    def first_pruned(cls, config: FastVConfig) -> int:
        return config.layer

    @classmethod
    def first_attached(cls, config: FastVConfig) -> int:
        return config.layer - 1

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"ratio": 0.0}

    @property
    def is_identity(self) -> bool:
        return self.config.ratio == 0.0

    def hooks(self, model: nn.Module) -> list[Hook]:
        generator = base_model(model).get_submodule(text_generator(base_model(model)))
        return [*super().hooks(model), Hook(generator, "before", self.before_generator)]

    def before_generator(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not current_run().branch:
            note_asked(module, args, kwargs)

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if not self.is_pruned:
            self._rank(call)
        return super().attend(call, inner)

    def _rank(self, call: AttentionCall) -> None:
        state, begins = call.context.sequence_state(self.name), self.begins(call)
        if not begins and (state is None or "pruned" not in state.tensors):
            return
        rows = answering_rows(call, self.name)
        if not begins:
            return
        if rows is None:
            raise NotImplementedError(
                "FastV ranks image tokens by what a prompt's last token attends to: the prompt must come in one call."
            )
        last = rows[:, :1]
        query = call.query.gather(2, last[:, None, :, None].expand(-1, call.query.shape[1], -1, call.query.shape[3]))
        row = call.replace(query=query, mask=call.mask.of_rows(last))
        _, weights = attend_rows(row, lambda logits, _: logits.softmax(-1))
        scores = weights.detach().float().mean(1)[:, 0]
        self.report(call, image_attention=scores)
        call.run.shared[_SCORES] = scores
        if state is not None:
            state.write("pruned", torch.ones(len(scores), dtype=torch.bool))

    def keep(self, step: PruningStep) -> torch.Tensor:
        scores = step.run.shared[_SCORES].masked_fill(~step.image, -1.0)
        counts = [round((1.0 - self.config.ratio) * count) for count in step.image.sum(-1).tolist()]
        order = scores.argsort(dim=-1, descending=True, stable=True)
        is_kept = (
            torch.arange(scores.shape[1], device=scores.device) < torch.tensor(counts, device=scores.device)[:, None]
        )
        return torch.zeros_like(step.image).scatter(1, order, is_kept)


register_variant(
    VariantInfo(
        name="fastv",
        variant=FastV,
        title="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models",
        arxiv_id="2403.06764",
        year=2024,
        code="https://github.com/pkunlp-icler/FastV",
        summary="Image tokens that a shallow layer attends to least do not go through the layers behind it.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=ALL_CAPABILITIES
        - {"bidirectional", "cross", "compile", "sinks", "position_bias", "without_images"},
        examples=({"layer": 1},),
    )
)
