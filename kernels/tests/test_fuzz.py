"""Random calls of every operation, forward and backward, by Triton's interpreter against dense softmax in float64."""

import math
import random
from typing import Any

import pytest
import torch

from patchattn_kernels import (
    AttentionRule,
    block_sparse_attention,
    block_sparse_attention_backward_triton,
    block_sparse_attention_triton,
    column_mass,
    column_mass_few_triton,
    column_mass_triton,
    decoding_triton,
    lists_from_mask,
    routed_attention,
    routed_attention_triton,
    routed_pairs_triton,
    selected_attention,
    sink_and_recent,
    split_attention,
    split_attention_backward_triton,
    split_attention_keys_triton,
    split_attention_triton,
)
from patchattn_kernels.tuning import Launch

CASES = 60  # of each operation
TILED = (
    block_sparse_attention_triton,
    block_sparse_attention_backward_triton,
    column_mass_few_triton,
    column_mass_triton,
    routed_attention_triton,
    routed_pairs_triton,
    split_attention_backward_triton,
    split_attention_keys_triton,
    split_attention_triton,
)
Tensors = list[torch.Tensor]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton runs, with tiles so small that a few tokens fill several."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    for module in TILED:
        monkeypatch.setattr(module, "launches", lambda *_: [Launch({"BLOCK_M": 16, "BLOCK_N": 16})])
    monkeypatch.setattr(decoding_triton, "launches", lambda *_: [Launch({"BLOCK_N": 16})])


class Call:
    """Random operands and a random rule; what it shows is worked out from indices."""

    def __init__(self, seed: int, *, own_keys: bool) -> None:
        self.random = random.Random(seed)
        pick, self.generator = self.random.randint, torch.Generator().manual_seed(seed)
        self.batch, self.groups, self.repeats = pick(1, 2), pick(1, 3), pick(1, 4)
        self.heads = self.groups * self.repeats
        self.queries = self.random.choice([1, 1, 2, 5, 17, 33])
        self.keys = self.queries + pick(0, 40)
        dim, width = pick(3, 20), pick(3, 20)
        shapes = [(self.heads, self.queries, dim), (self.groups, self.keys, dim), (self.groups, self.keys, width)]
        self.states = [self.normal(self.batch, *shape).requires_grad_() for shape in shapes]
        self.scaling = self.random.uniform(0.1, 1.0)
        offset = self.keys - self.queries
        if not own_keys and self.random.random() < 0.3:
            offset = pick(-3, self.keys)
        how: dict[str, Any] = {"offset": offset, "causal": self.random.random() < 0.7}
        distance = torch.arange(self.queries)[:, None] + offset - torch.arange(self.keys)
        seen = (distance >= 0) | (not how["causal"])
        kind = self.random.choice(["none", "window", "padding", "rows"])
        if kind == "window":
            how["window"] = pick(1, 30)
            seen = seen & (distance.abs() < how["window"])
        seen = seen.expand(self.batch, -1, -1)
        if kind == "padding" and not own_keys:
            how["mask"] = self.coins(0.7, self.batch, self.keys)
            seen = seen & how["mask"][:, None]
        if kind == "rows" and not own_keys:
            seen = self.coins(0.5, self.batch, self.queries, self.keys)
            how = {"mask": seen[:, None], "offset": offset}
        self.offset, self.distance, self.seen = offset, distance, seen[:, None].expand(-1, self.heads, -1, -1)
        self.rule = AttentionRule(self.scaling, **how)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def coins(self, share: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator) < share

    def dense(self, states: Tensors, seen: torch.Tensor) -> Tensors:
        """Weights, values of every query head, and log-sum-exp; zeros and -inf where a query sees nothing."""
        query, key, value = states
        key, value = key.repeat_interleave(self.repeats, 1), value.repeat_interleave(self.repeats, 1)
        some = seen.any(-1)
        logits = (query @ key.mT * self.scaling).masked_fill(~seen & some[..., None], -math.inf)
        weights = logits.softmax(-1) * some[..., None]
        return [weights, value, torch.where(some, logits.logsumexp(-1), -math.inf)]

    def check(self, got: Tensors, exact: Tensors, wanted: Tensors, inputs: Tensors, exact_inputs: Tensors) -> None:
        for some, exactly in zip(got, wanted, strict=True):
            torch.testing.assert_close(some.double(), exactly, rtol=1e-5, atol=1e-5)
        upstream = [self.normal(*tensor.shape) for tensor in wanted]

        def gradients(outputs: Tensors, of: Tensors) -> Any:
            live = [tensor.masked_fill(~tensor.isfinite(), 0.0) for tensor in outputs]
            total = sum(((a * b).sum() for a, b in zip(live, upstream, strict=True)), torch.zeros(()))
            return torch.autograd.grad(total, of)

        for some, exactly in zip(gradients(got, inputs), gradients(exact, exact_inputs), strict=True):
            torch.testing.assert_close(some.double(), exactly, rtol=1e-4, atol=1e-4)


