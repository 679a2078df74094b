"""How many keys a kv cache may keep of a sequence, and which of some keys with scores those are."""

import math
from dataclasses import dataclass

import torch

from ..core.call import AttentionCall
from ..core.settings import option
from ..core.sites import AttentionSite
from ..core.variant import VariantConfig


@dataclass(frozen=True, kw_only=True)
class BudgetConfig(VariantConfig):
    """How many keys are kept: `budget`, or `compression_ratio`."""

    budget: int | tuple[int | list[int], ...] | None = option(
        None,
        help="Real keys kept of a sequence in each kv head: one number, one per layer, or per layer a list of one per "
        "kv head. None: the paper's number, unless compression_ratio is given.",
        source="the papers",
        unit="keys",
        minimum=1,
    )
    compression_ratio: float | None = option(
        None,
        help="Share of the real keys seen so far that is dropped, in place of budget; kvpress's name. What is kept is "
        "rounded down, and must be one key at least.",
        source="ours",
        minimum=0.0,
        maximum=1.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.compression_ratio is not None:
            raise ValueError(
                f"Give budget (keys that are kept) or compression_ratio (share that is dropped), not both: got "
                f"{self.budget} and {self.compression_ratio}."
            )
        if self.compression_ratio == 1.0:
            raise ValueError("compression_ratio must be less than 1: at 1 no key is left.")
        layers = self.budget if isinstance(self.budget, tuple) else ()
        if self.budget == () or any(not each or min(each) < 1 for each in layers if isinstance(each, list)):
            raise ValueError(f"budget must be at least 1 in every layer and kv head, got {self.budget}.")


class Budget:
    """How many keys are kept of the sequences of one attention module.

    Args:
        config: the settings.
        default: number of keys where they give none.
        site: the attention module.

    Raises:
        ValueError: budgets are given for other numbers of layers or kv heads.
    """

    def __init__(self, config: BudgetConfig, default: int, site: AttentionSite) -> None:
        self.ratio, given = config.compression_ratio, default if config.budget is None else config.budget
        if isinstance(given, tuple) and len(given) != site.layer_count:
            raise ValueError(
                f"budget is given for {len(given)} layers, and {site.name} is one of {site.layer_count}: give one "
                "for each of these, patched or not."
            )
        own = given[site.layer_index] if isinstance(given, tuple) else given
        kv_heads = site.heads_in_all[1]
        if isinstance(own, list) and len(own) != kv_heads:
            raise ValueError(f"{site.name} has {kv_heads} kv heads, but budgets for {len(own)}: {own}.")
        self.keys = site.of_own_heads(own, kv=True) if isinstance(own, list) else [own]

    def least(self, columns: int) -> int:
        """So many stored keys are surely all kept, of a sequence of so many columns, padding included."""
        if self.ratio is None:
            return min(self.keys)
        return 0 if self.ratio else columns

    def most(self, columns: int) -> int:
        """Most keys that are kept of a row and head, likewise."""
        return max(self.keys) if self.ratio is None else share(columns, self.ratio)

    def of(self, call: AttentionCall) -> torch.Tensor:
        """`(B or 1, 1 or Hkv, 1)` number of keys to keep; at least one."""
        if self.ratio is None:
            if len(self.keys) == 1:
                return torch.full((1, 1, 1), self.keys[0], device=call.key.device)
            return torch.tensor(self.keys, device=call.key.device)[None, :, None]
        seen = call.mask.key_order()[:, :1, -1:]
        return (seen.double() * (1.0 - self.ratio) + _ROUNDING).floor().long().clamp(min=1)

    def refuse(self, call: AttentionCall, since: int = 0) -> None:
        """ValueError if a ratio leaves no key of what a sequence had so many tokens ago, which asks the device."""
        if not self.ratio:
            return
        seen = call.mask.key_order()[:, :1, -1:] - since
        if bool(((seen > 0) & (seen.double() * (1.0 - self.ratio) + _ROUNDING < 1)).any()):
            raise ValueError(
                f"compression_ratio={self.ratio} leaves no key of a sequence of {int(seen[seen > 0].min())}: give a "
                "smaller one, or a budget in keys."
            )


_ROUNDING = 1e-6  # 10 * (1 - 0.9) is less than 1 in floating point


def share(columns: int, ratio: float) -> int:
    """How many of so many keys a compression ratio keeps."""
    return math.floor(columns * (1.0 - ratio) + _ROUNDING)


def best(scores: torch.Tensor, real: torch.Tensor, counts: torch.Tensor, last: int | torch.Tensor = 0) -> torch.Tensor:
    """The keys with the highest scores; of equal ones those that come first.

    Args:
        scores: `(B, G, Tk)`.
        real: `(B or 1, G or 1, Tk)` bool: the keys there are; no other is among the best.
        counts: `(B or 1, G or 1, 1)` how many.
        last: so many last keys, one number or as `counts`, come before all others, whatever their scores.

    Returns:
        `(B, G, Tk)` bool.
    """
    real = real.expand_as(scores)
    order = real.long().cumsum(-1)
    near = real & (order[..., -1:] - order < counts.clamp(max=last))
    lowest = torch.finfo(scores.dtype).min
    scores = scores.clamp(min=lowest).masked_fill(near, torch.inf).masked_fill(~real, -torch.inf)
    places = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(places).scatter_(
        -1, places, torch.arange(scores.shape[-1], device=scores.device).expand_as(places)
    )
    return real & (ranks < counts)
