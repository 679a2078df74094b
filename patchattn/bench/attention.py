"""What the problems of attention share: dense SDPA under each of its backends, FlexAttention, gradients."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .cases import Case
from .operands import Operands, make_operands
from .problem import Check, Implementation, Outcome, Problem, UnavailableError, worst
from .truth import check_gradients, check_rows

BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DENSE = tuple(BACKENDS)
# FlexAttention by its own choice, and by each of its back ends that makes another kernel
FLEX = {"FlexAttention": "", "FlexAttention (flash)": "FLASH", "FlexAttention (decoding)": "TRITON_DECODE"}
# What torch says where no kernel of the allowed backends takes a call.
NO_KERNEL = ("No available kernel", "No viable backend", "not supported", "requires compute capability")
BACKWARD = 2.5  # of the forward's FLOPs: five products of a tile instead of two


class AttentionProblem(Problem):
    """One call of attention, with its gradients in training."""

    implementations: ClassVar[Sequence[Implementation]]

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.operands = make_operands(case, device)

    @property
    def passes(self) -> float:
        """FLOPs of what is timed over those of its forward."""
        return 1.0 + BACKWARD if self.operands.trains else 1.0

    def check(self, computes: str, outcome: Outcome) -> Check:
        checks = [check_rows(self.operands, computes, outcome)]
        if self.operands.trains:
            checks.append(check_gradients(self.operands, computes, outcome))
        return worst(checks)


def step(operands: Operands, attend: Callable[[], torch.Tensor], *, gated: bool = False) -> Callable[[], Outcome]:
    """What is timed: the forward, and in training the backward to query, key, value and, if it has one, the gate."""
    if not operands.trains:

        def forward() -> Outcome:
            with torch.no_grad():
                return {"output": attend()}

        return forward
    leaves = {"query": operands.query, "key": operands.key, "value": operands.value}
    if gated and operands.gate is not None:
        leaves["gate"] = operands.gate

    def both() -> Outcome:
        output = attend()
        grads = torch.autograd.grad(output, list(leaves.values()), operands.grad)
        return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}

    return both


def dense(operands: Operands, *, repeat: bool = False, mask: torch.Tensor | None = None) -> torch.Tensor:
    """SDPA; with one query row every key is seen, and no mask is needed.

    Args:
        operands: of the call.
        repeat: kv heads are repeated, for kernels that take no groups.
        mask: instead of the rule.
    """
    key, value, share = operands.key, operands.value, operands.heads_per_group
    if repeat and share > 1:
        key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    return scaled_dot_product_attention(
        operands.query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and operands.rule.causal and operands.query.shape[2] > 1,
        scale=operands.rule.scaling,
        enable_gqa=share > 1 and not repeat,
    )


def no_kernel(error: Exception) -> bool:
    """Whether torch says that no kernel of the allowed backends takes a call."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_KERNEL)


def dense_under(name: str) -> Implementation:
    """Dense SDPA, by one backend alone; where it takes no groups, kv heads are repeated in what is timed."""
    backend = BACKENDS[name]

    def make(problem: AttentionProblem) -> Callable[[], Outcome]:
        if problem.device.type == "cpu" and backend is not SDPBackend.FLASH_ATTENTION:
            raise UnavailableError("torch has it for GPUs only")

        def attend(repeat: bool) -> torch.Tensor:
            with sdpa_kernel(backend):
                return dense(problem.operands, repeat=repeat)

        as_it_is, repeated = (step(problem.operands, partial(attend, repeat)) for repeat in (False, True))
        try:
            as_it_is()
        except RuntimeError as error:
            if problem.operands.heads_per_group == 1 or not no_kernel(error):
                raise
            return repeated
        return as_it_is

    return Implementation(name, make, "dense")


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """A function under torch.compile, for one shape; never silently as it was, after too many shapes or a break.

    Args:
        function: which.
        options: of torch.compile.
    """
    return torch.compile(function, dynamic=False, fullgraph=True, **options)


def flex(
    operands: Operands, visible: Callable[..., torch.Tensor], *, batch: int | None, heads: int | None, backend: str = ""
) -> Any:
    """A function that runs FlexAttention with a mask, tuned; its block mask is made here, before anything is timed.

    Args:
        operands: of the call.
        visible: FlexAttention's mask function.
        batch: number of rows where the mask differs between them, else `None`.
        heads: number of heads where the mask differs between them, else `None`.
        backend: of FlexAttention; its own choice by default.

    Raises:
        UnavailableError: where it would not be compiled to a fast kernel.
    """
    if operands.query.device.type != "cuda":
        raise UnavailableError("compared on GPUs only")
    decodes = operands.query.shape[2] == 1
    if backend and (backend == "TRITON_DECODE") != decodes:
        raise UnavailableError(f"a back end for {'prefills' if decodes else 'decoding'}")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, keys = operands.query.shape[2], operands.key.shape[2]
    made = torch.compile(create_block_mask)(visible, batch, heads, rows, keys, device=operands.query.device.type)
    return partial(
        compiled(flex_attention, mode="max-autotune-no-cudagraphs"),
        operands.query,
        operands.key,
        operands.value,
        block_mask=made,
        scale=operands.rule.scaling,
        enable_gqa=operands.heads_per_group > 1,
        kernel_options={"BACKEND": backend} if backend else None,
    )


def ran_triton(kernel: str, device: torch.device) -> bool:
    """Whether Triton's kernel of an operation is what ran: its module is imported where it first does."""
    import sys

    from patchattn_kernels.backend import triton_runs

    return f"patchattn_kernels.{kernel}_triton" in sys.modules and triton_runs(torch.empty(0, device=device))
