"""The parts that ACT and VAR are made of: attention with a set of keys told apart, and the mass of columns."""

from collections.abc import Callable

import torch

from patchattn_kernels import column_mass, split_attention

from .attention import AttentionProblem
from .problem import EAGER, OURS, Check, Implementation, Outcome, Work, difference, worst
from .truth import blocks as row_blocks
from .truth import logit_bias, logits, of_torch, pieces, whole_piece


class _KeySetProblem(AttentionProblem):
    """Attention with planted sinks, which are the set."""

    def key_set(self) -> torch.Tensor:
        """`(B, H, Tk)` bool."""
        o = self.operands
        chosen = torch.zeros(o.key.shape[2], dtype=torch.bool, device=self.device)
        chosen[o.sinks] = True
        return chosen.expand(o.query.shape[0], o.query.shape[1], -1).contiguous()

    def eager_weights(self) -> torch.Tensor:
        """`(B, H, Tq, Tk)` in float32, from logits in the operands' dtype."""
        o = self.operands
        rows = torch.arange(o.query.shape[2], device=self.device)
        scores = o.query @ o.key.repeat_interleave(o.heads_per_group, dim=1).mT * o.rule.scaling
        return scores.masked_fill(~o.visible("dense", rows), float("-inf")).softmax(dim=-1, dtype=torch.float32)


def ours_split(problem: "SplitProblem") -> Callable[[], Outcome]:
    """All four results from one call."""
    o, chosen = problem.operands, problem.key_set()

    def run() -> Outcome:
        with torch.no_grad():
            return split_attention(o.query, o.key, o.value, chosen, o.rule)._asdict()

    return run


def eager_split(problem: "SplitProblem") -> Callable[[], Outcome]:
    """With weights of N x N."""
    o, chosen = problem.operands, problem.key_set()

    def run() -> Outcome:
        with torch.no_grad():
            weights = problem.eager_weights()
            value = o.value.repeat_interleave(o.heads_per_group, dim=1)
            part = weights * chosen[:, :, None]
            both = (weights.to(value.dtype) @ value, part.to(value.dtype) @ value)
            return {"output": both[0], "part": both[1], "mass": part.sum(dim=-1)}

    return run


class SplitProblem(_KeySetProblem):
    """Attention, the part of it that a few keys have, and their mass."""

    implementations = (
        Implementation("patchattn", ours_split, "split", kernel="split_attention", leeway=OURS),
        Implementation("eager N x N", eager_split, "split", leeway=EAGER),
    )

    def work(self) -> Work:
        o = self.operands
        pairs = float(o.visible_counts("dense").sum()) * o.query.shape[0] * o.query.shape[1]
        return Work(4.0 * pairs * o.query.shape[-1], float(3 * o.query.nbytes + o.key.nbytes + o.value.nbytes))

    def check(self, computes: str, outcome: Outcome) -> Check:
        o, checks = self.operands, []
        chosen = self.key_set()[0, 0]
        for piece in pieces(o):
            bias = logit_bias(o, "dense", piece)
            weights = (logits(o, piece) + bias).softmax(-1)
            value = o.value[piece.batch, piece.group]
            mass = (weights * chosen).sum(-1)
            truth = {
                "output": weights @ value.double(),
                "part": (weights * chosen) @ value.double(),
                "mass": mass,
            }
            query, key = o.query[piece.batch, piece.heads][:, piece.rows], o.key[piece.batch, piece.group]
            inside = bias.masked_fill(~chosen, float("-inf"))
            own = {
                "output": of_torch(query, key, value, bias, o.rule.scaling),
                # the first key is in the set, so every row sees one of it
                "part": of_torch(query, key, value, inside, o.rule.scaling) * mass[..., None].to(value.dtype),
                "mass": (_rounded_weights(query, key, bias, o.rule.scaling) * chosen).sum(-1),
            }
            for name, wanted in truth.items():
                found = outcome[name][piece.batch, piece.heads][:, piece.rows]
                checks.append(Check(difference(found, wanted), difference(own[name], wanted), name))
        return worst(checks)


def ours_mass(problem: "ColumnMassProblem") -> Callable[[], Outcome]:
    """Without a log-sum-exp at hand."""
    o = problem.operands

    def run() -> Outcome:
        with torch.no_grad():
            return {"mass": column_mass(o.query, o.key, o.rule)[0]}

    return run


def eager_mass(problem: "ColumnMassProblem") -> Callable[[], Outcome]:
    """With weights of N x N."""

    def run() -> Outcome:
        with torch.no_grad():
            return {"mass": problem.eager_weights().sum(dim=2)}

    return run


class ColumnMassProblem(_KeySetProblem):
    """Attention that every key receives."""

    implementations = (
        Implementation("patchattn", ours_mass, "mass", kernel="column_mass", leeway=OURS),
        Implementation("eager N x N", eager_mass, "mass", leeway=EAGER),
    )

    def work(self) -> Work:
        """The logits twice: for the log-sum-exp of the rows, and for the columns."""
        o = self.operands
        pairs = float(o.visible_counts("dense").sum()) * o.query.shape[0] * o.query.shape[1]
        return Work(4.0 * pairs * o.query.shape[-1], float(o.query.nbytes + o.key.nbytes))

    def check(self, computes: str, outcome: Outcome) -> Check:
        o = self.operands
        piece = whole_piece(o)
        truth = torch.zeros(o.heads_per_group, o.key.shape[2], dtype=torch.float64, device=self.device)
        own = torch.zeros_like(truth)
        for block in row_blocks(o, piece):
            bias = logit_bias(o, "dense", block)
            truth += (logits(o, block) + bias).softmax(-1).sum(1)
            query = o.query[block.batch, block.heads][:, block.rows]
            own += _rounded_weights(query, o.key[block.batch, block.group], bias, o.rule.scaling).double().sum(1)
        found = outcome["mass"][piece.batch, piece.heads]
        return Check(difference(found, truth), difference(own, truth), "mass")


def _rounded_weights(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, scaling: float) -> torch.Tensor:
    """`(h, R, Tk)` weights in float32, from logits in the operands' dtype: what eager attention has."""
    scores = (query @ key.T * scaling).masked_fill(bias.isinf(), float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32)
