"""What the routers of a patched model do: which heads are used, how surely and how evenly."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.observation import observe
from ..core.report import Observation
from ..core.sites import AttentionSite


@dataclass(frozen=True)
class LayerRouting:
    """What one layer's router did on real tokens, padding excluded.

    Attributes:
        site: the attention module.
        usage: per query head, the share of tokens for which it is on.
        entropy: mean entropy of a token's router probabilities over the R heads that are not shared, divided by
            log R: 1 without any preference, 0 with certainty. `None` where nothing is chosen.
        balance: entropy of the distribution of the choices over those heads, divided by log R: 1 if all are chosen
            equally often. `None` where nothing is chosen.
    """

    site: AttentionSite
    usage: list[float]
    entropy: float | None
    balance: float | None


class RoutingStatistics:
    """Running sums of what routers report; see `routing_statistics`."""

    def __init__(self) -> None:
        self._sites: dict[str, AttentionSite] = {}
        self._sums: dict[
            str, torch.Tensor
        ] = {}  # tokens; entropy, how often chosen (R), if anything is; how often on (H)

    @torch.no_grad()
    def add(self, seen: Observation) -> None:
        """Count one observation; those without a gate are passed over."""
        gate = seen.values.get("gate")
        if gate is None:
            return
        real = seen.real_tokens().unsqueeze(-1).expand(*gate.shape[:2], 1)
        wide = torch.float32 if gate.device.type == "mps" else torch.float64  # Apple's GPUs have no double
        parts = [real.sum()[None]]
        if "router_probability" in seen.values:
            entropy = torch.special.entr(seen.values["router_probability"])
            parts += [entropy.where(real, 0.0).sum()[None], seen.values["router_choice"].where(real, 0.0).sum((0, 1))]
        sums = torch.cat([part.to(wide) for part in (*parts, ((gate != 0) & real).sum((0, 1)))])
        name = seen.site.name
        self._sites[name] = seen.site
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._sites.clear()
        self._sums.clear()

    def reduce(self, accelerator: Any) -> None:
        """Add up what the processes of an `accelerate.Accelerator` counted; each has run the same layers."""
        self._sums = {name: accelerator.reduce(sums, "sum") for name, sums in self._sums.items()}

    def layers(self) -> list[LayerRouting]:
        """One entry per layer that has a gate, in the order of their first run; a layer of which a parameter-free
        router keeps every head has none.

        Raises:
            ValueError: nothing was observed.
        """
        if not self._sums:
            raise ValueError(
                "No router has run: no variant of the model chooses heads per token, as moh does, or the model was not "
                "run while this was collected."
            )
        return [self._layer(site, self._sums[name].tolist()) for name, site in self._sites.items()]

    def _layer(self, site: AttentionSite, sums: list[float]) -> LayerRouting:
        tokens, heads = max(sums[0], 1.0), site.query_heads or 0
        usage, chosen = [count / tokens for count in sums[-heads:]], sums[2:-heads]
        if not chosen:
            return LayerRouting(site, usage, None, None)
        if len(chosen) == 1:
            return LayerRouting(site, usage, 0.0, 1.0)
        shares = [count / max(sum(chosen), 1.0) for count in chosen]
        balance = -sum(share * math.log(share) for share in shares if share > 0)
        return LayerRouting(site, usage, sums[1] / tokens / math.log(len(chosen)), balance / math.log(len(chosen)))

    def usage(self) -> list[list[float]]:
        """Per layer the share of tokens that use each head: what `plot_head_usage` draws."""
        return [layer.usage for layer in self.layers()]


@contextmanager
def routing_statistics(model: nn.Module) -> Iterator[RoutingStatistics]:
    """Count which heads the tokens of a model use while the block runs.

    Args:
        model: patched with a variant that routes, such as MoH.

    Yields:
        A `RoutingStatistics`; read `layers()` or `usage()` inside the block or after it.

    Raises:
        ValueError: the model carries no variant.
    """
    statistics = RoutingStatistics()
    with observe(model, statistics.add):
        yield statistics
