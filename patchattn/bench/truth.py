"""What attention must give, in float64 on a slice, and what torch's own kernel gives there in the operands' dtype.

A slice is some rows of the query heads of some kv heads; of gradients, which every row has a part in, all rows of one
kv head. Nothing here calls the operations that are measured.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from .operands import PAGE, Operands, generator
from .problem import Check, Outcome, difference, worst

ROWS, PIECES, DECODING_PIECES = 48, 4, 64
BLOCK = 2**25  # weights held at a time
ACT_BETA, ACT_THRESHOLD = 0.4, 0.1  # of the released code


class Piece(NamedTuple):
    """The query heads of one kv head, and which of their rows."""

    batch: int
    group: int
    heads: slice
    rows: torch.Tensor


def pieces(operands: Operands) -> Iterator[Piece]:
    """Kv heads spread over the batch, with rows spread over the sequence: the first, the last, and any."""
    batch, groups, total = operands.query.shape[0], operands.key.shape[1], operands.query.shape[2]
    device, share = operands.query.device, operands.heads_per_group
    source = generator(operands.case, torch.device("cpu"))
    some = torch.randperm(total, generator=source)[:ROWS].to(device)
    rows = torch.cat([some, torch.tensor([0, total - 1], device=device)]).unique()
    limit = DECODING_PIECES if operands.case.mode == "decode" else PIECES
    places = torch.linspace(0, batch * groups - 1, min(limit, batch * groups)).round().long().tolist()
    for place in places:
        group = place % groups
        yield Piece(place // groups, group, slice(group * share, (group + 1) * share), rows)


def whole_piece(operands: Operands) -> Piece:
    """All rows of the last kv head."""
    *_, last = pieces(operands)
    return last._replace(rows=torch.arange(operands.query.shape[2], device=operands.query.device))


def blocks(operands: Operands, piece: Piece) -> Iterator[Piece]:
    """The piece, some rows at a time."""
    size = max(1, BLOCK // (operands.heads_per_group * operands.key.shape[2]))
    for rows in piece.rows.split(size):
        yield piece._replace(rows=rows)


def logit_bias(operands: Operands, computes: str, piece: Piece, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """What is added to the logits of a piece, `(h or 1, R, Tk)` in float64: -inf where a key is not seen.

    Rescaled attention is a softmax too: a factor of some weights is its logarithm added to their logits.
    """
    seen = operands.visible(computes, piece.rows)
    if computes == "selected":
        pages = torch.arange(seen.shape[1], device=seen.device) // PAGE
        seen = seen & torch.isin(pages, operands.given_pages[piece.batch, piece.group])
    bias = torch.zeros(1, *seen.shape, dtype=torch.float64, device=seen.device).masked_fill(~seen, float("-inf"))
    if computes != "act":
        return bias
    if sinks is None:
        raise ValueError(
            "ACT's attention is known with its sinks alone, see `act_sinks`; it is not compared in training."
        )
    weights = (logits(operands, piece) + bias).softmax(-1)
    mass = (weights * sinks[:, None]).sum(-1, keepdim=True)
    movable = 1.0 - mass > torch.finfo(torch.float32).eps ** 0.5
    factor = (1.0 - ACT_BETA * mass) / (1.0 - mass).where(movable, 1.0)
    ratio = torch.where(movable, ACT_BETA / factor, 1.0).log()
    return bias + torch.where(sinks[:, None], ratio, 0.0)


def logits(operands: Operands, piece: Piece) -> torch.Tensor:
    """`(h, R, Tk)` in float64."""
    query = operands.query[piece.batch, piece.heads][:, piece.rows].detach().double()
    return query @ operands.key[piece.batch, piece.group].detach().double().T * operands.rule.scaling


def gate_of(operands: Operands, computes: str, piece: Piece) -> torch.Tensor | None:
    """`(h, R)`, where the result is gated."""
    if computes != "gated" or operands.gate is None:
        return None
    return operands.gate[piece.batch][piece.rows][:, piece.heads].detach().T


def column_means(operands: Operands, piece: Piece) -> torch.Tensor:
    """`(h, Tk)` attention that each key gets on average from the rows that see it, in float64."""
    total = torch.zeros(operands.heads_per_group, operands.key.shape[2], dtype=torch.float64, device=piece.rows.device)
    count = torch.zeros_like(total[0])
    for block in blocks(operands, piece._replace(rows=whole_piece(operands).rows)):
        bias = logit_bias(operands, "dense", block)
        total += (logits(operands, block) + bias).softmax(-1).sum(1)
        count += (bias[0] == 0).sum(0)
    return total / count


def act_sinks(operands: Operands, piece: Piece) -> torch.Tensor:
    """`(h, Tk)` bool: the sinks that ACT calibrates, by the released code's rule; the first token is spared."""
    sinks = column_means(operands, piece) > ACT_THRESHOLD
    sinks[:, 0] = False
    return sinks


def exact(operands: Operands, computes: str, piece: Piece, bias: torch.Tensor) -> torch.Tensor:
    """`(h, R, D)` in float64."""
    weights = (logits(operands, piece) + bias).softmax(-1)
    output = weights @ operands.value[piece.batch, piece.group].detach().double()
    gate = gate_of(operands, computes, piece)
    return output if gate is None else output * gate.double()[..., None]