def run(operation: str, call: Call) -> None:
    exact = [state.detach().double().requires_grad_() for state in call.states]
    inputs, exact_inputs, seen = [*call.states], [*exact], call.seen
    if operation == "routed":
        gate = call.normal(call.batch, call.queries, call.heads).abs()
        gate = (gate * call.coins(0.5, *gate.shape)).requires_grad_()
        got = [routed_attention(*call.states, gate, call.rule)]
        exact_gate = gate.detach().double().requires_grad_()
        weights, value, _ = call.dense(exact, seen)
        wanted = [weights @ value * exact_gate.transpose(1, 2)[..., None]]
        # a gate that is closed gets no gradient
        open_gate = (gate != 0).double()
        exact_gate.register_hook(lambda gradient: gradient * open_gate)
        inputs, exact_inputs = [*inputs, gate], [*exact_inputs, exact_gate]
    elif operation == "split":
        key_set = call.coins(0.3, call.batch, call.heads, call.keys)
        got = list(split_attention(*call.states, key_set, call.rule))
        weights, value, lse = call.dense(exact, seen)
        chosen = weights * key_set[:, :, None]
        wanted = [weights @ value, chosen @ value, chosen.sum(-1), lse]
    elif operation == "column mass":
        real = call.coins(0.8, call.batch, call.queries)
        got = list(column_mass(call.states[0], call.states[1], call.rule, real=real))
        weights, _, lse = call.dense(exact, seen)
        wanted = [(weights * real[:, None, :, None]).sum(2), lse]
        inputs, exact_inputs = inputs[:2], exact_inputs[:2]
    elif operation == "block":
        if call.random.random() < 0.5:
            sinks = [call.random.randint(0, 9) for _ in range(call.heads)]
            recent = [call.random.randint(1, 20) for _ in range(call.heads)]
            keep: Any = sink_and_recent(sinks, recent, call.heads)
            first, last = (torch.tensor(sizes)[:, None, None] for sizes in (sinks, recent))
            kept = (torch.arange(call.keys) < first) | (call.distance.abs() < last)
        else:
            tiles = -(-call.queries // 16), -(-call.keys // 16)
            blocks = call.coins(0.5, call.batch, call.random.choice([1, call.heads]), *tiles)
            keep = lists_from_mask(blocks, 16, 16)
            kept = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, : call.queries, : call.keys]
        got = list(block_sparse_attention(*call.states, keep, call.rule, return_lse=True))
        weights, value, lse = call.dense(exact, seen & kept)
        wanted = [weights @ value, lse]
    else:
        page = call.random.choice([1, 3, 8, 16, 50])
        number = -(-call.keys // page)
        order = torch.stack([torch.randperm(number, generator=call.generator) for _ in range(call.batch * call.groups)])
        pages = order.view(call.batch, call.groups, number)
        counts = torch.randint(0, number + 1, (call.batch, call.groups), generator=call.generator)
        got = list(selected_attention(*call.states, pages, counts, page, call.rule))
        listed = pages.argsort(-1) < counts[..., None]  # a page's place in the list
        kept = listed.repeat_interleave(page, -1)[..., : call.keys].repeat_interleave(call.repeats, 1)[:, :, None]
        weights, value, lse = call.dense(exact, seen & kept)
        wanted = [weights @ value, lse]
    call.check(got, wanted, [tensor.detach() for tensor in wanted], inputs, exact_inputs)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("operation", ["routed", "split", "block", "column mass", "selected"])
def test_random_calls(operation: str) -> None:
    done, seed = 0, 0
    while done < CASES:
        seed += 1
        call = Call(seed, own_keys=operation == "block")
        if operation == "selected" and call.queries * call.repeats > 64:
            continue  # more than the kernel takes
        try:
            run(operation, call)
        except AssertionError as error:
            raise AssertionError(f"{operation}, seed {seed}: {error}") from error
        done += 1
