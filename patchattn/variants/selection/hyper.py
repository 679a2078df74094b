"""HyperAttention: queries read keys that fall into their own bucket, and a sample for all others. arXiv 2310.05869."""

from dataclasses import dataclass
from typing import Any

import torch

from patchattn_kernels.rows import full_precision

from ...core.call import AttentionCall
from ...core.keeping import of_query_heads
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.draws import normal, uniform
from ...reading.lines import texts_of
from ...reading.selection import CAPABILITIES
from ...reading.whole import WholeSelection

_SHIFTS = (1, 2, 4, 8)  # of a Gray code of at most 16 bits


@dataclass(frozen=True, kw_only=True)
class HyperConfig(VariantConfig):
    """Settings of HyperAttention."""

    exact: int | None = option(
        4096,
        help="Parts of a text up to this length, and products of parts shorter than it, are exact. None: all.",
        source="released code",
        unit="tokens",
        minimum=1,
    )
    block: int = option(
        256, help="Keys of a block, in the order of their hashes.", source="released code", unit="keys", minimum=1
    )
    samples: int = option(
        256, help="Keys that are drawn for all other blocks.", source="released code", unit="keys", minimum=1
    )
    planes: int = option(
        7, help="Random hyperplanes of the hash.", source="released code", unit="bits", minimum=1, maximum=16
    )
    seed: int = option(
        0, help="Seed of hyperplanes and samples.", source="ours, to repeat a draw", minimum=0, maximum=2**31 - 1
    )

    @property
    def looks_ahead(self) -> bool:
        """How a text is cut depends on its length, and which keys a query meets on the other queries."""
        return self.exact is not None


