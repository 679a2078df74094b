"""ACT on one call of attention, as the variant computes it, beside the dense forward and an eager N x N one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.chain import attention_call
from ..core.module_call import ModuleCall
from ..core.sites import AttentionSite
from ..core.surroundings import LayerContext
from ..variants.sinks.act import ACT, ACTConfig
from .attention import DENSE, AttentionProblem, dense, dense_under, step
from .problem import EAGER, OURS, Implementation, Outcome, Work
from .truth import ACT_BETA, ACT_THRESHOLD


def ours(problem: "ACTProblem") -> Callable[[], Outcome]:
    """The variant itself, on all heads, with SDPA inside: what a patched layer runs."""
    o = problem.operands
    config = ACTConfig(sink_rule="fixed", threshold=ACT_THRESHOLD, beta=ACT_BETA)
    variant = ACT(config, _site(o.query.shape[1], o.key.shape[1], o.query.shape[3]))
    module = nn.Identity()
    nothing = o.query.new_empty(o.query.shape[0], o.query.shape[2], 0)
    context = LayerContext(module, nothing, None, None, {})
    how = {"scaling": o.rule.scaling, "is_causal": o.rule.causal}
    given = ModuleCall(module, o.query, o.key, o.value, None, how)
    call = attention_call(given, variant.site, "sdpa", context).replace(innermost=True)

    def inner(_: AttentionCall) -> tuple[torch.Tensor, None]:
        return dense(o).transpose(1, 2), None

    return step(o, lambda: variant.attend(call, inner)[0].transpose(1, 2))


def _site(heads: int, groups: int, dim: int) -> AttentionSite:
    """A layer that calibrates all its heads: the only one of its tower."""
    named: dict[str, Any] = {"name": "bench", "tower": "", "layer_index": 0, "layer_count": 1}
    shape: dict[str, Any] = {"query_heads": heads, "kv_heads": groups, "head_dim": dim, "input_size": None}
    sizes: dict[str, Any] = {"memory_size": None, "projections": {}, "projection_sizes": {}, "query_norm": None}
    passed: dict[str, Any] = {"input_argument": "hidden_states", "memory_argument": None, "mask_argument": None}
    return AttentionSite(
        module_class="Identity", is_cross=False, arguments=(), max_positions=None, **named, **shape, **sizes, **passed
    )


def eager(problem: "ACTProblem") -> Callable[[], Outcome]:
    """With weights of N x N, as the released ACT code has them: kv heads repeated, softmax in float32.

    The released code copies and changes the weights head by head in Python; here all heads are taken at once.
    """
    o = problem.operands

    def attend() -> torch.Tensor:
        share = o.heads_per_group
        key, value = o.key.repeat_interleave(share, dim=1), o.value.repeat_interleave(share, dim=1)
        rows, keys = o.query.shape[2], key.shape[2]
        logits = o.query @ key.mT * o.rule.scaling
        if o.rule.causal:
            hidden = torch.ones(rows, keys, dtype=torch.bool, device=key.device).triu(1)
            logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
        weights = logits.softmax(dim=-1, dtype=torch.float32).to(o.query.dtype)
        seen_by = torch.arange(keys, 0, -1, device=key.device) if o.rule.causal else torch.tensor(rows)
        sinks = weights.sum(dim=2, dtype=torch.float32) / seen_by > ACT_THRESHOLD
        sinks[..., 0] = False
        chosen = weights * sinks[:, :, None]
        freed = (1.0 - ACT_BETA) * chosen.sum(dim=-1, keepdim=True)
        rest = weights - chosen
        weights = rest + ACT_BETA * chosen + freed * rest / rest.sum(dim=-1, keepdim=True)
        return weights @ value

    return step(o, attend)


class ACTProblem(AttentionProblem):
    """Attention whose sinks keep a share of their weight, found from the attention that every key receives."""

    implementations = (
        Implementation("patchattn", ours, "act", kernel="split_attention", leeway=OURS),
        *map(dense_under, DENSE),
        Implementation("eager N x N", eager, "act", leeway=EAGER),
    )

    def work(self) -> Work:
        """Attention once, and the logits once more for the mass of the columns."""
        o = self.operands
        pairs = float(o.visible_counts("dense").sum()) * o.query.shape[0] * o.query.shape[1]
        moved = o.query.nbytes * 2 + o.key.nbytes + o.value.nbytes
        return Work(6.0 * pairs * o.query.shape[-1], float(moved))
