"""Variants that turn queries or keys: what they must know of the model is found when patching, and saved with it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.settings import option
from ..core.sites import AttentionSite
from ..core.variant import Variant, VariantConfig
from .looking import find_rotations
from .rotary import ROTATED_BY, Rotary, Rotation, Rotations, parse_rotations


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(VariantConfig):
    """Settings of variants that turn queries or keys."""

    by_module = ("rotary",)

    rotary: Rotations | None = option(
        None,
        parse=parse_rotations,
        help="How each attention module rotates queries and keys, by its name: found when patching, and saved.",
        source="the model's own run",
    )

    @property
    def turns(self) -> bool:
        """Whether these settings turn anything."""
        return True


class RotaryVariant(Variant):
    """A variant that turns queries or keys, by `self.rotary`, which is `None` where its settings turn nothing.

    Attributes:
        name: as it is registered.
        needs_rotation: whether layers that rotate nothing are left out.
    """

    config: RotaryConfig
    name: ClassVar[str]
    needs_rotation: ClassVar[bool] = False

    def __init__(self, config: Any, site: AttentionSite) -> None:
        super().__init__(config, site)
        self.rotary: Rotary | None = None

    def rotated_by(self, call: AttentionCall) -> dict[str, torch.Tensor]:
        """For `key_facts` of who turns queries or keys: what the tokens of a call were rotated by, `(B, Tq)`.

        Raises:
            NotImplementedError: another variant turns them too; or as `Rotary.rotated_by`.
            RuntimeError: it was not prepared.
        """
        if self.rotary is None:
            raise RuntimeError(f"{self.name} was not prepared for {self.site.name}: attach it by patch_model.")
        self.refuse_others(call)
        return {ROTATED_BY: self.rotary.rotated_by(call).expand(len(call.query), -1)}

    def refuse_others(self, call: AttentionCall) -> None:
        """NotImplementedError if another variant has said that it turns queries or keys of this call."""
        if ROTATED_BY in call.facts:
            raise NotImplementedError(
                f"{self.name!r} turns queries or keys, and in {self.site.name} another variant already turns its "
                "queries and keys to other positions: patch one of the two."
            )

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        """Find how these attention modules rotate, unless the settings say so of each."""
        config, own = super().fit(config, model, sites)
        if not config.turns:
            return replace(config, rotary=None), own
        known = config.rotary or {}
        if any(site.name not in known for site in own):
            known = find_rotations(model, own, by=cls.name)
        if cls.needs_rotation:
            own = [site for site in own if known[site.name]["share"] != "none"]
        return replace(config, rotary={site.name: known[site.name] for site in own}), own

    def prepare(self, model: nn.Module) -> None:
        """Take a copy of what rotates here."""
        super().prepare(model)
        if not self.config.turns or self.is_identity:
            return
        known = self.config.rotary or find_rotations(model, [self.site], by=self.name)
        self.rotary = Rotary(Rotation.from_dict(known[self.site.name]), model)
