"""Squeezed Attention: what follows a fixed prefix reads the clusters of its keys that matter. arXiv 2411.09688."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from patchattn_kernels.rows import full_precision

from ....cache.state import SequenceState
from ....core import ranks
from ....core.call import AttentionCall
from ....core.keeping import of_query_heads
from ....core.mask import Mask
from ....core.places import Places, taken
from ....core.registry import register_variant
from ....core.sites import AttentionSite
from ....core.variant import VariantInfo
from ....files.documents import concerning
from ....reading.groups import any_of_group, read_by_one
from ....reading.selection import CAPABILITIES, plain_own
from .clusters import PrefixClusters, counted, means_of, scores_of
from .prompts import ComparedPrompts
from .settings import SqueezedConfig

_MEANS, _WHEN = "means", "when"


class Squeezed(ComparedPrompts):
    """Attention of what follows a prefix to those of its keys whose clusters would get more than a threshold.

    Tokens of the prefix, its last ones as keys, and the keys behind it are as without it.
    """

    config_class = SqueezedConfig
    config: SqueezedConfig
    needs_groups = True
    fine: torch.Tensor
    coarse: torch.Tensor

    def __init__(self, config: SqueezedConfig, site: AttentionSite) -> None:
        super().__init__(replace(config, clusters=None), site)
        if self.is_identity:
            return
        heads, keys = site.require("kv_heads", by="Squeezed Attention"), config.length - config.window
        self.register_buffer("fine", torch.zeros(heads, keys, dtype=torch.int16))
        if len(config.sizes) > 1:
            self.register_buffer("coarse", torch.zeros(heads, config.sizes[0], dtype=torch.int16))
        if config.compares:
            self.register_buffer("prefix", torch.zeros(config.length, dtype=torch.int64))
        if isinstance(config.clusters, PrefixClusters):
            for buffer, labels in zip(("fine", "coarse"), config.clusters.of_layer(site), strict=False):
                self.get_buffer(buffer).copy_(labels)
            if config.clusters.tokens is not None:
                self.prefix.copy_(config.clusters.tokens)

    @classmethod
    def fit(
        cls, config: SqueezedConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[SqueezedConfig, Sequence[AttentionSite]]:
        known = config.clusters
        if known is None and config.sparsity == 0.0:
            return super().fit(config, model, sites)
        if known is None:
            raise ValueError("squeezed needs clusters=...: the file that `patchattn calibrate squeezed` writes.")
        if not isinstance(known, PrefixClusters):
            known = PrefixClusters.load(known)
        _, whole = super().fit(config, model, sites)
        with concerning(config.clusters if isinstance(config.clusters, str) else None):
            own = known.chosen(model, whole)
        config = replace(
            config,
            clusters=known,
            length=known.length,
            window=known.window,
            sizes=known.sizes,
            thresholds=known.thresholds(config.sparsity) if config.sparsity else (-1.0,) * len(known.sizes),
            compares=known.tokens is not None,
        )
        return config, own

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"sparsity": 0.0}

    @property
    def is_identity(self) -> bool:
        return self.config.sparsity == 0.0

    @property
    def keeps_state(self) -> bool:
        return True

    def select(self, call: AttentionCall) -> torch.Tensor | Places | None:
        self.check(call)
        length, state = self.config.length, call.context.sequence_state(self.owner)
        row, own = call.query_positions(), plain_own(call.mask)
        known = self._known(call, state)
        if known is None:
            self.compare(call)
        if call.mask.columns <= length:
            return None
        with torch.no_grad():
            means = self._means(call, state, row) if known is None else [known]
            place = call.mask.key_places()[:, 0] - 1
            after, before = (row >= length) & call.mask.real(), (row < length)[:, None]
            if len(means) == 1:
                keep = self._by_key(self._kept(call, after, means[0]), place)
            else:
                number = ranks.by_row(call.mask, (place == length).long().cumsum(dim=-1)) - 1
                asking = [after & (number == text) for text in range(len(means))]
                parts = [self._by_key(self._kept(call, *each), place) for each in zip(asking, means, strict=True)]
                by_row = [rows[:, None, :, None] & part[:, :, None] for rows, part in zip(asking, parts, strict=True)]
                return of_query_heads(torch.stack(by_row).any(dim=0) | before[..., None], call.query.shape[1])
        if call.query.shape[2] == 1:
            keep = keep | before
            return read_by_one(call, keep, most=keep.shape[-1])
        if own is not None and own >= length:
            return keep
        return of_query_heads(keep, call.query.shape[1])[:, :, None] | before[..., None]

    def _known(self, call: AttentionCall, state: SequenceState | None) -> torch.Tensor | None:
        """The means of clusters, where the whole prefix came before this call."""
        if state is None or _MEANS not in state.tensors:
            return None
        # the number of keys is remembered as a size, which the host knows without asking the device
        return state.tensors[_MEANS] if state.tensors[_WHEN].shape[1] <= call.mask.columns - call.mask.queries else None

    def _means(self, call: AttentionCall, state: SequenceState | None, row: torch.Tensor) -> list[torch.Tensor]:
        """`(B, Hkv, K, D)` means of the keys of clusters, remembered once all are there.

        One for each text that may be long enough, where several are packed in a row.
        """
        length, mask, clustered = self.config.length, call.mask, self.fine.shape[1]
        order, place = mask.key_order()[:, 0].contiguous(), mask.key_places()[:, 0] - 1
        order, place = (each.expand(max(len(order), len(place)), -1).contiguous() for each in (order, place))
        texts = 1 if ranks.starts(mask) is None else max(1, mask.keys // (length + 1))
        seen = (place == length).long().cumsum(dim=-1)  # of each text the first token behind its prefix
        found = []
        for text in range(texts):
            behind = torch.searchsorted(seen, seen.new_full((len(seen), 1), text + 1)).clamp(max=mask.keys - 1)
            wanted = order.gather(1, behind) - length + torch.arange(clustered, device=order.device)
            columns = torch.searchsorted(order, wanted).clamp(max=mask.keys - 1)
            keys = full_precision(taken(call.key, columns[:, None].expand(len(call.key), call.key.shape[1], -1)))
            found.append(means_of(keys, self.fine, self.config.sizes[0]))
        if state is not None and texts == 1 and self._are_whole(mask, row):
            state.write(_MEANS, found[0])
            state.write(_WHEN, found[0].new_empty(len(found[0]), mask.columns, 0))
        return found

    def _are_whole(self, mask: Mask, row: torch.Tensor) -> bool:
        """Whether the prefix is over in all sequences; of padded ones the device is asked, once."""
        if plain_own(mask) is not None:
            return True
        return not torch.compiler.is_compiling() and bool((row.amax(dim=1) >= self.config.length).all())

    def _kept(self, call: AttentionCall, counts: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """`(B, Hkv or H, K)` bool: which clusters score above the threshold, on average over tokens that count."""
        weight = counts.to(means.dtype)[:, None, :, None]
        weight = weight / weight.sum(dim=2, keepdim=True).clamp(min=1)
        left = None
        if len(self.config.sizes) > 1:
            above = means_of(means, self.coarse, self.config.sizes[1])
            of_keys = self.coarse.long().gather(1, self.fine.long())
            scores = scores_of(call.query, above, counted(of_keys, self.config.sizes[1]), call)
            kept = (scores * weight).sum(dim=2) > self.config.thresholds[1]
            of_heads = of_query_heads(self.coarse.long()[None], kept.shape[1]).expand(*kept.shape[:2], -1)
            left = kept.gather(2, of_heads)
        scores = scores_of(call.query, means, counted(self.fine, self.config.sizes[0]), call, left)
        kept = (scores * weight).nan_to_num(0.0).sum(dim=2) > self.config.thresholds[0]
        kept = kept if left is None else kept & left
        return any_of_group(kept, call.key.shape[1]) if self.config.heads == "kv" else kept

    def _by_key(self, kept: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """`(B, Hkv or H, Tk)` bool, of clusters `(B, Hkv or H, K)` and the places `(B or 1, Tk)` of keys in texts."""
        batch, heads, _ = kept.shape
        labels = of_query_heads(self.fine.long()[None], heads).expand(batch, heads, -1)
        chosen = nn.functional.pad(kept.gather(2, labels), (0, 1), value=True)  # the last one is of all other keys
        clustered = labels.shape[2]
        index = torch.where((place >= 0) & (place < clustered), place, clustered)
        return chosen.gather(2, index[:, None].expand(batch, heads, -1))


def _example(coarse: bool) -> PrefixClusters:
    """Clusters of a prefix of four tokens, whatever these are, in two layers."""
    fine = torch.tensor([[0, 1, 1]], dtype=torch.int16)
    scores = torch.linspace(0.0, 1.0, 1001)[None].repeat(1 + coarse, 1)
    above = {layer: torch.tensor([[0, 1]], dtype=torch.int16) for layer in (0, 1)} if coarse else {}
    return PrefixClusters({0: fine, 1: fine}, scores, window=1, coarse=above)


register_variant(
    VariantInfo(
        name="squeezed",
        variant=Squeezed,
        title="Squeezed Attention: Accelerating Long Context Length LLM Inference",
        arxiv_id="2411.09688",
        year=2024,
        code="https://github.com/SqueezeAILab/SqueezedAttention",
        summary="What follows a fixed prefix reads the clusters of the prefix's keys that matter to it.",
        extra_parameters="none; a number per key of the prefix and kv head",
        needs_training=False,
        capabilities=CAPABILITIES,
        presets={"squeeze-70": {"sparsity": 0.7}, "squeeze-90": {"sparsity": 0.9}},
        examples=(
            {"clusters": _example(coarse=False), "sparsity": 0.6},
            {"clusters": _example(coarse=True), "sparsity": 0.6, "heads": "query"},
        ),
    )
)
