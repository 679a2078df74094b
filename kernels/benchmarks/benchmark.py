"""Workloads for the command `kernels benchmark`: routed and block-sparse attention beside dense attention, masked.

It compares with torch's own result and takes times on the CPU's clock. The benchmark that the figures in the
documentation come from is `patchattn bench`, in the repository of patchattn.
"""

from typing import Any

import torch
from kernels.benchmark import Benchmark
from torch.nn.functional import scaled_dot_product_attention

SINKS, RECENT = 64, 256


class _Operands:
    """A layer of Llama-3-8B's geometry on a GPU, a small one on a CPU. No Benchmark: it has nothing to be timed."""

    seed = 0
    device: str
    kernel: Any

    def operands(self, tokens: int, rows: int, groups: int | None = None) -> None:
        """Random queries of `rows` tokens, keys and values of `tokens`, causal."""
        small = self.device == "cpu"
        heads, dim = (4, 32) if small else (32, 128)
        self.tokens = tokens // 32 if small else tokens
        self.rows = self.tokens if rows == tokens else rows
        dtype = torch.float32 if small else torch.bfloat16

        def draw(count: int, length: int) -> torch.Tensor:
            return torch.randn(1, length, count, dim, device=self.device, dtype=dtype).transpose(1, 2)

        self.query = draw(heads, self.rows)
        self.key, self.value = (draw(groups or heads // 4, self.tokens) for _ in range(2))
        self.rule = self.kernel.AttentionRule(scaling=dim**-0.5, causal=True)

    def dense(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Of torch, with every query head."""
        causal = mask is None and self.rows > 1
        return scaled_dot_product_attention(
            self.query, self.key, self.value, attn_mask=mask, is_causal=causal, enable_gqa=True
        )


class RoutedAttention(_Operands, Benchmark):
    """Every token keeps some of the query heads; the reference computes all of them and applies the gate."""

    def route(self, share: float) -> None:
        scores = torch.rand(1, self.rows, self.query.shape[1], device=self.device)
        kept = scores.topk(int(share * scores.shape[-1]), dim=-1).indices
        self.gate = torch.zeros_like(scores).scatter(-1, kept, 1.0)

    def run(self) -> None:
        self.out = self.kernel.routed_attention(self.query, self.key, self.value, self.gate, self.rule)

    def gated(self) -> torch.Tensor:
        return self.dense() * self.gate.transpose(1, 2)[..., None].to(self.query.dtype)

    def setup_prefill_50(self) -> None:
        self.operands(8192, 8192)
        self.route(0.5)

    def benchmark_prefill_50(self) -> None:
        self.run()

    def verify_prefill_50(self) -> torch.Tensor:
        return self.gated()

    def setup_prefill_100(self) -> None:
        self.operands(8192, 8192)
        self.route(1.0)

    def benchmark_prefill_100(self) -> None:
        self.run()

    def verify_prefill_100(self) -> torch.Tensor:
        return self.gated()

    def setup_decode_50(self) -> None:
        self.operands(16384, 1, groups=4 if self.device == "cpu" else 32)
        self.route(0.5)

    def benchmark_decode_50(self) -> None:
        self.run()

    def verify_decode_50(self) -> torch.Tensor:
        return self.gated()


class BlockSparseAttention(_Operands, Benchmark):
    """Heads that see the first keys and recent ones; the reference is torch's with that mask."""

    def window(self) -> None:
        self.kept = self.kernel.sink_and_recent(SINKS, RECENT, heads=self.query.shape[1], device=self.device)

    def run(self) -> None:
        self.out = self.kernel.block_sparse_attention(self.query, self.key, self.value, self.kept, self.rule)

    def masked(self) -> torch.Tensor:
        key = torch.arange(self.tokens, device=self.device)
        own = key[-self.rows :, None]
        return self.dense((key <= own) & ((key < SINKS) | (own - key < RECENT)))

    def setup_prefill(self) -> None:
        self.operands(16384, 16384)
        self.window()

    def benchmark_prefill(self) -> None:
        self.run()

    def verify_prefill(self) -> torch.Tensor:
        return self.masked()

    def setup_decode(self) -> None:
        self.operands(32768, 1)
        self.window()

    def benchmark_decode(self) -> None:
        self.run()

    def verify_decode(self) -> torch.Tensor:
        return self.masked()
