"""What selectors are given, choose and give, and attention to a set of keys loop by loop."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from patchattn.reading.selection import SelectionVariant, narrowed

from .behaviour import close, positions, text
from .families import outputs
from .reference import DIM, HEADS, layer_in_and_out, rotate

Recorded = list[tuple[Any, torch.Tensor, torch.Tensor]]


def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Of every call of a selector: the call, the keys of it that are left `(B, H, Tq, Tk)`, and its output.

    What is added to the logits beside the choice is among the call's facts, as "bias", by key or by query and key.
    """
    found: Recorded = []
    original = SelectionVariant.attend

    def attend(self: Any, call: Any, inner: Any) -> Any:
        output, weights = original(self, call, inner)
        shape = (call.query.shape[0], call.query.shape[1], call.query.shape[2], call.key.shape[2])
        bias = self.key_bias(call)
        if bias is not None:
            call = call.replace(facts={**call.facts, "bias": bias.detach()})
        found.append((call, narrowed(call, self.select(call)).mask.seen().expand(shape), output))
        return output, weights

    monkeypatch.setattr(SelectionVariant, "attend", attend)
    return found


def attended(call: Any, seen: np.ndarray) -> np.ndarray:
    """Attention `(B, Tq, H, D)` to the keys that are seen `(B, H, Tq, Tk)`, loop by loop."""
    query, key, value = (tensor.double().numpy() for tensor in (call.query, call.key, call.value))
    batch, heads, rows, _ = query.shape
    bias = call.facts.get("bias", torch.zeros(1, 1, key.shape[2])).double()
    bias = (bias if bias.dim() == 4 else bias[:, :, None]).expand(batch, -1, rows, -1).numpy()
    result = np.zeros((batch, rows, heads, value.shape[-1]))
    for b, h, i in np.ndindex(batch, heads, rows):
        group, columns = h // (heads // key.shape[1]), np.flatnonzero(seen[b, h, i])
        logits = key[b, group, columns] @ query[b, h, i] * call.scaling
        logits += bias[b, h // (heads // bias.shape[1]), i, columns]
        weights = np.exp(logits - logits.max())
        result[b, i, h] = weights @ value[b, group, columns] / weights.sum()
    return result


def assert_reads(model: nn.Module, tokens: torch.Tensor, reads: Callable[[int, int, int], bool]) -> None:
    """AssertionError unless the first layer of a `tiny_llama` attends to just the keys j of which `reads(head, i, j)`.

    Args:
        model: the model, patched.
        tokens: `(1, T)` what it reads.
        reads: whether token i reads the key of j <= i in a head.
    """
    inputs, got = layer_in_and_out(model, tokens)
    module = model.model.layers[0].self_attn
    query, key, value = projected(module, inputs[0])
    want = []
    for i in range(len(query)):
        heads = []
        for head in range(HEADS):
            group, columns = head // 2, [j for j in range(i + 1) if reads(head, i, j)]
            logits = key[columns, group] @ query[i, head] / np.sqrt(DIM)
            shares = np.exp(logits - logits.max())
            heads.append(shares @ value[columns, group] / shares.sum())
        want.append(module.o_proj.weight.detach().numpy() @ np.concatenate(heads))
    np.testing.assert_allclose(got[0], np.array(want), rtol=1e-5, atol=1e-7)


def scoring_alike(model: nn.Module) -> nn.Module:
    """A `tiny_llama` whose first layer has queries of zeros, for which all keys score 0."""
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    return model


def projected(module: nn.Module, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries `(T, H, D)`, keys and values `(T, Hkv, D)` of the attention of a `tiny_llama`; the first two turned."""
    weights = {name: getattr(module, f"{name}_proj").weight.detach().numpy() for name in "qkv"}
    query, key, value = ((inputs @ weights[name].T).reshape(len(inputs), -1, DIM) for name in "qkv")
    for vectors in (query, key):
        for position, head in np.ndindex(vectors.shape[:2]):
            vectors[position, head] = rotate(vectors[position, head], position)
    return query, key, value


def bound(query: np.ndarray, keys: np.ndarray) -> float:
    """What no product of a query `(D,)` with one of the keys `(n, D)` exceeds, number by number."""
    return sum(max(x * column.min(), x * column.max()) for x, column in zip(query, keys.T, strict=True))


def pages_by_bounds(
    query: np.ndarray, key: np.ndarray, budget: int, page: int, heads: str, first: int = 0
) -> list[list[set[int]]]:
    """Pages that each head of each token reads by Quest's rule, of queries `(T, H, D)` and keys `(T, Hkv, D)`.

    Tokens before `first` are padding.
    """
    group = query.shape[1] // key.shape[1]
    found = []
    for i in range(len(query)):
        own, rows = i // page, []
        for head in range(query.shape[1]):
            kv = head // group
            asking = range(kv * group, (kv + 1) * group) if heads == "kv" else [head]
            some = range(first // page, own)
            bounds = [
                max(bound(query[i, one], key[max(p * page, first) : (p + 1) * page, kv]) for one in asking)
                for p in some
            ]
            others = np.argsort(-np.array(bounds), kind="stable")[: -(-budget // page) - 1] if some else []
            rows.append({own, *(some[n] for n in others)})
        found.append(rows)
    return found


def assert_texts_are_apart(model: nn.Module, side: str) -> None:
    """A text of ten tokens comes out as alone beside padding on that side, and behind another one in its row."""
    tokens = text(14)
    alone = [outputs(model, input_ids=tokens[:1])[0], outputs(model, input_ids=tokens[1:, :10])[0]]
    mask = torch.ones(2, 14, dtype=torch.long)
    real = slice(4, None) if side == "left" else slice(0, 10)
    mask[1] = 0
    mask[1, real] = 1
    ids = tokens.clone()
    ids[1, real] = tokens[1, :10]
    together = outputs(model, input_ids=ids, attention_mask=mask, position_ids=positions(mask))[0]
    close(together[:1], alone[0])
    close(together[1:, real], alone[1])
    packed = torch.cat([tokens[:1], tokens[1:, :10]], dim=1)
    numbers = torch.cat([torch.arange(14), torch.arange(10)])[None]
    together = outputs(model, input_ids=packed, position_ids=numbers, use_cache=False)[0]
    close(together[:, :14], alone[0])
    close(together[:, 14:], alone[1])
