"""ACT: attention sinks give part of their weight to the other keys. Attention Calibration, arXiv 2406.15765."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from patchattn_kernels import AttentionRule, KeyCounts, attention_with_lse, column_mass, split_attention
from patchattn_kernels.dense_attention_cpu import in_one_call
from patchattn_kernels.rows import blocks, full_precision, log_sum_exp, row_logits, weights_of

from ...cache import waiting
from ...core.call import AttentionCall
from ...core.heads import HeadList, Heads, plain_heads
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, Variant, VariantConfig, VariantInfo
from ...softmax.rows import of_groups

_LITTLE = 0.1  # of a row: what is left of it after a subtraction has lost a digit


@dataclass(frozen=True, kw_only=True)
class ACTConfig(VariantConfig):
    """Settings of ACT; every field is described by `patchattn info act`."""

    sink_rule: Literal["mean", "fixed"] = option(
        "mean",
        help="A key is a sink if the queries that see it give it, on average, more than alpha / N of their attention, "
        "N the length of the sequence (mean), or more than a threshold (fixed).",
        source="paper, second-hand (mean); released code (fixed)",
    )
    alpha: float = option(
        5.0,
        help="With sink_rule=mean: a key is a sink if the mean attention it receives exceeds alpha / N, N the length "
        "of the sequence.",
        source="paper, second-hand",
        minimum=0.0,
        maximum=1e6,
    )
    threshold: float = option(
        0.1,
        help="With sink_rule=fixed: a key is a sink if the mean attention it receives exceeds this.",
        source="released code",
        minimum=0.0,
        maximum=1.0,
    )
    beta: float = option(
        0.4,
        help="Share of its attention that a sink keeps; 1 changes nothing.",
        source="paper and released code",
        minimum=0.0,
        maximum=1.0,
    )
    keep_first: bool = option(
        True,
        help="Leave the first token of a sequence alone, sink or not.",
        source="released code, which spares the first sink",
    )
    heads: Heads | None = option(
        None,
        parse=plain_heads,
        help="Which query heads: a file that `patchattn calibrate act` wrote, a mapping from layers to heads, or pairs "
        "of (layer, head). None: all heads of all layers but the first two and the last, or of all layers where there "
        "are fewer than four.",
        source="released code: the layers it searches for heads",
    )


class _OwnHeads(NamedTuple):
    """What ACT has of a call: of its calibrated heads, h of them with as many keys and values, or of all."""

    call: AttentionCall
    query: torch.Tensor  # (B, h, Tq, D)
    key: torch.Tensor  # (B, h or Hkv, Tk, D)
    value: torch.Tensor  # (B, h or Hkv, Tk, Dv)
    rule: AttentionRule
    real: torch.Tensor  # (B or 1, Tq) bool: which queries are no padding
    heads: torch.Tensor | None  # (h,) their numbers; None: all


class ACT(Variant):
    """Attention with sinks scaled by `beta`, and all other keys of a row by one factor that keeps the row's sum.

    Sinks are found per head from the attention that each key receives in the rows so far: all rows of a call, and with
    a kv cache those of all calls before it. Needs no weights of the base implementation.

    Reports `sink_keys` `(B, h, Tk)` and `sink_mass` `(B, Tq, h)` of the h calibrated heads.
    """

    config_class = ACTConfig
    config: ACTConfig
    keeps_state = True
    splits_by_head = True

    def __init__(self, config: ACTConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        for fact in ("query_heads", "kv_heads"):
            site.require(fact, by="ACT")
        # Not a buffer: one that is not saved holds nothing after a model was built without memory and then loaded.
        self.heads = _chosen(config, site)
        self._heads_on: dict[torch.device, torch.Tensor] = {}

    @classmethod
    def fit(
        cls, config: ACTConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[ACTConfig, Sequence[AttentionSite]]:
        if config.heads is not None:
            HeadList.parse(config.heads).check(model, sites)
        elif config.beta != 1.0 and not any(_chosen(config, site) for site in sites):
            raise ValueError("ACT leaves out the first two layers and the last by default: name heads=... for these.")
        return config, sites

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"beta": 1.0}

    @property
    def is_identity(self) -> bool:
        return self.config.beta == 1.0 or not self.heads

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        query, key, value = call.query, call.key, call.value
        heads = None
        if len(self.heads) < query.shape[1]:
            heads = self._numbers(query.device)
            groups = heads // (query.shape[1] // key.shape[1])
            query, key, value = query[:, heads], key[:, groups], value[:, groups]
        own = _OwnHeads(call, query, key, value, call.rule(heads), call.mask.real(), heads)
        alone = heads is None and call.stands_alone
        if query.shape[2] == 1 and query.device.type == "cpu":
            output, weights = (query.transpose(1, 2), None) if alone else inner(call)
            sinks, total, rest, sink_mass, others, part = self._of_one_row(own)
        else:
            output, weights, *found = self._of_rows(own, inner, alone=alone)
            sinks, total, rest, sink_mass, others, part = found
        # A row that sees little else than sinks, such as the first, has nowhere to move attention to.
        movable = rest > torch.finfo(rest.dtype).eps ** 0.5
        kept = 1.0 - (1.0 - self.config.beta) * movable.to(rest.dtype)
        factor = torch.where(movable, (total - kept * sink_mass) / rest.where(movable, 1.0), 1.0)
        changed = torch.addcmul(factor[..., None] * others, kept[..., None], part)
        self.report(call, sink_keys=sinks, sink_mass=sink_mass.transpose(1, 2))

        if weights is not None:
            before = weights if heads is None else weights[:, heads]
            scaled = before * torch.where(sinks[:, :, None], kept[..., None], factor[..., None])
            weights = _put(weights, heads, scaled, dim=1)
        return _put(output, heads, changed.transpose(1, 2), dim=2), weights

    def _of_one_row(self, own: _OwnHeads) -> tuple[torch.Tensor, ...]:
        """Sinks `(B, h, Tk)`, masses `(B, h, 1)` of all keys, of others and of sinks, and outputs `(B, h, 1, Dv)` of
        these two: the weights of one row are few, and are made."""
        call, query, key, value, rule, real, heads = own
        logits = row_logits(full_precision(query), full_precision(key), rule, slice(None))
        weights = weights_of(logits, log_sum_exp(logits, rule))
        sinks = self._found(call, weights[:, :, 0] * real[:, None], heads)
        apart = weights * torch.stack([~sinks, sinks], dim=2)
        rest, sink_mass = apart.sum(-1).split(1, dim=-1)
        others, part = of_groups(apart, full_precision(value)).split(1, dim=2)
        return sinks, rest + sink_mass, rest, sink_mass, others, part

    def _of_rows(self, own: _OwnHeads, inner: Attend, *, alone: bool) -> tuple[Any, ...]:
        """Output and weights of the base implementation, then as `_of_one_row`, without weights of all rows."""
        call, query, key, value, rule, real, heads = own
        # Half precision is computed anew: the factor of the other keys would blow up what was rounded off.
        anew = alone and _is_half(query)
        # On a CPU one call of torch's kernel gives the log-sum-exp beside the output of the base implementation.
        on_cpu = query.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        known = in_one_call(query, key, value, rule) if on_cpu and alone and not anew else None
        whole_anew = anew or known is not None  # the query stands for the dtype
        output, weights = (query.transpose(1, 2), None) if whole_anew else inner(call)
        if known is not None or _is_half(output):
            whole, lse = attention_with_lse(query, key, value, rule) if known is None else known
            mass, _ = column_mass(query, key, rule, lse=lse, real=real)
        else:
            whole = (output if heads is None else output[:, :, heads]).transpose(1, 2)
            mass, lse = column_mass(query, key, rule, real=real)
        sinks = self._found(call, mass, heads)
        total = torch.ones_like(lse) if rule.sinks is None else -torch.expm1(rule.sinks[:, None].to(lse.dtype) - lse)
        # What is left of a row after a subtraction has lost digits, and a large factor shows it: that of the other keys
        # is large, that of the sinks at most 1.
        others_first = waiting.waits(query) and not _is_half(output)
        split = split_attention(query, key, value, ~sinks if others_first else sinks, rule, output=whole, lse=lse)
        chosen, left = (split.mass, split.part), (total - split.mass, split.output - split.part)
        (rest, others), (sink_mass, part) = (chosen, left) if others_first else (left, chosen)
        if not (_is_half(output) or others_first or torch.compiler.is_compiling()):
            rest, others = _where_little_is_left(rest, others, query, key, value, sinks, rule, lse)
        return output, weights, sinks, total, rest, sink_mass, others, part

    def _found(self, call: AttentionCall, mass: torch.Tensor, heads: torch.Tensor | None) -> torch.Tensor:
        """Which keys are sinks, from the attention `(B, h, Tk)` that they receive in this call."""
        counts = call.mask.key_counts()
        if heads is not None and counts.rows.shape[1] > 1:
            counts = KeyCounts(*(count[:, heads] for count in counts))
        return self.sinks(*self._with_earlier_rows(call, mass, counts))

    def _numbers(self, device: torch.device) -> torch.Tensor:
        """`(h,)` of the calibrated heads; copied to a device once, since a CUDA graph must not."""
        if device in self._heads_on and not torch.compiler.is_compiling():
            return self._heads_on[device]
        with torch.inference_mode(False):  # training may use them later
            numbers = torch.tensor(self.heads, device=device)
        if type(numbers) is torch.Tensor and not torch.compiler.is_compiling():  # it has values, and no graph owns it
            self._heads_on[device] = numbers
        return numbers

    def sinks(self, mass: torch.Tensor, counts: KeyCounts) -> torch.Tensor:
        """Which keys are sinks, `(B, h, Tk)`, from the attention `(B, h, Tk)` they received (Sec. 3 of the paper).

        The counts are `(B or 1, h or 1, Tk)`.
        """
        mean = mass / counts.rows.clamp(min=1)
        fixed = self.config.sink_rule == "fixed"
        limit = self.config.threshold if fixed else self.config.alpha / counts.longest.clamp(min=1)
        sinks = mean > limit
        return sinks & ~counts.first if self.config.keep_first else sinks

    def _with_earlier_rows(
        self, call: AttentionCall, mass: torch.Tensor, counts: KeyCounts
    ) -> tuple[torch.Tensor, KeyCounts]:
        """Sums over the rows of this call and, with a kv cache, of all calls before it."""
        state = call.context.sequence_state("act", rewinds=False)
        if state is None:
            return mass, counts
        rows, longest = counts.rows, counts.longest
        not_first = (counts.rows > 0) & ~counts.first
        if state.per_key:
            mass = mass + state.per_key["mass"]
            rows = rows + state.per_key["rows"]
            longest = torch.maximum(longest, state.per_key["longest"])
            not_first = not_first | state.per_key["not_first"]
        for name, tensor in {"mass": mass, "rows": rows, "longest": longest, "not_first": not_first}.items():
            state.write(name, tensor.expand(mass.shape[0], *tensor.shape[1:]), per_key=True)
        return mass, KeyCounts(rows, longest, (rows > 0) & ~not_first)


def _chosen(config: ACTConfig, site: AttentionSite) -> tuple[int, ...]:
    """The calibrated heads of one attention module."""
    if config.heads is not None:
        return HeadList.parse(config.heads).of_site(site)
    inside = site.layer_count < 4 or 2 <= site.layer_index <= site.layer_count - 2
    return tuple(range(site.query_heads or 0)) if inside else ()


def _where_little_is_left(
    rest: torch.Tensor,
    others: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    rule: AttentionRule,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass `(B, h, Tq)` and output `(B, h, Tq, D)` of all keys but the sinks, summed up anew in rows with little mass.

    As a difference to the whole they are rounded to the whole's precision, which the factor of such a row blows up:
    without this, padding changes the output of a float32 model by 3e-4. It asks the device whether there is such a row:
    only for one that does not wait to be told (`waits`).
    """
    rows = (rest < _LITTLE).flatten(0, 1).any(dim=0).nonzero().flatten()
    if not len(rows):
        return rest, others
    wide_query, wide_key, wide_value = full_precision(query), full_precision(key), full_precision(value)
    for block in blocks(len(rows), query.shape[:2].numel() * key.shape[2]):
        some = rows[block]
        logits = row_logits(wide_query, wide_key, rule, some).masked_fill(sinks[:, :, None], float("-inf"))
        weights = weights_of(logits, lse[:, :, some])
        summed = weights.reshape(len(value), value.shape[1], -1, weights.shape[-1]) @ wide_value
        rest = rest.index_copy(2, some, weights.sum(dim=-1))
        others = others.index_copy(2, some, summed.view(*weights.shape[:3], -1))
    return rest, others


def _is_half(tensor: torch.Tensor) -> bool:
    return torch.finfo(tensor.dtype).eps > 1e-4


def _put(whole: torch.Tensor, heads: torch.Tensor | None, part: torch.Tensor, *, dim: int) -> torch.Tensor:
    """`whole` with the entries of some heads replaced; all of them for `None`."""
    part = part.to(whole.dtype)
    return part if heads is None else whole.index_copy(dim, heads, part)


register_variant(
    VariantInfo(
        name="act",
        variant=ACT,
        title="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training "
        "through Attention Calibration",
        arxiv_id="2406.15765",
        year=2024,
        code="https://github.com/GATECH-EIC/ACT",
        summary="Attention sinks in chosen heads give part of their attention to the other tokens.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"cross", "dropout"},
        presets={"released_code": {"sink_rule": "fixed", "threshold": 0.1, "beta": 0.4, "keep_first": True}},
        examples=(
            {"alpha": 1.0, "keep_first": False},
            {"sink_rule": "fixed", "threshold": 0.03, "heads": [[1, 0], [1, 3]]},
        ),
    )
)
