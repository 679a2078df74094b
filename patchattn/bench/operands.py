"""Random operands of attention, laid out as models lay them out, and which keys each query sees."""

import zlib
from dataclasses import dataclass, field

import torch

from patchattn_kernels import AttentionRule

from .cases import Case

SINKS, RECENT = 64, 256  # of the block-sparse heads
PAGE = 16  # keys of a page that is selected or not
CALIBRATED = 4  # planted attention sinks of ACT's operands; the first one is the first token
# The share of tokens that keep each of 8 query heads: MoH trained on stories260K (moh_50, seed 0), the layer that is
# least even; `benchmarks/stories260k.py usage` prints it.
TRAINED = (1.0, 1.0, 1.0, 0.005, 0.053, 0.026, 0.915, 0.001)


@dataclass(eq=False)
class Operands:
    """What one call of attention gets.

    Attributes:
        case: of which.
        query: `(B, H, Tq, D)`; in memory the heads of a token are neighbours, as projections leave them.
        key, value: `(B, G, Tk, D)`, likewise.
        rule: scaling and visibility.
        grad: `(B, H, Tq, D)` gradient of the output, in training.
        gate: `(B, Tq, H)` zero where a head is not selected.
        sinks: positions of planted attention sinks.
        window: sizes of sink and recent window.
        pages: `(B, G, N)` numbers of the pages that are read.
    """

    case: Case
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rule: AttentionRule
    grad: torch.Tensor
    gate: torch.Tensor | None = None
    sinks: list[int] = field(default_factory=list)
    window: tuple[int, int] = (SINKS, RECENT)
    pages: torch.Tensor | None = None

    @property
    def trains(self) -> bool:
        return self.case.mode == "training"

    @property
    def given_gate(self) -> torch.Tensor:
        """The gate; ValueError where the case has none."""
        if self.gate is None:
            raise ValueError(f"The case {self.case.name!r} has no gate: expected an operation that selects heads.")
        return self.gate

    @property
    def given_pages(self) -> torch.Tensor:
        """The pages; ValueError where the case has none."""
        if self.pages is None:
            raise ValueError(f"The case {self.case.name!r} has no pages: expected an operation that selects them.")
        return self.pages

    @property
    def heads_per_group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def own(self, rows: torch.Tensor) -> torch.Tensor:
        """Own key of each of some rows."""
        return rows + self.key.shape[2] - self.query.shape[2]

    def visible(self, computes: str, rows: torch.Tensor) -> torch.Tensor:
        """`(R, Tk)` which keys some rows see."""
        keys, own = torch.arange(self.key.shape[2], device=rows.device), self.own(rows)[:, None]
        seen = keys <= own if self.rule.causal else torch.ones_like(keys <= own)
        if computes == "streaming":
            sinks, recent = self.window
            seen = seen & ((keys < sinks) | (own - keys < recent))
        return seen

    def visible_counts(self, computes: str) -> torch.Tensor:
        """`(Tq,)` how many keys each row sees."""
        own = self.own(torch.arange(self.query.shape[2], device=self.query.device))
        seen = own + 1 if self.rule.causal else torch.full_like(own, self.key.shape[2])
        return seen.clamp(max=sum(self.window)) if computes == "streaming" else seen


def generator(case: Case, device: torch.device) -> torch.Generator:
    """One that gives the same numbers for a case in every process."""
    return torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))


def make_operands(case: Case, device: torch.device) -> Operands:
    """The operands of a case; those that gradients are taken of say so."""
    shape, dtype, source = case.geometry, getattr(torch, case.dtype), generator(case, device)
    rows = 1 if case.mode == "decode" else case.tokens

    def draw(heads: int, tokens: int, factor: float = 1.0) -> torch.Tensor:
        numbers = torch.randn(case.batch, tokens, heads, shape.head_dim, device=device, generator=source)
        return numbers.mul_(factor).to(dtype).transpose(1, 2)

    query, key = draw(shape.query_heads, rows), draw(shape.kv_heads, case.tokens)
    value, grad = draw(shape.kv_heads, case.tokens), draw(shape.query_heads, rows)
    rule = AttentionRule(scaling=shape.head_dim**-0.5, causal=shape.causal)
    operands = Operands(case, query, key, value, rule, grad)
    if case.op == "routed":
        operands.gate = make_gate(case, rows, source)
    if case.op == "selected":
        operands.pages = make_pages(case, device, source)
    if case.op in ("act", "split", "column_mass"):
        plant_sinks(operands)
    if shape.name.startswith("tiny"):
        operands.window = (4, 12)
    if operands.trains:
        for tensor in (operands.query, operands.key, operands.value, operands.gate):
            if tensor is not None:
                tensor.requires_grad_()
    return operands


