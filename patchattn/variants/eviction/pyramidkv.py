"""PyramidKV: SnapKV's scores, with more keys in lower layers. Cai et al., arXiv 2406.02069."""

from dataclasses import dataclass

import torch

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import VariantInfo
from ...reading.eviction import CAPABILITIES
from ...reading.windows import WindowConfig, WindowEviction


@dataclass(frozen=True, kw_only=True)
class PyramidKVConfig(WindowConfig):
    """Settings of PyramidKV; every field is described by `patchattn info pyramidkv`."""

    window: int = option(
        8,
        help="Last queries of the prompt whose attention is counted; their keys are kept, within the budget.",
        source="released code: its LongBench script",
        unit="tokens",
        minimum=1,
    )
    beta: int = option(
        20,
        help="The highest layer keeps the mean number of keys divided by this, besides the window.",
        source="released code",
        minimum=1,
    )


class PyramidKV(WindowEviction):
    """Attention to what the last queries of a prompt attend to; the higher the layer, the fewer keys."""

    config_class = PyramidKVConfig
    config: PyramidKVConfig
    name = "pyramidkv"
    default_budget = 2048
    splits_by_head = True

    def __init__(self, config: PyramidKVConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        if config.budget is not None and not isinstance(config.budget, int):
            raise ValueError(f"PyramidKV shares one budget out over the layers, got {config.budget} for each.")

    def counts(self, call: AttentionCall) -> torch.Tensor:
        return self._counts(self.budget.of(call), call.mask.real_keys().sum(-1, keepdim=True))

    def bound(self, columns: int) -> int | None:
        return None  # in high layers a shorter row of a batch may keep more than a longer one

    def _counts(self, mean: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """How many keys this layer keeps of sequences of some lengths, all layers `mean` on average."""
        window, layers = self.config.window, self.site.layer_count
        shared = (mean - window).clamp(min=0)
        least = shared // self.config.beta
        most = torch.minimum(2 * shared - least, length - window)
        least = torch.where(most == length - window, 2 * shared - most, least)
        step = (most - least) // max(1, layers - 1)
        is_uniform = (length < 2 * shared) | (mean <= window) | torch.tensor(layers == 1, device=mean.device)
        return torch.where(is_uniform, mean, most - self.site.layer_index * step + window)


register_variant(
    VariantInfo(
        name="pyramidkv",
        variant=PyramidKV,
        title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
        arxiv_id="2406.02069",
        year=2024,
        code="https://github.com/Zefan-Cai/KVCache-Factory",
        summary="The kv cache keeps the keys that a prompt's last queries attend to, more of them in lower layers.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES,
        examples=({"budget": 5, "window": 2, "kernel": 3, "beta": 3}, {"budget": 4, "window": 3, "event": "chunk"}),
    )
)
