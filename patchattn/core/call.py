"""What a variant sees: one call of attention."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import nn

from patchattn_kernels import AttentionRule

from . import parts
from .grid import Grid, grid_of
from .host import host
from .mask import Keep, Mask
from .places import Places
from .run import RUN, ModelRun, run_of
from .shards import alike, of_all_heads
from .sites import AttentionSite
from .surroundings import Surroundings


@dataclass(eq=False)
class AttentionCall:
    """One call of attention, as a variant sees it.

    Attributes:
        query: `(B, H, Tq, D)`, after rotary embedding and norm.
        key, value: `(B, Hkv, Tk, D)`, cached ones included, kv heads not repeated.
        mask: which keys each query sees, whatever the base implementation's format.
        kwargs: everything else the model passed, to be handed on: `scaling`, `dropout`, `position_ids`, `softcap`, ...
        module, site: the attention module and what is known of it.
        base: name of the base implementation.
        context: what is known around the call: the layer's input, state along the sequence, ...
        facts: what variants said of every key (`Variant.key_facts`), `(B, 1 or Hkv or H, Tk)` by name.
        innermost: whether `inner` is the base implementation itself, for the variant that sees this call.
        is_last: whether no other variant comes after that one, be there probes or not.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Mask
    kwargs: dict[str, Any]
    module: nn.Module
    site: AttentionSite
    base: str
    context: Surroundings
    facts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    innermost: bool = False
    is_last: bool = False

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
    def run(self) -> ModelRun:
        """What is known of the forward of the whole model, also where `backward` runs this call again.

        Raises:
            NotImplementedError: a branch may be run again, and the layer hands no keyword arguments on.
        """
        run = run_of(self.kwargs)
        if run.branch and RUN not in self.kwargs and self.module.training and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{self.site.module_class} ({self.site.name}) was not told which branch it runs in: its layer does not "
                "hand keyword arguments on to it. Activation checkpointing would run it again as if in none: decode "
                "under torch.no_grad(), or after model.eval()."
            )
        return run

    @property
    def branch(self) -> int:
        """Which branch of a decoding variant runs: 0 is the model itself, branches are counted from 1."""
        return self.run.branch

    @property
    def decodes(self) -> bool:
        """Whether it goes on with a text by one token per sequence, behind cached ones.

        Nothing tells such a token from a prompt's last chunk of one token, nor, in a static cache, from a prompt of
        one token: shapes, positions and cache are the same, and `generate` does not say which it is. These read as
        decoding.
        """
        return not self.site.is_cross and self.mask.queries == 1 and self.mask.columns > 1

    @property
    def stands_alone(self) -> bool:
        """Whether a variant may compute this call by an operation of `patchattn_kernels`, from `rule()`, and leave out
        `inner`.

        So it is where nothing but the base implementation comes after, which is sdpa or flash attention and is asked
        for nothing that `rule()` does not say: attention weights, dropout, or queries shared by all sequences.
        """
        asked = self.kwargs.get("output_attentions") or self.kwargs.get("dropout")
        replaceable = self.innermost and host().computes_softmax(self.base)
        return replaceable and not asked and self.query.shape[0] == self.key.shape[0]

    def replace(self, **changes: Any) -> Self:
        """A copy with other query, key, value, mask or scaling; TypeError of what a call does not have."""
        if "scaling" in changes:
            changes = {"kwargs": {**self.kwargs, "scaling": changes.pop("scaling")}, **changes}
        # spelled out, as it is asked for in every layer; not by `vars`, which torch 2.11 does not compile
        same = (self.query, self.key, self.value, self.mask, self.kwargs, self.module, self.site, self.base)
        made = type(self)(*same, self.context, self.facts, self.innermost, self.is_last)
        for name, value in changes.items():
            if name not in self.__dataclass_fields__:
                raise TypeError(f"A call of attention has no {name!r}; there is {list(self.__dataclass_fields__)}.")
            setattr(made, name, value)
        return made

    def seeing(self, keep: Keep | None) -> Self:
        """The same call, whose queries see less; see `Mask.narrowed`."""
        return self.replace(mask=self.mask.narrowed(keep))

    def at(self, places: Places) -> Self:
        """The call on some of its keys: keys, values, mask, facts and position bias together.

        No variant that remembers something of every key may come after it.

        Raises:
            ValueError: the places are those of another number of heads or sequences.
            IndexError: there is no such key or page; told on a CPU alone, for no other device is waited for.
        """
        return cast(Self, parts.of_keys(self, places))

    def row(self, i: int) -> Self:
        """The call of query i of every sequence alone: queries, mask and what is around them."""
        return cast(Self, parts.of_row(self, i))

    def query_positions(self) -> torch.Tensor:
        """`(B or 1, Tq)` where each query's token stands in its own text, the first real token at 0.

        What it was rotated by may be another position: by its column, where a padded batch comes without position ids
        (`positions.rotary.Rotary.rotated_by`).

        Raises:
            NotImplementedError: as `Mask.row_order`.
        """
        return self.mask.row_places() - 1

    def key_positions(self) -> torch.Tensor:
        """`(B or 1, 1 or Hkv, Tk)` the same of every key, also of a cache that has forgotten others.

        Of padding that of the last real token before it, -1 where there is none, of empty slots and of extra keys.

        Raises:
            NotImplementedError: as `Mask.key_order`.
        """
        return self.mask.key_places() - 1

    def grid(self) -> Grid:
        """Where the tokens of a vision tower lie on their images, for variants whose `needs_grid` is true.

        It is that of all tokens that the attention module attends over in this call, queries and keys, whatever a
        variant outside of this one leaves of them.

        Raises:
            NotImplementedError: the tower, or the base implementation, does not tell where tokens lie: patches in an
                order of their own (ViT-MAE), windows or smaller maps (Swin), frames in one call; images of several
                sizes in compiled code; compiled code before a first call with as many patches; layers that are run
                again by activation checkpointing and do not hand keyword arguments on.
        """
        return grid_of(run_of(self.kwargs).patches, self.context, self.mask)

    def key_fact(self, name: str) -> torch.Tensor:
        """`(B, 1 or Hkv or H, Tk)` what a variant said of every key when it was new (`Variant.key_facts`).

        Raises:
            ValueError: no variant says so.
        """
        if name not in self.facts:
            raise ValueError(f"No variant says {name!r} of keys; there is {sorted(self.facts)}.")
        return self.facts[name]

    def of_all_heads(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Of all query heads, or kv heads, of the module what a tensor is of those of this call, along a dimension.

        It is the tensor itself unless processes hold some heads each: these then put their parts together, and each
        process must ask for it in the same calls.
        """
        return of_all_heads(tensor, dim % tensor.dim(), self.module) if self.site.is_part else tensor

    def of_own_heads(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse of `of_all_heads`."""
        shard = self.site.shard
        if shard is None or not self.site.is_part:
            return tensor
        size = tensor.shape[dim] // shard.ranks
        return tensor.narrow(dim, shard.rank * size, size)

    def alike(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is of all heads, and is reported for losses: so that it counts once where processes share the heads."""
        return alike(tensor, self.module) if self.site.is_part else tensor

    def rule(self, heads: torch.Tensor | None = None) -> AttentionRule:
        """How weights come from query and key, in the terms of `patchattn_kernels`.

        Args:
            heads: `(h,)` the query heads that are meant; all by default.
        """
        return parts.rule_of(self, heads)
