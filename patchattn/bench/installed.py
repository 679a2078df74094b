"""Dense attention of libraries that are compared where they are installed, and never required."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from .attention import AttentionProblem, step
from .problem import Implementation, Outcome, UnavailableError

HUB = "kernels-community/flash-attn3"


def flash_attention(problem: AttentionProblem) -> Callable[[], Outcome]:
    """FlashAttention 4 or 3 as a package, or 3 from the Hub where the library `kernels` is installed."""
    o = problem.operands
    attend = _flash_function()

    def run() -> torch.Tensor:
        states = (tensor.transpose(1, 2) for tensor in (o.query, o.key, o.value))
        found = attend(*states, softmax_scale=o.rule.scaling, causal=o.rule.causal)
        output: torch.Tensor = found[0] if isinstance(found, tuple) else found  # some give the log-sum-exp besides
        return output.transpose(1, 2)

    return step(o, run)


def _flash_function() -> Callable[..., Any]:
    for name in ("flash_attn.cute", "flash_attn_interface"):
        module = module_of(name)
        if module is not None:
            return module.flash_attn_func
    get_kernel = getattr(module_of("kernels"), "get_kernel", None)  # a checkout has a folder of that name
    if get_kernel is None:
        raise UnavailableError("neither flash_attn.cute, flash_attn_interface nor the library kernels is installed")
    try:
        return get_kernel(HUB).flash_attn_func
    except Exception as error:
        raise UnavailableError(f"kernels has no {HUB} for this device: {error}") from error


def flashinfer(problem: AttentionProblem) -> Callable[[], Outcome]:
    """FlashInfer, of one sequence."""
    o, module = problem.operands, module_of("flashinfer")
    if module is None:
        raise UnavailableError("flashinfer is not installed")
    if o.trains or o.query.shape[0] > 1:
        raise UnavailableError("compared in the forward of one sequence")

    def run() -> torch.Tensor:
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (o.query, o.key, o.value))
        how = {"sm_scale": o.rule.scaling, "kv_layout": "NHD"}
        if len(query) == 1:
            output = module.single_decode_with_kv_cache(query[0], key, value, **how)[None]
        else:
            output = module.single_prefill_with_kv_cache(query, key, value, causal=o.rule.causal, **how)
        return output.transpose(0, 1)[None]

    return step(o, run)


def module_of(name: str) -> Any:
    """A module, or `None` where it is not installed or does not load here."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


INSTALLED = (
    Implementation("FlashAttention 3 or 4", flash_attention, "dense"),
    Implementation("FlashInfer", flashinfer, "dense"),
)