def of_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """SDPA of `(h, R, D)` queries on one kv head's `(Tk, D)`; with a mask, where the bias is nothing else."""
    mask = bias == 0 if bool(((bias == 0) | bias.isinf()).all()) else bias.to(query.dtype)
    heads = query.shape[0]
    key, value, mask = (tensor.expand(1, heads, -1, -1) for tensor in (key, value, mask))
    return scaled_dot_product_attention(query[None], key, value, attn_mask=mask, scale=scale)[0]


def check_rows(operands: Operands, computes: str, outcome: Outcome) -> Check:
    """The output on slices."""
    checks = []
    for piece in pieces(operands):
        sinks = act_sinks(operands, piece) if computes == "act" else None
        bias = logit_bias(operands, computes, piece, sinks)
        truth = exact(operands, computes, piece, bias)
        with torch.no_grad():
            query = operands.query[piece.batch, piece.heads][:, piece.rows]
            key, value = operands.key[piece.batch, piece.group], operands.value[piece.batch, piece.group]
            own = of_torch(query, key, value, bias, operands.rule.scaling)
            gate = gate_of(operands, computes, piece)
            own = own if gate is None else own * gate.to(own.dtype)[..., None]
        found = outcome["output"][piece.batch, piece.heads][:, piece.rows]
        checks.append(Check(difference(found, truth), difference(own, truth)))
    return worst(checks)


def check_gradients(operands: Operands, computes: str, outcome: Outcome) -> Check:
    """The gradients of one kv head and its query heads."""
    piece = whole_piece(operands)
    truth = _exact_gradients(operands, computes, piece)
    own = _gradients_of_torch(operands, computes, piece)
    checks = []
    for name, wanted in truth.items():
        found = _of_piece(outcome[name], name, piece)
        checks.append(Check(difference(found, wanted), difference(own[name], wanted), f"gradient of {name}"))
    return worst(checks)


def _of_piece(gradient: torch.Tensor, name: str, piece: Piece) -> torch.Tensor:
    if name == "gate":
        return gradient[piece.batch][:, piece.heads].T
    return gradient[piece.batch, piece.heads if name == "query" else piece.group]


def _exact_gradients(operands: Operands, computes: str, piece: Piece) -> Mapping[str, torch.Tensor]:
    """Of query `(h, Tq, D)`, key and value `(Tk, D)` and gate `(h, Tq)`, by the softmax's derivative."""
    key, value = (t[piece.batch, piece.group].detach().double() for t in (operands.key, operands.value))
    of_key, of_value, of_query, of_gate = torch.zeros_like(key), torch.zeros_like(value), [], []
    scale = operands.rule.scaling
    for block in blocks(operands, piece):
        query = operands.query[block.batch, block.heads][:, block.rows].detach().double()
        grad = operands.grad[block.batch, block.heads][:, block.rows].double()
        weights = (logits(operands, block) + logit_bias(operands, computes, block)).softmax(-1)
        output, gate = weights @ value, gate_of(operands, computes, block)
        if gate is not None:
            of_gate.append((grad * output).sum(-1) * (gate != 0))
            grad = grad * gate.double()[..., None]
        of_weights = grad @ value.T
        of_logits = weights * (of_weights - (grad * output).sum(-1, keepdim=True)) * scale
        of_query.append(of_logits @ key)
        of_key += (of_logits.mT @ query).sum(0)
        of_value += (weights.mT @ grad).sum(0)
    found = {"query": torch.cat(of_query, 1), "key": of_key, "value": of_value}
    return {**found, "gate": torch.cat(of_gate, 1)} if of_gate else found


def _gradients_of_torch(operands: Operands, computes: str, piece: Piece) -> Mapping[str, torch.Tensor]:
    """The same by torch's own kernel, rows by rows; what the blocks give to keys is summed in float64."""
    key, value = (t[piece.batch, piece.group].detach().requires_grad_() for t in (operands.key, operands.value))
    of_key, of_value = torch.zeros_like(key, dtype=torch.float64), torch.zeros_like(value, dtype=torch.float64)
    of_query, of_gate = [], []
    for block in blocks(operands, piece):
        query = operands.query[block.batch, block.heads][:, block.rows].detach().requires_grad_()
        gate = gate_of(operands, computes, block)
        inputs = [query, key, value]
        output = of_torch(query, key, value, logit_bias(operands, computes, block), operands.rule.scaling)
        if gate is not None:
            inputs.append(gate.clone().requires_grad_())
            output = output * inputs[-1].to(output.dtype)[..., None]
        grads = torch.autograd.grad(output, inputs, operands.grad[block.batch, block.heads][:, block.rows])
        of_query.append(grads[0])
        of_key += grads[1].double()
        of_value += grads[2].double()
        if gate is not None:
            of_gate.append(grads[3] * (gate != 0))
    found = {"query": torch.cat(of_query, 1), "key": of_key, "value": of_value}
    return {**found, "gate": torch.cat(of_gate, 1)} if of_gate else found
