"""Landmark Attention: tokens of earlier sections are read through the landmark that closes each. arXiv 2305.16300."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.selection import base_model
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.token_ids import TokenIdVariant, token_ids
from ...core.variant import ALL_CAPABILITIES, VariantInfo
from ...reading.choose import highest
from ...reading.whole import whole_sites
from ...softmax.blending import BlendConfig, BlendedVariant
from ...softmax.rows import HIDDEN

_MARKS = "landmarks"


@dataclass(frozen=True, kw_only=True)
class LandmarkConfig(BlendConfig):
    """Settings of Landmark Attention; every field is described by `patchattn info landmark`."""

    token: int | None = option(
        None,
        help="Id of the landmark token, which ends a section wherever it stands in a text. It must be given.",
        source="of the tokenizer that has the token",
        minimum=0,
    )
    top: int | None = option(
        None,
        help="Earlier sections that a row reads: per head those whose landmarks have the highest logits. None: all.",
        source="paper: all while it trains; its scripts read 5",
        unit="sections",
        minimum=1,
    )


class Landmark(TokenIdVariant, BlendedVariant):
    """Attention with the softmax in groups: over a row's own section and earlier landmarks, and inside of each section.

    A token of an earlier section has its weight inside of it, times that of its landmark; landmarks have none of their
    own. Rows of a text without landmarks have softmax's weights.
    """

    config_class = LandmarkConfig
    config: LandmarkConfig
    name = "landmark"
    splits_by_head = True

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        """Leave out what is not causal self-attention, and layers with a sliding window, which would cut sections.

        Raises:
            ValueError: no id of the landmark token, or one that the model has no embedding for.
            NotImplementedError: the model has no embedding of tokens.
        """
        if config.token is None:
            raise ValueError(
                "landmark needs token=...: the id of the landmark token, which "
                "patchattn.positions.landmarks.insert_landmarks puts into texts."
            )
        whole = whole_sites(model, sites, by="'landmark'")
        embedding: Any = base_model(model).get_input_embeddings()  # type: ignore[operator]
        if not hasattr(embedding, "weight") or embedding.weight.dim() != 2:  # patches of images
            raise NotImplementedError(
                f"landmark needs token ids, and {type(model).__name__} embeds none: it makes its input by "
                f"{type(embedding).__name__}."
            )
        if config.token >= len(embedding.weight):
            raise ValueError(
                f"token={config.token} is no id of {type(model).__name__}, which embeds {len(embedding.weight)}: add "
                "the landmark token to the tokenizer, and call model.resize_token_embeddings(len(tokenizer)), first."
            )
        return super().fit(config, model, whole)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {**super().neutral_config(), "token": 0}

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        return {_MARKS: (token_ids(call) == cast(int, self.config.token)) & call.mask.real()}  # not where it pads

    def normalised(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        return grouped_softmax(logits, visible, call.key_fact(_MARKS)[:, :, None], self.config.top)


def grouped_softmax(
    logits: torch.Tensor, visible: torch.Tensor, is_mark: torch.Tensor, top: int | None
) -> torch.Tensor:
    """Weights `(B, H, R, Tk)` of rows, each of which is of the section of the last key it sees; eq. 2 and 3.

    Args:
        logits: `(B, H, R, Tk)`.
        visible: `(B or 1, H or 1, R, Tk)` bool.
        is_mark: `(B or 1, 1, 1, Tk)` bool: which keys are landmarks; each is of the section that it ends.
        top: how many earlier sections are read; `None`: all.
    """
    section = is_mark.long().cumsum(-1) - is_mark.long()
    own = section.where(visible, -1).amax(-1, keepdim=True)
    is_text = visible & ~is_mark
    number = section.expand(logits.shape)
    is_full = _by_section(is_text.to(logits.dtype), section.expand(is_text.shape)) > 0
    reads = visible & is_mark & (section < own) & is_full  # a landmark of no token stands for nothing
    if top is not None:
        reads = highest(logits, reads, torch.zeros_like(reads), top)
    is_near = is_text & (section == own)
    is_near = is_near | (visible & ~(is_near | reads).any(-1, keepdim=True))  # landmarks at the start see themselves
    shared = logits.where(is_near | reads, HIDDEN).softmax(-1)
    given = _by_section(shared * reads, number)
    low = logits.detach().where(is_text, HIDDEN)
    largest = torch.full_like(low, HIDDEN).scatter_reduce(-1, number, low, "amax").gather(-1, number)
    raised = (logits.where(is_text, HIDDEN) - largest).exp() * is_text
    inside = raised / _by_section(raised, number).clamp(min=torch.finfo(logits.dtype).tiny)
    return torch.where(is_near, shared, inside * given)


def _by_section(of_keys: torch.Tensor, section: torch.Tensor) -> torch.Tensor:
    """As `(..., Tk)`: of every key the sum over its section."""
    return torch.zeros_like(of_keys).scatter_add(-1, section, of_keys).gather(-1, section)


register_variant(
    VariantInfo(
        name="landmark",
        variant=Landmark,
        title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
        arxiv_id="2305.16300",
        year=2023,
        code="https://github.com/epfml/landmark-attention",
        summary="Tokens of earlier sections are read through the landmark token that closes each section.",
        extra_parameters="one value per query head and layer",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "sinks"},
        presets={"paper": {"blend": None}},
        examples=({"token": 62}, {"token": 21, "blend": None, "top": 1}),
    )
)
