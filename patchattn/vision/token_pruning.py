"""Token pruning: from a layer of the language model on, only some tokens go through, each at its own position.

What is left of a prompt is cut out of the hidden states and of all that layers are given beside them; what was dropped
comes back behind the last layer as it was, so that logits keep their shape. A kv cache's later layers hold fewer keys,
and know of which tokens these are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from ..core.call import AttentionCall
from ..core.hooks import Hook
from ..core.kv_caches import find_cache
from ..core.layer_outputs import enclosing_block, hidden_of, with_hidden
from ..core.ranks import NOTHING_TOLD
from ..core.run import RUN, ModelRun, forget_told, note_told, run_of
from ..core.selection import base_model
from ..core.sites import AttentionSite
from ..core.variant import Attend, AttentionOutput
from .images import needed_layout
from .marks import IMAGE_TOKENS
from .variant import ImageTokenVariant

_LEFT, _BEGINS = "pruning.left", "pruning.begins"  # shared by the layers of a forward


@dataclass(eq=False)
class TokensLeft:
    """What goes through later layers.

    Attributes:
        index: `(B, T')` which tokens, ascending; -1 of empty slots, which come first where rows keep other numbers.
        whole: `(B, T, E)` hidden states of all tokens where some were dropped.
        is_even: whether there is no empty slot.
    """

    index: torch.Tensor
    whole: torch.Tensor
    is_even: bool


@dataclass(eq=False)
class PruningStep:
    """A prompt on its way through the layers.

    Attributes:
        hidden: `(B, T, E)` what enters the layer from which on tokens are dropped.
        image: `(B, T)` bool: which are image tokens.
        run: of this forward; its `shared` is what earlier layers of it have told.
    """

    hidden: torch.Tensor
    image: torch.Tensor
    run: ModelRun


class TokenPruning(ImageTokenVariant):
    """A variant that drops tokens from one layer of the language model on, in the call that begins a text with images.

    A subclass gives `keep`, and `first_pruned`. It attaches itself to the language model's attention from there on.
    """

    name = ""  # in the registry

    @classmethod
    def first_pruned(cls, config: Any) -> int:
        """The first layer, counted from 0, that some tokens do not go through."""
        raise NotImplementedError(f"{cls.__name__} must define first_pruned(config).")

    @classmethod
    def first_attached(cls, config: Any) -> int:
        """The first layer that it attaches itself to, which may be an earlier one."""
        return cls.first_pruned(config)

    def keep(self, step: PruningStep) -> torch.Tensor:
        """`(B, T)` bool: which tokens go on; all that are no image tokens must."""
        raise NotImplementedError(f"{type(self).__name__} must define keep(step).")

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        layout, first = needed_layout(model, cls.name), cls.first_pruned(config)
        prefix = f"{layout.language_model}."
        inside = [site for site in sites if site.name.startswith(prefix)]
        if not inside or len(inside) != inside[0].layer_count:
            raise ValueError(
                f"{cls.__name__} drops tokens from a layer of {layout.language_model} on, and must be attached to the "
                "attention of all of its layers: leave out layers= and modules=."
            )
        if first >= inside[0].layer_count:
            raise ValueError(
                f"{cls.__name__} drops tokens from layer {first} on, and {layout.language_model} has "
                f"{inside[0].layer_count}."
            )
        return config, [site for site in inside if site.layer_index >= cls.first_attached(config)]

    @property
    def keeps_state(self) -> bool:
        return True

    @property
    def is_pruned(self) -> bool:
        """Whether some tokens do not go through this layer."""
        return self.site.layer_index >= self.first_pruned(self.config)

    def hooks(self, model: nn.Module) -> list[Hook]:
        base, found = base_model(model), super().hooks(model)
        if self.is_pruned:
            block = base.get_submodule(enclosing_block(base, self.site.name))
            found += [
                Hook(block, "before", self.before_layer),
                Hook(block, "after", self.after_layer),
                Hook(block, "finally", self.leave_layer),
            ]
        return found

    def before_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = super().before_language_model(module, args, kwargs)
        run, cache = kwargs[RUN], find_cache([*args, *kwargs.values()])
        begins = cache is None or int(cache.get_seq_length()) == 0
        has_images = bool(run.facts[IMAGE_TOKENS].any())
        if has_images and not begins:
            raise NotImplementedError(
                f"{type(self).__name__} drops tokens of images that come in the call that begins a text; here images "
                "came behind cached tokens. Give them with the start of the text, and start with a new cache."
            )
        return args, {**kwargs, RUN: replace(run, shared={_BEGINS: begins and has_images})}

    def begins(self, call: AttentionCall) -> bool:
        """Whether a call begins a text with images."""
        return bool(call.run.shared.get(_BEGINS))

    def before_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = run_of(kwargs)
        is_first = self.site.layer_index == self.first_pruned(self.config)
        if is_first and run.shared.get(_BEGINS) and _LEFT not in run.shared:
            hidden = args[0] if args else kwargs["hidden_states"]
            image = run.facts[IMAGE_TOKENS].to(hidden.device)
            kept = self.keep(PruningStep(hidden, image, run)).to(hidden.device) | ~image
            run.shared[_LEFT] = None if bool(kept.all()) else _left(kept, hidden)
        left: TokensLeft | None = run.shared.get(_LEFT)
        if left is None:
            return None
        note_told(NOTHING_TOLD)  # what the model was told is of all tokens
        cut = _Cut(left, type(self).__name__)
        facts = {IMAGE_TOKENS: cut.tokens(run.facts[IMAGE_TOKENS], 1)}
        has_mask = any(isinstance(each, torch.Tensor) and each.dim() == 4 for each in kwargs.values())
        if not left.is_even and not has_mask:
            raise NotImplementedError(
                f"{type(self).__name__} leaves other numbers of tokens in different rows here, and the model has made "
                "no mask that could hide the rest: load it with attn_implementation='eager', or give rows one by one."
            )
        changed = {name: cut.value(value) for name, value in kwargs.items() if name != RUN}
        return tuple(map(cut.value, args)), {**changed, RUN: run.handed_down(facts)}

    def after_layer(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        left: TokensLeft | None = run_of(kwargs).shared.get(_LEFT)
        if left is None or self.site.layer_index != self.site.layer_count - 1:
            return None
        hidden, size = hidden_of(output), left.whole.shape[1]
        place = left.index.masked_fill(left.index < 0, size)[..., None].expand_as(hidden)
        return with_hidden(output, F.pad(left.whole, (0, 0, 0, 1)).scatter(1, place, hidden)[:, :size])

    def leave_layer(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if run_of(kwargs).shared.get(_LEFT) is not None:
            forget_told()

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        output = inner(call)
        left: TokensLeft | None = call.run.shared.get(_LEFT) if self.is_pruned else None
        if left is not None:
            call.context.hold_columns(self.name, left.index, left.whole.shape[1])
        return output


def _left(kept: torch.Tensor, hidden: torch.Tensor) -> TokensLeft:
    counts = kept.sum(-1)
    length, is_even = int(counts.max()), bool((counts == counts[0]).all())
    index = kept.long().argsort(dim=-1, stable=True)[:, kept.shape[1] - length :]
    return TokensLeft(index.masked_fill(~kept.gather(1, index), -1), hidden, is_even)


@dataclass(frozen=True, eq=False)
class _Cut:
    """Cuts what a layer is called with."""

    left: TokensLeft
    owner: str

    def value(self, value: Any) -> Any:
        """What a layer is given by name or place: hidden states, a mask, positions, tables of angles."""
        if isinstance(value, BlockMask):
            raise NotImplementedError(f"{self.owner} cannot cut the block masks of flex attention: use another one.")
        size = self.left.whole.shape[1]
        if isinstance(value, tuple):
            return tuple(self.table(each) for each in value)
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or size not in value.shape:
            return value
        if value.dim() == 4 and value.shape[-2:] == (size, size):
            return self.mask(value)
        if value.dim() == 3 and value.is_floating_point():
            return self.tokens(value, 1)
        if value.dim() in (2, 3) and value.shape[-1] == size:
            cut = self.tokens(value, value.dim() - 1)
            return cut.masked_fill(self.left.index < 0, 0) if value.dim() == 2 else cut
        return value

    def table(self, value: Any) -> Any:
        """Angles `(..., B or 1, T, D)`."""
        is_table = isinstance(value, torch.Tensor) and value.dim() > 2
        return (
            self.tokens(value, value.dim() - 2) if is_table and value.shape[-2] == self.left.whole.shape[1] else value
        )

    def tokens(self, value: torch.Tensor, dim: int) -> torch.Tensor:
        """Of a tensor `(..., B or 1, T, ...)`, whose dimension of tokens is given, those that are left."""
        index = self.left.index.clamp(min=0).to(value.device)
        shape = [1] * (dim - 1) + [*index.shape] + [1] * (value.dim() - dim - 1)
        sizes = [*value.shape]
        sizes[dim - 1], sizes[dim] = index.shape
        whole = [*value.shape]
        whole[dim - 1] = len(index)
        return value.expand(whole).gather(dim, index.view(shape).expand(sizes))

    def mask(self, mask: torch.Tensor) -> torch.Tensor:
        """`(B, H or 1, T', T')` of `(B or 1, H or 1, T, T)`."""
        index = self.left.index.clamp(min=0).to(mask.device)
        batch, length = index.shape
        rows = mask.expand(batch, -1, -1, -1).gather(
            2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
        )
        found = rows.gather(3, index[:, None, None].expand(-1, mask.shape[1], length, -1))
        if self.left.is_even:
            return found
        empty = (self.left.index < 0).to(mask.device)[:, None, None]
        return found.masked_fill(empty, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
