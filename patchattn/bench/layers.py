"""A whole attention layer and a whole decoder or encoder layer of a model: projections, norms and all."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as tf
from torch import nn
from torch.nn.attention import sdpa_kernel
from transformers import AttentionInterface

from patchattn_kernels.backend import SETTING

from ..core import patching
from .attention import BACKENDS
from .cases import Case
from .operands import generator
from .problem import OURS, Check, Implementation, Outcome, Problem, Work, difference

EXACT = "bench_float64"  # name of an attention implementation of transformers
WEIGHTS = 2**25  # attention weights held at a time
VARIANTS: dict[str, dict[str, Any]] = {"moh": {}, "act": {"preset": "released_code"}}


def exact_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in float64 in transformers' form: `(B, T, H, D)` in the dtype of the query; the mask is bool if any."""
    batch, heads, rows, dim = query.shape
    key, value = (t.double().repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    places, outputs = torch.arange(rows, device=query.device), []
    for part in places.split(max(1, WEIGHTS // (batch * heads * rows))):
        logits = query[:, :, part].double() @ key.mT * (dim**-0.5 if scaling is None else scaling)
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask[:, :, part], float("-inf"))
        outputs.append(logits.softmax(-1) @ value)
    return torch.cat(outputs, dim=2).transpose(1, 2).to(query.dtype), None


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Within this block, the operations of patchattn_kernels are computed by plain torch."""
    before = os.environ.get(SETTING)
    os.environ[SETTING] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SETTING]
        else:
            os.environ[SETTING] = before


def patched(problem: "LayerProblem") -> Callable[[], Outcome]:
    """The patched layer."""
    return problem.step(problem.model(patched=True))


def plain(problem: "LayerProblem") -> Callable[[], Outcome]:
    """The patched layer with plain torch: MoH then gates what SDPA computed, as its released code does."""
    run = problem.step(problem.model(patched=True))

    def step() -> Outcome:
        with plain_kernels():
            return run()

    return step


def unpatched(name: str) -> Implementation:
    """The layer as it is, with one backend of SDPA."""

    def make(problem: "LayerProblem") -> Callable[[], Outcome]:
        run = problem.step(problem.model(patched=False))

        def step() -> Outcome:
            with sdpa_kernel(BACKENDS[name]):
                return run()

        return step

    return Implementation(name, make, "dense")


class LayerProblem(Problem):
    """A layer with random weights; cases are named after the variant and the part, such as `moh_layer`.

    The truth is the same layer with attention in float64 between its own projections: a token's heads are then routed
    alike, which float64 projections would not do where two heads score almost the same.
    """

    implementations = (
        Implementation("patchattn", patched, "variant", kernel="layer", leeway=OURS),
        unpatched("SDPA flash"),
        Implementation("plain torch", plain, "variant"),
    )

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.variant, self.part = case.op.split("_")
        AttentionInterface.register(EXACT, exact_attention)
        self.dtype = getattr(torch, case.dtype)
        self.base = self._build()  # on the CPU: the device holds the copy that is timed, and no other
        shape = (case.batch, case.tokens, case.geometry.hidden)
        self.hidden = torch.randn(*shape, device=device, generator=generator(case, device)).to(self.dtype)
        self._truths: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def _build(self) -> Any:
        shape = self.case.geometry
        sizes = {
            "hidden_size": shape.hidden,
            "intermediate_size": shape.inner,
            "num_attention_heads": shape.query_heads,
            "num_hidden_layers": 1,
            "attn_implementation": "sdpa",
        }
        torch.manual_seed(0)
        if shape.family == "llama":
            heads = {"num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
            longest = {"max_position_embeddings": self.case.tokens, "vocab_size": 32}
            model = tf.LlamaModel(tf.LlamaConfig(**sizes, **heads, **longest))
        elif shape.family == "bert":
            model = tf.BertModel(tf.BertConfig(**sizes, vocab_size=32), add_pooling_layer=False)
        else:
            model = tf.ViTModel(tf.ViTConfig(**sizes), add_pooling_layer=False)
        return model.to(self.dtype).eval()

    def model(self, *, patched: bool, implementation: str = "sdpa") -> Any:
        """A copy of the model."""
        model = copy.deepcopy(self.base).to(self.device)
        model.config._attn_implementation = implementation
        if patched:
            settings = {"active_ratio": self.case.active} if self.variant == "moh" else VARIANTS[self.variant]
            patching.patch_model(model, self.variant, settings)
        return model

    def step(self, model: Any, *, masked: bool = False) -> Callable[[], Outcome]:
        """A function that runs the timed part of a model once; `masked` spells out the mask of causal attention."""
        layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        layer: Any = layers[0]
        arguments: dict[str, Any] = {}
        if self.case.geometry.family == "llama":
            positions = torch.arange(self.case.tokens, device=self.device)[None].expand(self.case.batch, -1)
            with torch.no_grad():
                rotary = model.rotary_emb(self.hidden, positions)
            places = positions[0]
            mask = (places <= places[:, None])[None, None] if masked else None
            arguments = {"position_embeddings": rotary, "attention_mask": mask}
            layer = layer.self_attn if self.part == "attention" else layer

        def run() -> Outcome:
            with torch.no_grad():
                given = layer(self.hidden, **arguments)
            return {"output": given[0] if isinstance(given, tuple) else given}

        return run

    def work(self) -> Work:
        """All projections but the outputs of heads that are not selected; attention of those that are."""
        case, shape = self.case, self.case.geometry
        tokens, inner = case.batch * case.tokens, shape.query_heads * shape.head_dim
        kept = case.active if self.variant == "moh" else 1.0
        seen = (case.tokens + 1) / 2 if shape.causal else case.tokens
        passes = 1.5 if self.variant == "act" else 1.0
        attention = 4.0 * tokens * seen * inner * kept * passes
        weights = shape.hidden * (inner * (1.0 + kept) + 2.0 * shape.kv_heads * shape.head_dim)
        if self.part == "layer":
            weights += shape.hidden * shape.inner * (3.0 if shape.family == "llama" else 2.0)
        size = self.hidden.element_size()
        return Work(2.0 * tokens * weights + attention, (weights + 2.0 * tokens * shape.hidden) * size)

    def check(self, computes: str, outcome: Outcome) -> Check:
        """Against attention in float64; torch's own error is that of SDPA with plain torch around it."""
        if computes not in self._truths:
            variant = computes == "variant"
            with plain_kernels():
                truth = self.step(self.model(patched=variant, implementation=EXACT), masked=True)()["output"]
                own = self.step(self.model(patched=variant))()["output"]
            self._truths[computes] = (truth.cpu(), own.cpu())
        truth, own = (tensor.to(self.device, torch.float64) for tensor in self._truths[computes])
        return Check(difference(outcome["output"], truth), difference(own, truth))