def make_pages(case: Case, device: torch.device, source: torch.Generator) -> torch.Tensor:
    """`(B, G, N)`: for every kv head a share of the pages, in any order."""
    if case.tokens % PAGE:
        raise ValueError(f"Expected whole pages of {PAGE} keys, got a case of {case.tokens}.")
    number = case.tokens // PAGE
    order = torch.rand(case.batch, case.geometry.kv_heads, number, device=device, generator=source)
    return order.topk(max(1, int(case.active * number + 0.5)), dim=-1).indices


def make_gate(case: Case, rows: int, source: torch.Generator) -> torch.Tensor:
    """`(B, Tq, H)` in which every token keeps the same number of heads; weights from 0.5 to 1.5, as learned ones."""
    heads = case.geometry.query_heads
    kept = int(case.active * heads + 0.5)
    if case.pattern == "trained":
        return _as_trained(case, rows, kept, source)
    shared = int(kept * 2 / 3 + 0.5) if case.pattern == "moh" else 0
    order = torch.rand(case.batch, rows, heads, device=source.device, generator=source)
    order[..., :shared] += 2.0
    weights = torch.rand(case.batch, rows, heads, device=source.device, generator=source) + 0.5
    chosen = torch.zeros_like(order).scatter(-1, order.topk(kept, dim=-1).indices, 1.0)
    return chosen * weights


def _as_trained(case: Case, rows: int, kept: int, source: torch.Generator) -> torch.Tensor:
    """A gate whose heads are kept as often as those of `TRAINED`, neighbours of one another standing for one of them.

    Heads lie one after another in any order, each as long as its share; those that marks at a distance of 1 fall on
    are kept. So every token keeps as many, and every head is kept as often as its share says.
    """
    heads = case.geometry.query_heads
    shares = torch.tensor(TRAINED, dtype=torch.float64).repeat_interleave(heads).view(heads, len(TRAINED)).mean(1)
    if abs(float(shares.sum()) - kept) > 1e-6:
        raise ValueError(
            f"The trained router keeps {sum(TRAINED) / len(TRAINED):.0%} of the heads, not {case.active:.0%}."
        )
    shape, device = (case.batch, rows, heads), source.device
    order = torch.rand(shape, device=device, generator=source).argsort(-1)
    ends = shares.to(device)[order].cumsum(-1)
    marks = torch.rand(*shape[:2], 1, dtype=torch.float64, device=device, generator=source)
    passed = (ends + marks).floor()
    passed[..., -1] = kept  # whatever the sum was rounded to
    chosen = torch.zeros(shape, device=device).scatter(
        -1, order, passed.diff(dim=-1, prepend=torch.zeros_like(marks)).float()
    )
    return chosen * (torch.rand(shape, device=device, generator=source) + 0.5)


def plant_sinks(operands: Operands) -> None:
    """Give all queries a direction in common, and some keys too, so that these get about a fifth of all rows each.

    Random queries and keys have no attention sinks, and those that rounding decides on could not be checked. All other
    logits are small, so that no other key comes near a sink.
    """
    keys = operands.key.shape[2]
    operands.sinks = [keys * place // 8 for place in range(CALIBRATED)]
    length = (torch.tensor(float(keys)).log() / operands.rule.scaling).sqrt()
    operands.query *= 0.3
    operands.query[..., 0] = length
    operands.key[..., 0] = 0.0
    operands.key[:, :, operands.sinks, 0] = length.to(operands.key)
