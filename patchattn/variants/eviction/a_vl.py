"""A-VL: image keys in tiers, and text keys by what they receive. arXiv 2409.14846."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from patchattn_kernels import column_mass

from ...cache.state import SequenceState
from ...core.call import AttentionCall
from ...core.keeping import of_query_heads
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import Attend, AttentionOutput, VariantConfig, VariantInfo
from ...reading.budgets import best
from ...reading.eviction import CAPABILITIES, EvictionVariant, refuse_padding_behind
from ...reading.quantiles import above_quantile
from ...reading.windows import grouped
from ...vision.images import needed_layout
from ...vision.marks import image_tokens
from ...vision.variant import ImageTokenVariant, language_model_sites

_IMAGE, _TEXT = 1, 2  # kinds of keys; text in front of images is 0
_KIND, _CORE, _RECEIVED = "kind", "core", "received"  # of every key
_DECIDED, _SEEN, _OTHERS, _STEPS = "kept", "counts", "others", "steps"
_CHOICES = (
    "ranks keys by what the last tokens attend to, and takes none of those back: no assisted decoding, and no cropped "
    "cache, under this variant."
)


@dataclass(frozen=True, kw_only=True)
class AVLConfig(VariantConfig):
    """Settings of A-VL; every field is described by `patchattn info a_vl`."""

    image_dropped: float = option(
        0.5,
        help="Share of a sequence's image keys that leave the cache behind the prompt.",
        source="released code",
        minimum=0.0,
        maximum=1.0,
    )
    image_hidden: float = option(
        0.5,
        help="Share of all its image keys that tokens behind the prompt do not see, but for every interval-th one: "
        "those that were dropped, and of the others those that are attended to least. At least image_dropped.",
        source="released code; its launcher 0.6, its sweep 0.7",
        minimum=0.0,
        maximum=1.0,
    )
    interval: int | None = option(
        None,
        help="Every so many tokens all image keys that are left are seen, and ranked anew. None: they always are.",
        source="released code, whose -1 is None; its sweep 3",
        minimum=1,
    )
    text_dropped: float = option(
        0.5,
        help="Share of the text keys behind an image that leave the cache, at the prompt's end and at every token.",
        source="released code; 0.4 in its sweep",
        minimum=0.0,
        maximum=1.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_hidden < self.image_dropped:
            raise ValueError(
                f"image_hidden counts the keys that image_dropped drops, and is at least that: got "
                f"{self.image_hidden} and {self.image_dropped}."
            )


class AVL(ImageTokenVariant, EvictionVariant):
    """Attention to the image keys that the last token attends to most, and to the text keys that have received most."""

    config_class = AVLConfig
    config: AVLConfig
    name = "a_vl"

    @classmethod
    def fit(
        cls, config: AVLConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[AVLConfig, Sequence[AttentionSite]]:
        inside = language_model_sites(sites, needed_layout(model, cls.name), by="A-VL")
        return super().fit(config, model, inside)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"image_dropped": 0.0, "interval": None, "text_dropped": 0.0}

    @property
    def is_identity(self) -> bool:
        config = self.config
        hides = config.interval is not None and config.image_hidden > 0.0
        return not (config.image_dropped or config.text_dropped or hides)

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        state = call.context.sequence_state(self.owner) if call.context.claim(self.owner) else None
        if state is None:
            return inner(call)
        self._note_kinds(call, state)
        kept, seen = self._seen(call, state)
        call = call.seeing(seen)
        output = inner(call)
        if self.config.text_dropped:
            self._receive(call, state)
        if call.query.shape[2] > 1:
            self._decide(call, state)
        else:
            self._go_on(call, state, kept)
        return output

    def scores(self, call: AttentionCall, state: SequenceState) -> torch.Tensor:
        """`(B, 1 or Hkv, Tk)` attention of a call's last token, mean over all heads; of image keys, which all keep."""
        row, index = call.row(call.query.shape[2] - 1), call.mask.index
        mass, _ = column_mass(row.query, row.key, row.rule())
        if index is None or index.shape[1] == 1:
            return mass.mean(dim=1, keepdim=True)
        place = index.clamp(min=0)  # text that differs between heads may stand in front of a later image
        columns = mass.new_zeros(*mass.shape[:2], call.mask.columns)
        mass = mass.where(of_query_heads(index >= 0, mass.shape[1]), 0.0)
        columns.scatter_add_(-1, of_query_heads(place, mass.shape[1]), mass)
        return columns.mean(dim=1, keepdim=True).expand(-1, place.shape[1], -1).gather(-1, place)

    def _note_kinds(self, call: AttentionCall, state: SequenceState) -> None:
        """What the keys of this call are; a single token is text, for images come in calls of several."""
        batch, _, rows, _ = call.query.shape
        counts = state.tensors.get(_SEEN)
        counts = torch.zeros(batch, 2, dtype=torch.long, device=call.key.device) if counts is None else counts
        real = call.mask.real().expand(batch, -1)
        image = image_tokens(call).to(call.key.device) & real & (rows > 1)
        behind = (counts[:, :1] > 0) | (image.cumsum(-1) > 0)
        kinds = torch.where(image, _IMAGE, torch.where(real & behind, _TEXT, 0)).to(torch.int8)[:, None]
        before = state.per_key.get(_KIND, kinds.new_zeros(batch, 1, call.mask.keys))[..., : call.mask.keys - rows]
        new = torch.stack([(kinds == kind).sum((1, 2)) for kind in (_IMAGE, _TEXT)], dim=-1)
        state.write(_KIND, torch.cat([before, kinds.expand(-1, before.shape[1], -1)], dim=-1), per_key=True)
        state.write(_SEEN, counts + new)

    def _seen(self, call: AttentionCall, state: SequenceState) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`(B, 1 or Hkv, Tk)` which keys stay by the prompt's decision, and which of them this call sees."""
        kept = state.tensors.pop(_DECIDED, None)
        if call.query.shape[2] > 1 or _STEPS not in state.tensors:
            return None, None
        kept = None if kept is None else F.pad(kept, (0, 1), value=True)
        steps = state.tensors[_STEPS] + 1  # on the CPU: no device is waited for
        state.write(_STEPS, steps)
        interval = self.config.interval
        if interval is None or int(steps[0]) % interval == 0:
            return kept, kept
        shown = (state.per_key[_KIND] != _IMAGE) | state.per_key[_CORE]
        return kept, shown if kept is None else kept & shown

    def _receive(self, call: AttentionCall, state: SequenceState) -> None:
        """Add to the text keys' sums what the text rows of this call attend to above their quantile."""
        text, rows, keys = state.per_key[_KIND] == _TEXT, call.query.shape[2], call.mask.keys
        first = 0 if rows == 1 else int((~text).cumprod(-1).sum(-1).min())  # once, at the end of a prompt
        sums = above_quantile(call, text, first=first, share=self.config.text_dropped, counts_own=rows == 1)
        received = grouped(sums, call.key.shape[1], "mean")
        before = state.per_key.get(_RECEIVED)
        received = F.pad(received, (keys - received.shape[-1], 0))
        state.write(_RECEIVED, received if before is None else before + received, per_key=True)

    def _decide(self, call: AttentionCall, state: SequenceState) -> None:
        """At what may be the end of a prompt: rank all, and note what the next token will see."""
        refuse_padding_behind(call, self.owner)
        kinds, counts = state.per_key[_KIND], state.tensors[_SEEN]
        real = call.mask.real_keys()
        kept = real & self._rank(call, state, drops=True) & self._texts(state, real)
        state.write(_DECIDED, kept)
        state.write(_STEPS, torch.zeros(len(kept), dtype=torch.long))
        others = (kept & (kinds != _TEXT)).sum(-1).amax(-1)
        state.write(_OTHERS, torch.cat([others[:, None], counts], dim=-1).cpu())
        state.settled = _CHOICES

    def _go_on(self, call: AttentionCall, state: SequenceState, kept: torch.Tensor | None) -> None:
        steps, interval = state.tensors.get(_STEPS), self.config.interval
        if steps is None:
            return
        if interval is not None and int(steps[0]) % interval == 0:
            self._rank(call, state, drops=False)
        if self.config.text_dropped or kept is not None:
            real = call.mask.real_keys()
            real = real if kept is None else real & kept
            kept = real & self._texts(state, real)
            others, images, text = state.tensors[_OTHERS].unbind(-1)
            of_text = torch.where(images > 0, self._left(text + steps), steps)
            call.context.keep(self.owner, kept, bound=int((others + of_text).max()), slack=0)

    def _rank(self, call: AttentionCall, state: SequenceState, *, drops: bool) -> torch.Tensor:
        """Choose the core; `(B, 1, Tk)` which keys stay, but for text."""
        is_image = state.per_key[_KIND] == _IMAGE
        images = state.tensors[_SEEN][:, :1, None]
        real = is_image & call.mask.real_keys()
        scores = self.scores(call, state).expand(-1, real.shape[1], -1)
        state.write(_CORE, best(scores, real, _share(images, self.config.image_hidden)), per_key=True)
        if not drops:
            return ~is_image
        return ~is_image | best(scores, real, _share(images, self.config.image_dropped))

    def _texts(self, state: SequenceState, real: torch.Tensor) -> torch.Tensor:
        """`(B, 1 or Hkv, Tk)` which of the keys that are left, likewise, stay, but for those of images."""
        is_text, received = state.per_key[_KIND] == _TEXT, state.per_key.get(_RECEIVED)
        if received is None:
            return torch.ones_like(is_text)
        counts = self._left(state.tensors[_SEEN][:, 1:, None])
        return ~is_text | best(received, is_text & real, counts, counts // 2)

    def _left(self, text: torch.Tensor) -> torch.Tensor:
        """How many of so many text keys stay; all where none is dropped."""
        share = self.config.text_dropped
        return ((1.0 - share) * text.double()).round().long().clamp(min=1) if share else text


def _share(images: torch.Tensor, dropped: float) -> torch.Tensor:
    return (images.double() * (1.0 - dropped) + 1e-6).floor().long()  # 10 * (1 - 0.9) is less than 1 in floating point


register_variant(
    VariantInfo(
        name="a_vl",
        variant=AVL,
        title="A-VL: Adaptive Attention for Large Vision-Language Models",
        arxiv_id="2409.14846",
        year=2024,
        code="https://github.com/2147483647-2/A-VL",
        summary="The kv cache keeps image keys that the prompt's end attends to, and text keys that receive most.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES - {"sinks", "without_images"},
        presets={
            "sweep": {"image_dropped": 0.5, "image_hidden": 0.7, "interval": 3, "text_dropped": 0.4},
            "readme": {"image_dropped": 0.6, "image_hidden": 0.7, "interval": 3, "text_dropped": 0.3},
        },
        examples=(
            {"image_hidden": 0.8, "interval": 3},
            {"text_dropped": 0.0},
            {"image_dropped": 0.0, "image_hidden": 0.7, "interval": 2, "text_dropped": 0.3},
        ),
    )
)
