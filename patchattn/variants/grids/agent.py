"""Agent attention: a few agents, means of queries, read all tokens, and tokens read the agents. arXiv 2312.08874."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core.call import AttentionCall
from ...core.host import host
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import Attend, AttentionOutput, VariantConfig, VariantInfo
from ...reading.grid_masks import CAPABILITIES, GridVariant, is_plain, numbers, require_whole, shape_of_image

_TABLE = 7  # rows and columns of the tables that are enlarged to those of the image


@dataclass(frozen=True, kw_only=True)
class AgentConfig(VariantConfig):
    """Settings of agent attention."""

    agents: int | None = option(
        7,
        help="Agents of a side: queries of patches are averaged to as many rows and columns. None: plain attention.",
        source="paper: 49 agents",
        minimum=1,
    )


class Agent(GridVariant):
    """Attention in two steps, tokens to agents and agents to tokens, with learned biases and a convolution of values.

    With H heads and m agents a side, biases are tables: `patches` `(2, H, m^2, 7, 7)`, enlarged to the image;
    `down` and `across` `(2, H, m^2, 7)`, likewise to its rows and its columns; `others` `(2, H, m^2)`, of tokens that
    are no patches. The first of two are of what agents read, the second of who reads them.
    """

    config_class = AgentConfig
    config: AgentConfig

    def __init__(self, config: AgentConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        if config.agents is None:
            return
        heads, size = (site.require(fact, by="agent") for fact in ("query_heads", "head_dim"))
        shapes = {"patches": (_TABLE, _TABLE), "down": (_TABLE,), "across": (_TABLE,), "others": ()}
        for name, shape in shapes.items():
            table = torch.empty(2, heads, config.agents**2, *shape)
            self.register_parameter(name, nn.Parameter(nn.init.trunc_normal_(table, std=0.02)))
        self.convolution = nn.Parameter(torch.empty(heads * size, 1, 3, 3).uniform_(-1 / 3, 1 / 3))
        self.offset = nn.Parameter(torch.zeros(heads * size))

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"agents": None}

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        side, grid = self.config.agents, call.grid()
        if side is None:
            return inner(call)
        shape, prefix = shape_of_image(grid, self.site), grid.prefix
        require_whole(call, "agent")
        if not is_plain(call) or call.mask.keeps:
            raise NotImplementedError(
                f"agent has no place for a mask, or for what is added to logits, in {self.site.name}: all tokens of an "
                "image are to see all."
            )
        query, key, value = call.query, call.key, call.value
        if key.shape[1] != query.shape[1]:
            key, value = (s.repeat_interleave(query.shape[1] // s.shape[1], dim=1) for s in (key, value))
        order = numbers(grid).argsort()
        maps = query[:, :, prefix:].index_select(2, order).mT.flatten(0, 1).unflatten(-1, shape)
        agents = F.adaptive_avg_pool2d(maps, side).flatten(2).mT.unflatten(0, query.shape[:2])
        read = (agents @ key.mT * call.scaling + self._bias(0, shape, order, prefix, query.dtype)).softmax(-1)
        out = (query @ agents.mT * call.scaling + self._bias(1, shape, order, prefix, query.dtype).mT).softmax(-1)
        output = (out @ (read @ value)).transpose(1, 2)
        values = value[:, :, prefix:].index_select(2, order).mT.flatten(1, 2).unflatten(-1, shape)
        taps, offset = self.convolution.to(value.dtype), self.offset.to(value.dtype)
        local = F.conv2d(values, taps, offset, padding=1, groups=len(taps))
        local = local.flatten(2).mT.index_select(1, order.argsort()).unflatten(-1, (query.shape[1], -1))
        output = output + F.pad(local, (0, 0, 0, 0, prefix, 0))
        asked = call.kwargs.get("output_attentions") or not host().computes_softmax(call.base)
        return output, out @ read if asked else None

    def _bias(
        self, way: int, shape: tuple[int, int], order: torch.Tensor, prefix: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """`(H, m^2, T)`."""
        patches, down, across, others = (
            self.get_parameter(name)[way] for name in ("patches", "down", "across", "others")
        )
        of_rows, of_columns = (
            F.interpolate(table, size=size, mode="linear") for table, size in ((down, shape[0]), (across, shape[1]))
        )
        whole = F.interpolate(patches, size=shape, mode="bilinear") + of_rows[..., None] + of_columns[..., None, :]
        whole = whole.flatten(2).index_select(2, order.argsort())
        return torch.cat([others[..., None].expand(-1, -1, prefix), whole], dim=-1).to(dtype)


register_variant(
    VariantInfo(
        name="agent",
        variant=Agent,
        title="Agent Attention: On the Integration of Softmax and Linear Attention",
        arxiv_id="2312.08874",
        year=2023,
        code="https://github.com/LeapLabTHU/Agent-Attention",
        summary="A few agents, mean queries of an image, read all tokens, and tokens read the agents.",
        extra_parameters="tables of 128 values per agent and head, and ten values per channel, in each layer",
        needs_training=True,
        innermost=True,
        capabilities=CAPABILITIES - {"sinks", "softcap", "position_bias", "padding", "dropout"},
        examples=({"agents": 2},),
    )
)
