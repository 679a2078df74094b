"""Variants that act on logits: a second branch runs beside the model's own, with a kv cache of its own.

A decoding variant is reached through hooks on modules of the model, so that whatever generates with the model uses it
and no line of `generate` is copied. The logits are changed where the model returns them: before every logits processor,
and before beam search normalises them. The branch's cache lives in the model's own cache object, behind its layers, and
follows it through beam reordering, cropping and a second turn.
"""

import copy
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ..core.call import AttentionCall
from ..core.given import real_tokens
from ..core.hooks import Hook, image_tokens_known, unknown_ids
from ..core.kv_caches import cache_argument, find_cache
from ..core.renaming import Renaming
from ..core.sites import AttentionSite
from ..core.variant import Attend, AttentionOutput, Variant
from ..vision.images import is_replaced

# .token_ids, .step, .unfilled: of the forward that runs in this thread, and the layers of its new cache as they were
# given; .inside: it is a branch's own.
_local = threading.local()


@dataclass(eq=False)
class Step:
    """What one forward brings to the language model.

    Attributes:
        token_ids: `(B', T)` ids of the tokens; fewer rows than embeddings where these were repeated for beams.
        embeddings: `(B, T, E)` those tokens, image tokens in place.
        real: `(B, T)` bool: which are no padding.
        is_first: nothing precedes them.
        embedding: what the model embeds ids with.
    """

    token_ids: torch.Tensor
    embeddings: torch.Tensor
    real: torch.Tensor
    is_first: bool
    embedding: nn.Module

    def where(self, token_id: int) -> torch.Tensor:
        """`(B, T)` bool: the tokens of that id; behind a prompt, without those that the model wrote itself."""
        found = self.token_ids == token_id
        found = found.repeat_interleave(len(self.embeddings) // len(found), dim=0).to(self.embeddings.device)
        if self.is_first or not bool(found.any()):
            return found
        with _inside_branch():
            return found & is_replaced(self.embeddings, token_id, self.embedding)


@dataclass(eq=False)
class BranchStep:
    """What the branch gets instead.

    Attributes:
        embeddings: `(B, T', E)`.
        real: `(B, T')` bool.
        source: `(B, T)` which token of the branch corresponds to a token of the step, -1 where none does.
        image: `(B, T')` bool, which are image tokens.
    """

    embeddings: torch.Tensor
    real: torch.Tensor
    source: torch.Tensor
    image: torch.Tensor


class BranchTokens(DynamicLayer):
    """Which tokens of the branch are real, as keys `(B, 1, T, 1)` bool; the branch's own layers come behind it."""


class DecodingVariant(Variant):
    """A variant that changes logits; it attaches itself to the attention modules it wants to see, if only one.

    A subclass gives `fit`, which chooses those, `branch` and `combine`. Like every variant it holds no reference to a
    module.
    """

    kind = "decoding"
    attends = False
    acts_on_logits = True
    generator = ""  # module whose output holds the logits; set by `prepare`

    def rename(self, site: AttentionSite, config: Any, renaming: Renaming) -> None:
        generator = renaming(self.generator)
        super().rename(site, config, renaming)
        self.generator = generator

    def prepare(self, model: nn.Module) -> None:
        if model.get_submodule(self.generator).config.is_encoder_decoder:  # type: ignore[union-attr]
            raise NotImplementedError(f"{type(self).__name__} needs a decoder-only language model.")
        if not model.can_generate():  # type: ignore[operator]
            raise NotImplementedError(f"{type(model).__name__} has no language modelling head to decode with.")

    def hooks(self, model: nn.Module) -> list[Hook]:
        generator: Any = model.get_submodule(self.generator)
        return [
            Hook(model, "before", self.before_model),
            Hook(generator.get_input_embeddings(), "before", self.before_embedding),
            Hook(generator.get_decoder(), "before", self.before_decoder),
            Hook(generator, "after", self.after_generator),
            Hook(model, "finally", self.after_model),
        ]

    def branch(self, step: Step) -> BranchStep:
        """The branch's tokens for the tokens of this step."""
        raise NotImplementedError(f"{type(self).__name__} must define branch(step).")

    def combine(self, logits: torch.Tensor, branch_logits: torch.Tensor) -> torch.Tensor:
        """New logits `(..., V)` from those of the model and of the branch."""
        raise NotImplementedError(f"{type(self).__name__} must define combine(logits, branch_logits).")

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        return inner(call)

    @property
    def is_active(self) -> bool:
        """Whether hooks have something to do: not within the branch itself."""
        return not getattr(_local, "inside", False)

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_active and _arguments(module, args, kwargs).get("labels") is not None:
            raise ValueError(
                f"{type(self).__name__} changes the logits that tokens are chosen by, which no loss is defined on. "
                "Compute losses under `with patchattn.unpatched(model):`."
            )

    def before_embedding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input")
        if self.is_active and isinstance(ids, torch.Tensor) and ids.dim() == 2:
            _local.token_ids = ids

    def before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.is_active:
            return
        given = _arguments(module, args, kwargs)
        cache, embeddings = find_cache([*args, *kwargs.values()]), given.get("inputs_embeds")
        if getattr(cache, "is_compileable", False):
            raise NotImplementedError(f"{type(self).__name__} does not support static kv caches; use a dynamic one.")
        embedding = module.get_input_embeddings()  # type: ignore[operator]
        if embeddings is None:
            embeddings = embedding(given["input_ids"])
        ids, (rows, length) = getattr(_local, "token_ids", None), embeddings.shape[:2]
        if ids is None or ids.shape[1] != length or rows % max(len(ids), 1):
            raise unknown_ids(type(self).__name__, embedding, self.before_embedding)
        past = 0 if cache is None else int(cache.get_seq_length())
        where = {"queries": length, "keys": past + length, "device": embeddings.device}
        real = real_tokens(given.get("attention_mask"), **where).expand(rows, -1).to(embeddings.device)
        _local.step = Step(ids, embeddings, real, past == 0, embedding)
        _local.unfilled = None if cache is None or past else copy.deepcopy(cache.layers)

    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Let go of what this forward has noted, also where it failed."""
        if self.is_active:
            vars(_local).clear()

    def after_generator(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.is_active:
            return None
        step: Step = vars(_local).pop("step")
        values = list(output) if isinstance(output, tuple) else list(output.values())
        cache, unfilled = find_cache(values), vars(_local).pop("unfilled")
        branch = None if cache is None else _branch_of(cache, module, step, unfilled)
        inputs = self.branch(step)
        keep = _arguments(module, args, kwargs).get("logits_to_keep", 0)
        logits = values[0]  # without labels there is no loss before them
        branch_logits = _run_branch(module, inputs, branch, keep if isinstance(keep, int) else 0)
        source = inputs.source[:, -keep:] if isinstance(keep, int) else inputs.source[:, keep]
        rows = source - (inputs.real.shape[1] - branch_logits.shape[1])
        aligned = branch_logits.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, logits.shape[-1]))
        # The difference of two half-precision logits, amplified, would be noise.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        combined = self.combine(logits.to(dtype), aligned.to(dtype))
        combined = torch.where((source >= 0)[..., None], combined, logits.to(dtype))
        if isinstance(output, tuple):
            return (combined, *output[1:])
        output.logits = combined
        return output


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """By name, what a module is called with: some models hand tokens and masks on by place."""
    return {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}


def _branch_of(cache: Cache, module: nn.Module, step: Step, unfilled: list[Any] | None) -> tuple[BranchTokens, Cache]:
    """The branch's part of a cache, made when the cache is new, of layers like those that the model was `unfilled`
    given: of the same kind, and with what was asked of them, such as to keep what assisted decoding may take back."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, BranchTokens):
            step.is_first = layer.get_seq_length() == 0
            return layer, Cache(layers=cache.layers[index + 1 :])
    if not step.is_first:
        raise ValueError(
            "This kv cache was filled before the model was patched, or by prefix tuning: it lacks the second branch. "
            "Start with a new one, without a prefix."
        )
    if unfilled is None:  # the model has made its cache itself
        unfilled = DynamicCache(config=module.config).layers
    elif not unfilled:  # a cache that makes its layers when they are filled
        unfilled = [type(layer)() for layer in cache.layers]
    tokens = BranchTokens()
    cache.layers += [tokens, *unfilled]
    return tokens, Cache(layers=unfilled)


def _run_branch(
    module: nn.Module, inputs: BranchStep, branch: tuple[BranchTokens, Cache] | None, keep: int
) -> torch.Tensor:
    """`(B, n, V)` logits of the branch's last n tokens, of all if `keep` is 0. Positions count real tokens only."""
    real, cache = inputs.real, None
    if branch is not None:
        tokens, cache = branch
        seen = inputs.real[:, None, :, None]
        real = tokens.update(seen, seen)[0][:, 0, :, 0]
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs.real.shape[1] :]
    with _inside_branch(), image_tokens_known(inputs.image):
        return module(
            inputs_embeds=inputs.embeddings,
            attention_mask=real.long(),
            position_ids=positions,
            **cache_argument(module, cache),
            use_cache=cache is not None,
            logits_to_keep=min(keep, inputs.real.shape[1]),
            return_dict=True,
        ).logits


@contextmanager
def _inside_branch() -> Iterator[None]:
    _local.inside = True
    try:
        yield
    finally:
        _local.inside = False
