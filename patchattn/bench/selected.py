"""Selected pages in decoding: ours beside dense attention, a copy of the pages, and FlashInfer's kernel for pages."""

from collections.abc import Callable
from dataclasses import replace

import torch

from patchattn_kernels import selected_attention

from .attention import DENSE, AttentionProblem, dense, dense_under, step
from .installed import INSTALLED, module_of
from .operands import PAGE
from .problem import OURS, Implementation, Outcome, UnavailableError, Work

WORKSPACE = 128 * 2**20  # bytes, as FlashInfer's documentation has it


def ours(problem: "SelectedProblem") -> Callable[[], Outcome]:
    """The operation; which pages there are is known beforehand, as for all others."""
    o, pages = problem.operands, problem.operands.given_pages
    counts = torch.full(pages.shape[:2], pages.shape[2], device=pages.device)
    return step(o, lambda: selected_attention(o.query, o.key, o.value, pages, counts, PAGE, o.rule)[0])


def copied(problem: "SelectedProblem") -> Callable[[], Outcome]:
    """SDPA over a copy of the pages, which is made in every call: each token has others."""
    o = problem.operands
    keys = (o.given_pages[..., None] * PAGE + torch.arange(PAGE, device=o.key.device)).flatten(2)[..., None]

    def run() -> torch.Tensor:
        return dense(replace(o, key=o.key.take_along_dim(keys, 2), value=o.value.take_along_dim(keys, 2)))

    return step(o, run)


def flashinfer(problem: "SelectedProblem") -> Callable[[], Outcome]:
    """FlashInfer, each kv head a sequence of its own; keys laid out by kv heads and the plan made beforehand.

    A plan needs the number of pages on the host. While generating it is made for every token and layer; here that
    takes no time.
    """
    o, library = problem.operands, module_of("flashinfer")
    if library is None:
        raise UnavailableError("flashinfer is not installed")
    (batch, groups, keys, dim), device = o.key.shape, o.key.device
    lines, per_line = batch * groups, o.given_pages.shape[2]
    first = torch.arange(lines, device=device).view(batch, groups, 1) * (keys // PAGE)
    indices = (o.given_pages + first).flatten().int()
    ends = torch.arange(lines + 1, dtype=torch.int32, device=device) * per_line
    whole = torch.full((lines,), PAGE, dtype=torch.int32, device=device)
    cache = tuple(tensor.contiguous().view(-1, PAGE, 1, dim) for tensor in (o.key, o.value))
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=o.heads_per_group > 1)
    kinds = {"q_data_type": o.query.dtype, "kv_data_type": o.key.dtype}
    wrapper.plan(ends, indices, whole, o.heads_per_group, 1, dim, PAGE, sm_scale=o.rule.scaling, **kinds)

    def run() -> torch.Tensor:
        output: torch.Tensor = wrapper.run(o.query.reshape(lines, o.heads_per_group, dim), cache)
        return output.view(o.query.shape)

    return step(o, run)


class SelectedProblem(AttentionProblem):
    """Attention of one query to some whole pages of keys, others for every kv head."""

    implementations = (
        Implementation("patchattn", ours, "selected", kernel="selected_attention", leeway=OURS),
        *map(dense_under, DENSE),
        Implementation("SDPA over copied pages", copied, "selected"),
        Implementation("FlashInfer over pages", flashinfer, "selected"),
        *INSTALLED,
    )

    def work(self) -> Work:
        o = self.operands
        keys, dim = o.given_pages.shape[2] * PAGE, o.key.shape[3]
        read = 2.0 * o.key.shape[0] * o.key.shape[1] * keys * dim * o.key.element_size()
        pairs = float(o.query.shape[0] * o.query.shape[1] * keys)
        return Work(4.0 * pairs * dim, read + 2.0 * o.query.nbytes)