class Hyper(WholeSelection):
    """Attention of later halves of a text to earlier ones by one block of similar keys, and by a sample of the others.

    A text is halved until its parts are short. Logits of sampled keys grow by the log of how many keys each stands for,
    so that what all keys would give is estimated without bias, above the bar of the softmax and below it.
    """

    config_class = HyperConfig
    config: HyperConfig

    @property
    def is_identity(self) -> bool:
        return self.config.exact is None

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"exact": None}

    def select(self, call: AttentionCall) -> torch.Tensor | None:
        self.check(call)
        terms = self.key_bias(call)
        return None if terms is None else terms > float("-inf")

    def key_bias(self, call: AttentionCall) -> torch.Tensor | None:
        """`(B, H, Tq, Tk)` 0 of pairs that are read exactly, the log of a sample's weight, -inf of what is not read."""
        exact, columns = self.config.exact, call.mask.columns
        if exact is None or call.decodes or -(-columns // 2) < max(exact, 1) or columns <= exact:
            return None
        texts = texts_of(call.mask)
        row, key = call.mask.row_places() - 1, call.mask.key_places()[:, 0] - 1
        batch = len(texts.of_rows)
        row, key = row.expand(batch, -1), key.expand(batch, -1)
        real_rows, real_keys = call.mask.real().expand(batch, -1), call.mask.real_keys()[:, 0].expand(batch, -1)
        ends = [row + 1 + texts.behind_rows, key + 1 + texts.behind_keys]
        starts = [torch.zeros_like(end) for end in ends]
        codes = [self._hashes(states) for states in (call.query, call.key)]
        heads, terms = call.query.shape[1], torch.zeros((), dtype=torch.float64, device=row.device)
        size, level = columns, 0
        while size > exact:
            middles = [(start + end + 1) // 2 for start, end in zip(starts, ends, strict=True)]
            is_split = [end - start > exact for start, end in zip(starts, ends, strict=True)]
            is_later, is_earlier = row >= middles[0], key < middles[1]
            node = [texts.of_rows + starts[0], texts.of_keys + starts[1]]
            length = [middle - start for middle, start in zip(middles, starts, strict=True)]
            asks = is_split[0] & (length[0] >= exact) & is_later & real_rows
            gives = is_split[1] & (length[1] >= exact) & is_earlier & real_keys
            asking, giving = ranked(node[0], codes[0], asks), ranked(node[1], codes[1], gives)
            blocks = [
                torch.div(asking[0] * length[0][:, None], asking[1], rounding_mode="floor") // self.config.block,
                of_query_heads(giving[0], heads) // self.config.block,
            ]
            weight = self._sampled(key - starts[1], length[1], heads, level).log()
            of_pairs = torch.where(blocks[0][..., None] == blocks[1][:, :, None], 0.0, weight[:, :, None])
            are_apart = (node[0][..., None] == node[1][:, None]) & asks[..., None] & gives[:, None]
            terms = torch.where(are_apart[:, None], of_pairs, terms)
            for part, is_second in enumerate((is_later, key >= middles[1])):
                starts[part] = torch.where(is_split[part] & is_second, middles[part], starts[part])
                ends[part] = torch.where(is_split[part] & ~is_second, middles[part], ends[part])
            size, level = -(-size // 2), level + 1
        return terms.to(full_precision(call.query).dtype)

    def _hashes(self, states: torch.Tensor) -> torch.Tensor:
        """`(B, h, T)` int: buckets of queries or keys, neighbours of which differ in one sign of the hyperplanes."""
        planes, dim = self.config.planes, states.shape[-1]
        number = torch.arange(dim * planes, device=states.device).view(dim, planes)
        with torch.no_grad():
            states = full_precision(states)
            signs = states @ normal(number, self.config.seed, self.site.layer_index).to(states.dtype) > 0
        code = (signs.long() << torch.arange(planes, device=states.device)).sum(dim=-1)
        for shift in _SHIFTS:
            code = code ^ (code >> shift)
        return code

    def _sampled(self, place: torch.Tensor, length: torch.Tensor, heads: int, level: int) -> torch.Tensor:
        """`(B, H, Tk)` how many keys each stands for that is drawn; 0 of the others.

        Args:
            place: `(B, Tk)` of keys in their part of the text.
            length: `(B, Tk)` of that part.
            heads: H.
            level: how often the text was halved.
        """
        samples = self.config.samples
        first = (1 << 24) * (level + 1)  # behind the numbers of the hyperplanes
        number = first + torch.arange(heads * samples, device=place.device).view(heads, samples)
        drawn = uniform(number, self.config.seed, self.site.layer_index).sort(dim=-1).values
        ends = [
            ((place + more) / length.clamp(min=1)).double().expand(heads, *place.shape).flatten(1) for more in (0, 1)
        ]
        low, high = (torch.searchsorted(drawn, end.contiguous()) for end in ends)
        counts = (high - low).view(heads, *place.shape).transpose(0, 1)
        return counts.double() * length[:, None] / samples


def ranked(node: torch.Tensor, code: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks of tokens by their hashes among those of a part of the text, and how many these are: `(B, h, T)` int each.

    Args:
        node: `(B, T)` number of each token's part.
        code: `(B, h, T)` hashes; of equal ones the first comes first.
        counts: `(B, T)` bool: which tokens have a rank.
    """
    behind = node.amax() + 1
    node = torch.where(counts, node, behind)[:, None].expand(code.shape)
    order = ((node << 16) + code).sort(dim=-1, stable=True).indices
    place = torch.empty_like(order).scatter(
        -1, order, torch.arange(code.shape[-1], device=code.device).expand_as(order)
    )
    ordered = node.gather(-1, order).contiguous()
    first, end = (torch.searchsorted(ordered, node.contiguous(), right=right) for right in (False, True))
    return place - first, end - first


register_variant(
    VariantInfo(
        name="hyper",
        variant=Hyper,
        title="HyperAttention: Long-context Attention in Near-Linear Time",
        arxiv_id="2310.05869",
        year=2023,
        code="https://github.com/insuhan/hyper-attn",
        summary="Later parts of a prompt read similar keys of earlier ones, and a sample for the others.",
        extra_parameters="none",
        needs_training=False,
        innermost=True,
        capabilities=CAPABILITIES,
        examples=({"exact": 2, "block": 1, "samples": 1, "planes": 3},),
    )
)
