"""What a variant sees: one call of attention, and what the attention module was called with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn
from transformers import Cache
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from patchattn_kernels import AttentionRule
from patchattn_kernels.rows import seen_by

from ..cache.state import SequenceState, in_slots, sequence_state
from .hooks import IMAGE_TOKENS, RESIDUAL
from .masks import is_flash, key_length, no_mask_means, of_head, packed_sequences, real_tokens, visibility, visible_keys
from .sites import AttentionSite
from .tap import CacheTap


@dataclass(eq=False)
class LayerContext:
    """What an attention module was called with; lives from its start to its end.

    Attributes:
        module: the attention module.
        layer_input: `(B, T, E)` the layer's input, queries are made of it.
        memory: `(B, S, E)` the other sequence of cross attention, or `None`.
        attention_mask: the mask as the module got it.
        arguments: all it was called with, by name.
        cache: the kv cache it writes to, or `None`.
        raw_query: the query before its norm, as the norm got it; `None` in a family without one.
        tap: stands between the module and its cache where a variant changes what is stored.
        rows_done: query rows attended so far, where a module attends in chunks.
    """

    module: nn.Module
    layer_input: torch.Tensor
    memory: torch.Tensor | None
    attention_mask: Any
    arguments: Mapping[str, Any]
    cache: Cache | None = None
    raw_query: torch.Tensor | None = None
    tap: CacheTap | None = None
    rows_done: int = 0

    def tokens(self, batch: int, rows: int, *, memory: bool = False) -> torch.Tensor:
        """`(B, T, E)` the module's input, row for row that of its queries; or the other sequence, of its keys.

        Raises:
            NotImplementedError: they do not line up.
        """
        given = self.memory if memory else self.layer_input
        aligned = given
        if aligned is not None and aligned.dim() == 2 and batch == 1:  # a packed tower, attended chunk by chunk
            aligned = aligned[None, self.rows_done : self.rows_done + rows]
        if aligned is not None and aligned.dim() == 4:  # an image's rows and columns
            aligned = aligned.flatten(1, 2)
        if aligned is None or aligned.shape[:-1] != (batch, rows):
            raise NotImplementedError(
                f"{type(self.module).__name__} attends over {rows} tokens in a batch of {batch}, but its "
                f"{'other sequence' if memory else 'input'} is {None if given is None else tuple(given.shape)}: a "
                "variant that reads it cannot tell which row is which. Leave this tower out with modules=..."
            )
        return aligned

    def real_tokens(self, *, memory: bool = False) -> torch.Tensor:
        """`(B or 1, T or 1)` bool: which tokens of the module's input, or of the other sequence, are no padding."""
        mask, device = self.attention_mask, self.layer_input.device
        if self.layer_input.dim() == 2:  # a packed tower has none
            return torch.ones(1, 1, dtype=torch.bool, device=device)
        rows = self.layer_input.shape[1:-1].numel()
        if not memory:
            keys = key_length(mask, otherwise=rows)
            return real_tokens(mask, q_length=rows, kv_length=keys, is_cross=False, device=device)
        keys = rows if self.memory is None else self.memory.shape[1:-1].numel()
        how = {"is_causal": False, "base": "eager", "window": None, "device": device}
        visible = visibility(mask, q_length=rows, kv_length=keys, **how)  # type: ignore[arg-type]
        return visible.flatten(1, -2).any(dim=1)


@dataclass(eq=False)
class AttentionCall:
    """One call of attention, as a variant sees it.

    Attributes:
        query: `(B, H, Tq, D)`, after rotary embedding and norm.
        key, value: `(B, Hkv, Tk, D)`, cached ones included, kv heads not repeated.
        attention_mask: in the format of the base implementation: `None`, bool or float `(B, H or 1, Tq, Tk)`, `(B, Tk)`
            (flash attention) or a BlockMask (flex attention). A key is hidden by a number of -5000 or less.
        kwargs: everything else the model passed, to be handed on: `scaling`, `dropout`, `position_ids`, `softcap`, ...
        module, site: the attention module and what is known of it.
        base: name of the base implementation.
        context: what the attention module was called with, for variants whose `needs_context` is true.
        innermost: whether `inner` is the base implementation itself, for the variant that sees this call.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention_mask: Any
    kwargs: dict[str, Any]
    module: nn.Module
    site: AttentionSite
    base: str
    context: LayerContext | None = None
    innermost: bool = False

    @property
    def scaling(self) -> float:
        """Factor of the logits; `1 / sqrt(D)` where the model passes none."""
        given = self.kwargs.get("scaling")
        return self.query.shape[-1] ** -0.5 if given is None else given

    @property
    def is_causal(self) -> bool:
        """Causal or not, by the rule of transformers: the call's argument, else the module's attribute."""
        given = self.kwargs.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if given is None else given)

    @property
    def stands_alone(self) -> bool:
        """Whether a variant may compute this call by an operation of `patchattn_kernels`, from `rule()`, and leave out
        `inner`.

        So it is where nothing but the base implementation comes after, which is sdpa or flash attention and is asked
        for nothing that `rule()` does not say: attention weights, dropout, or queries shared by all sequences.
        """
        asked = self.kwargs.get("output_attentions") or self.kwargs.get("dropout")
        function = ALL_ATTENTION_FUNCTIONS.get(self.base)  # one of the user's own may compute something else
        softmax = function in (sdpa_attention_forward, flash_attention_forward)
        replaceable = self.innermost and (softmax or (function is None and is_flash(self.base)))
        return replaceable and not asked and self.query.shape[0] == self.key.shape[0]

    def replace(self, **changes: Any) -> Self:
        """A copy with other query, key, value, attention_mask or scaling."""
        kwargs = self.kwargs
        if "scaling" in changes:
            kwargs = {**kwargs, "scaling": changes.pop("scaling")}
        return replace(self, **{"kwargs": kwargs, **changes})

    def visible_keys(self) -> torch.Tensor:
        """`(B or 1, Tq)` number of keys each query sees: padding, windows, packing and unfilled cache excluded.

        `(B or 1, Tq, H)` where the mask differs between heads; NotImplementedError where there is none and nothing says
        what the base implementation then does.
        """
        return visible_keys(self.attention_mask, **self._mask_arguments())

    def visibility(self) -> torch.Tensor:
        """`(B or 1, Tq, Tk)` bool: which keys each query sees. For statistics: as large as one head's attention.

        `(B or 1, H, Tq, Tk)` where the mask differs between heads.
        """
        return visibility(self.attention_mask, **self._mask_arguments())

    def _mask_arguments(self) -> dict[str, Any]:
        batch, _, rows, _ = self.query.shape
        return {
            "sequence": packed_sequences(self.attention_mask, self.base, self.kwargs, batch, rows),
            "q_length": rows,
            "kv_length": self.key.shape[2],
            "is_causal": self.is_causal and not self.site.is_cross,
            "base": self.base,
            "window": self.kwargs.get("sliding_window"),
            "device": self.query.device,
        }

    def probabilities(self, head: int, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of one query head, computed anew whatever the base implementation, in float32 at least.

        For statistics; dropout is left out, and sinks are counted: a row then sums to less than 1.

        Args:
            head: query head.
            visible: `visibility()`, where it is at hand.

        Returns:
            `(B, Tq, Tk)`. Rows that see no key are zero.
        """
        visible = of_head(self.visibility() if visible is None else visible, head)
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        group = head * self.key.shape[1] // self.query.shape[1]
        logits = self.query[:, head].to(dtype) @ self.key[:, group].to(dtype).mT * self.scaling
        cap, sinks = self.kwargs.get("softcap"), self.kwargs.get("s_aux")
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        for bias in (self.kwargs.get("position_bias"), self.attention_mask):
            if isinstance(bias, torch.Tensor) and bias.dim() == 4 and bias.is_floating_point():
                logits = logits + bias[:, min(head, bias.shape[1] - 1), :, : logits.shape[-1]]
        logits = logits.masked_fill(~visible, torch.finfo(dtype).min)
        if sinks is not None:
            logits = torch.cat([logits, sinks[head].to(dtype).expand(*logits.shape[:-1], 1)], dim=-1)
        return logits.softmax(dim=-1)[..., : visible.shape[-1]] * visible

    def real_tokens(self) -> torch.Tensor:
        """`(B or 1, Tq)` bool: which query tokens are text rather than padding; see `core.masks.real_tokens`."""
        return real_tokens(
            self.attention_mask,
            q_length=self.query.shape[2],
            kv_length=self.key.shape[2],
            is_cross=self.site.is_cross,
            device=self.query.device,
            own=self.own_key(),
        )

    def own_key(self) -> int | torch.Tensor | None:
        """Index of the first query's own key in a kv cache, where its layer is known."""
        layer = None if self.context is None or self.context.tap is None else self.context.tap.layer
        if layer is None or self.site.is_cross:
            return None
        rows: int = self.query.shape[2]
        if not in_slots(layer):
            return self.key.shape[2] - rows
        seen: int | torch.Tensor = layer.get_seq_length()
        return seen - rows

    def rule(self, heads: torch.Tensor | None = None) -> AttentionRule:
        """How weights come from query and key, in the terms of `patchattn_kernels`.

        Args:
            heads: `(h,)` the query heads that are meant; all by default.
        """

        def of_heads(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if heads is None or tensor.shape[1] == 1 else tensor[:, heads]

        mask, rows, keys = self.attention_mask, self.query.shape[2], self.key.shape[2]
        arguments = self._mask_arguments()
        causal, base = arguments["is_causal"], arguments["base"]
        structure: dict[str, Any] = {"offset": self._offset()}
        if isinstance(mask, torch.Tensor) and mask.dim() == 4:
            mask = of_heads(mask[..., :keys].expand(-1, -1, rows, -1))
        elif isinstance(mask, torch.Tensor) and mask.dim() == 2:
            mask = mask[:, -keys:]
            structure = {"causal": causal, "window": arguments["window"]}
        elif mask is None:
            meaning = no_mask_means(base, is_causal=causal, q_length=rows)
            if meaning == "flash":
                sequence = arguments["sequence"] if rows == keys else None
                structure = {"causal": causal, "window": arguments["window"], "sequence": sequence}
            elif meaning == "causal":  # aligned to the first key, which matters where a static cache is empty
                structure = {"causal": True, "offset": 0}
        else:  # a BlockMask
            visible = self.visibility()
            mask = of_heads(visible if visible.dim() == 4 else visible[:, None])
        bias, sinks = self.kwargs.get("position_bias"), self.kwargs.get("s_aux")
        return AttentionRule(
            scaling=self.scaling,
            softcap=self.kwargs.get("softcap"),
            bias=None if bias is None else of_heads(bias[..., :keys].expand(-1, -1, rows, -1)),
            sinks=sinks if sinks is None or heads is None else sinks[heads],
            mask=mask,
            **structure,
        )

    def _offset(self) -> int | None:
        """Own key of the first query where it is not Tk - Tq: a static cache has slots that are not filled yet.

        For a single row the last key will do, as no real one comes between. Without a tap on the cache it is told by a
        causal mask, of which the last row ends at its own key.
        """
        rows, keys, mask = self.query.shape[2], self.key.shape[2], self.attention_mask
        if rows == 1 or rows == keys or self.site.is_cross or torch.compiler.is_compiling():
            return None
        own = self.own_key()
        if own is not None:
            return int(own)
        if not self.is_causal or not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            return None
        seen = seen_by(mask[:, :, -1, :keys]).flatten(0, 1).any(dim=0).nonzero()
        return int(seen[-1]) + 1 - rows if len(seen) else None

    def layer_input(self) -> torch.Tensor:
        """`(B, Tq, E)` the layer's input, row for row that of the queries; NotImplementedError if it is not."""
        return self._context().tokens(self.query.shape[0], self.query.shape[2])

    def residual(self) -> torch.Tensor:
        """`(B, Tq, E)` what entered the layer, before its norm, without its gradient.

        For variants that hook their layer (`hooks.with_residual`); NotImplementedError if it did not arrive.
        """
        return self._handed_on(RESIDUAL, "what entered its layer")

    def image_tokens(self) -> torch.Tensor:
        """`(B, Tq)` bool: which tokens of this call are image tokens.

        For variants that hook their language model (`hooks.with_image_tokens`); NotImplementedError if it did not
        arrive.
        """
        return self._handed_on(IMAGE_TOKENS, "which of its tokens are image tokens")

    def _handed_on(self, keyword: str, meaning: str) -> torch.Tensor:
        given, shape = self.kwargs.get(keyword), (self.query.shape[0], self.query.shape[2])
        if not isinstance(given, torch.Tensor) or given.shape[:2] != shape:
            raise NotImplementedError(
                f"{self.site.module_class} ({self.site.name}) was not told {meaning}, for {shape[1]} tokens in a batch "
                f"of {shape[0]}: its layer does not hand keyword arguments on to it. Leave it out with modules=..."
            )
        return given.to(self.query.device)

    def raw_query(self) -> torch.Tensor:
        """`(B, H, Tq, D)` the query before its norm, where the family has one; the call's own query otherwise."""
        if self.site.query_norm is None:
            return self.query
        raw = self._context().raw_query
        batch, heads, rows, _ = self.query.shape
        if raw is None or raw.numel() != self.query.numel():
            raise NotImplementedError(
                f"{self.site.module_class} ({self.site.name}) has a query norm ({self.site.query_norm}) whose input "
                "does not line up with its queries; this variant needs the query before that norm."
            )
        if raw.dim() == 4 and raw.shape[1:3] == (heads, rows) and (heads != rows or raw.stride(1) < raw.stride(2)):
            return raw
        return raw.reshape(batch, rows, heads, -1).transpose(1, 2)

    def sequence_state(self, owner: str, *, rewinds: bool = True) -> SequenceState | None:
        """What a variant remembers of these sequences, its `per_key` aligned with the keys of this call, new ones zero.

        It lives with the layer of the kv cache; `None` without a cache, or if the first call on it is compiled. For
        variants whose `keeps_state` is true, once in a call.

        Args:
            owner: name of the variant.
            rewinds: whether it stays right when the last tokens are taken out of the cache again; `crop` is refused
                otherwise.

        Raises:
            ValueError: the cache was filled without this variant.
            NotImplementedError: the keys are in none of the cache's layers.
        """
        context = self._context()
        if context.cache is None or context.tap is None:
            return None
        layer, added = context.tap.layer, context.tap.added
        if layer is None:  # put there by an earlier call (cross attention), or by a layer that shares its keys
            layer, added = context.tap.holder(self.key), 0 if self.site.is_cross else self.query.shape[2]
        if layer is None:
            raise NotImplementedError(
                f"{self.site.module_class} ({self.site.name}) takes its keys from no layer of its cache; a variant "
                "that keeps state along the sequence cannot follow them. Leave it out with modules=... or layers=..."
            )
        state = sequence_state(layer, f"{owner} in {self.site.name}", rows=added, rewinds=rewinds)
        if state is not None:
            state.align(layer, keys=self.key.shape[2], rows=added)
        return state

    def _context(self) -> LayerContext:
        if self.context is None:
            raise RuntimeError(
                f"No layer context in {self.site.name}: the variant must say needs_context, and the module must be "
                "called as a module, so that its hooks run."
            )
        return self.context


@dataclass(eq=False)
class Observation:
    """What a variant reports while it runs; see `patchattn.observe`.

    Attributes:
        site: the attention module, as plain data.
        values: tensors by name, such as `gate` `(B, Tq, H)` of MoH. Padded rows are included.
        source: the call they belong to; or, for what is said of keys and values on their way into the cache, the
            context of the module.
    """

    site: AttentionSite
    values: dict[str, torch.Tensor]
    source: AttentionCall | LayerContext

    @property
    def module(self) -> nn.Module:
        """The attention module."""
        return self.source.module

    def real_tokens(self) -> torch.Tensor:
        """`(B or 1, T or 1)` bool: which rows of the values are text rather than padding."""
        if isinstance(self.source, LayerContext):  # said of keys and values, which cross attention makes of the memory
            return self.source.real_tokens(memory=self.site.is_cross)
        return self.source.real_tokens()
