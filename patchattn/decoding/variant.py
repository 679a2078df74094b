"""Variants that act on logits: branches run beside the model's own, each with a kv cache of its own.

A decoding variant is reached through hooks on modules of the model, so that whatever generates with the model uses it
and no line of `generate` is copied. The logits are changed where the model returns them: before every logits processor,
and before beam search normalises them. The branches' caches live in the model's own cache object, behind its layers,
and follow it through beam reordering, cropping and a second turn.

A branch that forks takes the keys and values of some first tokens from the model, which saves computing them. It saves
no memory: a cache's `update` concatenates, so that after one token each branch holds keys of its own, whose bytes
`patchattn.cache_report` tells.
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from transformers import Cache, DynamicCache

from ..cache.branch_tokens import BranchTokens
from ..cache.tracked import only_holds
from ..core.call import AttentionCall
from ..core.given import real_tokens
from ..core.hooks import Hook, called_with, note_token_ids, unknown_ids
from ..core.kv_caches import cache_argument, find_cache
from ..core.renaming import Renaming
from ..core.run import RUN, ModelRun, current_run, end_run, running
from ..core.sites import AttentionSite
from ..core.variant import Attend, AttentionOutput, Variant
from ..vision.images import is_replaced
from ..vision.marks import IMAGE_TOKENS

_STEP, _UNFILLED = "decoding.step", "decoding.unfilled"  # notes: of a forward, and its new cache's layers as given


@dataclass(eq=False)
class Step:
    """What one forward brings to the language model.

    Attributes:
        token_ids: `(B', T)` ids of the tokens; fewer rows than embeddings where these were repeated for beams.
        embeddings: `(B, T, E)` those tokens, image tokens in place.
        real: `(B, T)` bool: which are not padding.
        is_first: nothing precedes them.
        embedding: what the model embeds ids with.
        positions: `(B or 1, T)` or, of several axes, `(A, B, T)`: as the model gives them; `None`: its default.
        asked: the logits of so many last tokens are asked for (`logits_to_keep`); 0: of all, or of chosen ones.
    """

    token_ids: torch.Tensor
    embeddings: torch.Tensor
    real: torch.Tensor
    is_first: bool
    embedding: nn.Module
    positions: torch.Tensor | None = None
    asked: int = 0

    def where(self, token_id: int) -> torch.Tensor:
        """`(B, T)` bool: the tokens of that id; behind a prompt, without those that the model wrote itself."""
        found = self.token_ids == token_id
        found = found.repeat_interleave(len(self.embeddings) // len(found), dim=0).to(self.embeddings.device)
        if self.is_first or not bool(found.any()):
            return found
        with running(ModelRun()):  # whose notes nobody reads
            return found & is_replaced(self.embeddings, token_id, self.embedding)


@dataclass(eq=False)
class BranchStep:
    """What one branch gets instead.

    Attributes:
        embeddings: `(B, T', E)`.
        real: `(B, T')` bool.
        source: `(B, T)` which token of the branch corresponds to a token of the step, -1 where none does: the logits
            there are then the model's in this branch too.
        image: `(B, T')` bool, which are image tokens.
        positions: `(B or 1, T')` or `(A, B, T')`; `None`: the model's default; `"counted"`: by real tokens, from 0.
        fork: that many first tokens of a step that begins a text are in this branch as in the model, whose keys and
            values are then taken; not with layers that drop or share keys, where they are computed again.
    """

    embeddings: torch.Tensor
    real: torch.Tensor
    source: torch.Tensor
    image: torch.Tensor
    positions: torch.Tensor | Literal["counted"] | None = "counted"
    fork: int = 0


def only_plausible(combined: torch.Tensor, logits: torch.Tensor, beta: float) -> torch.Tensor:
    """Combined logits `(..., V)`, minus infinity where the model's own give a token less than beta times the
    probability of its first choice; beta 0 leaves all."""
    if beta == 0.0:
        return combined
    return combined.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(beta), -math.inf)


class DecodingVariant(Variant):
    """A variant that changes logits; it attaches itself to the attention modules it wants to see, if only one.

    A subclass gives `fit`, which chooses those, `branches` and `combine`; and `attend`, where attention differs in a
    branch, which `call.branch` tells. Like every variant it holds no reference to a module.
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
        super().prepare(model)
        if model.get_submodule(self.generator).config.is_encoder_decoder:  # type: ignore[union-attr]
            raise NotImplementedError(f"{type(self).__name__} needs a decoder-only language model.")
        if not model.can_generate():  # type: ignore[operator]
            raise NotImplementedError(f"{type(model).__name__} has no language modelling head to decode with.")

    def hooks(self, model: nn.Module) -> list[Hook]:
        generator: Any = model.get_submodule(self.generator)
        return [
            Hook(model, "before", self.before_model),
            Hook(generator, "before", self.before_generator),
            Hook(generator.get_input_embeddings(), "before", self.before_embedding),
            Hook(generator.get_decoder(), "before", self.before_decoder),
            Hook(generator.get_decoder(), "finally", self.after_decoder),
            Hook(generator, "after", self.after_generator),
            Hook(model, "finally", self.after_model),
        ]

    def branches(self, step: Step) -> list[BranchStep]:
        """The tokens of every branch for the tokens of this step; in every step of as many branches."""
        raise NotImplementedError(f"{type(self).__name__} must define branches(step).")

    def combine(self, logits: torch.Tensor, branch_logits: list[torch.Tensor]) -> torch.Tensor:
        """New logits `(B, n, V)` from those of the model and of each branch, in float32 at least."""
        raise NotImplementedError(f"{type(self).__name__} must define combine(logits, branch_logits).")

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        return inner(call)

    @property
    def is_active(self) -> bool:
        """Whether hooks have something to do: not within a branch itself."""
        return current_run().branch == 0

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_active and called_with(module, args, kwargs).get("labels") is not None:
            raise ValueError(
                f"{type(self).__name__} changes the logits that tokens are chosen by, which no loss is defined on. "
                "Compute losses under `with patchattn.unpatched(model):`."
            )

    def before_generator(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_active:
            current_run().notes[_STEP] = None  # to be told by its decoder

    def before_embedding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_active:
            note_token_ids(args, kwargs)

    def before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = current_run()
        if run.branch or _STEP not in run.notes:  # the decoder alone, or run again by activation checkpointing
            return
        given = called_with(module, args, kwargs)
        cache, embeddings = find_cache([*args, *kwargs.values()]), given.get("inputs_embeds")
        tokens: torch.Tensor = given["input_ids"] if embeddings is None else embeddings
        ids = tokens if embeddings is None else run.token_ids
        if getattr(cache, "is_compileable", False):
            raise NotImplementedError(f"{type(self).__name__} does not support static kv caches; use a dynamic one.")
        embedding = module.get_input_embeddings()  # type: ignore[operator]
        rows, length = tokens.shape[:2]
        if ids is None or ids.shape[1] != length or rows % max(len(ids), 1):
            raise unknown_ids(type(self).__name__, embedding, self.before_embedding)
        past = 0 if cache is None else int(cache.get_seq_length())
        real = real_tokens(
            given.get("attention_mask"), queries=length, keys=past + length, device=tokens.device
        ).expand(rows, -1)
        run.notes[_STEP] = (ids, embeddings, real, past == 0, embedding, given.get("position_ids"))
        run.notes[_UNFILLED] = None if cache is None or past else copy.deepcopy(cache.layers)

    def after_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Let go of the ids, also where activation checkpointing has run the decoder again."""
        current_run().token_ids = None

    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Let go of what this forward has noted, also where it failed."""
        if self.is_active:
            end_run(_STEP, _UNFILLED)

    def after_generator(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.is_active:
            return None
        notes = current_run().notes
        ids, embeddings, real, is_first, embedding, positions = notes.pop(_STEP)
        if embeddings is None:  # not made before the decoder, which activation checkpointing must find as it was
            embeddings = embedding(ids)
        step = Step(ids, embeddings, real.to(embeddings.device), is_first, embedding, positions)
        values = list(output) if isinstance(output, tuple) else list(output.values())
        cache, unfilled = find_cache(values), notes.pop(_UNFILLED)
        held = None if cache is None else _held_by(cache, module, step, unfilled)
        keep = called_with(module, args, kwargs).get("logits_to_keep", 0)
        step.asked = keep if isinstance(keep, int) else 0
        steps = self.branches(step)
        if held is not None and not held.branches:
            held.add(len(steps))
        logits = values[0]  # without labels there is no loss before them
        # The difference of two half-precision logits, amplified, would be noise.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found, known = [], None
        for number, inputs in enumerate(steps):
            branch = _run_branch(module, inputs, held, number, step)
            source = inputs.source[:, -keep:] if isinstance(keep, int) else inputs.source[:, keep]
            rows = source - (inputs.real.shape[1] - branch.shape[1])
            aligned = branch.to(logits).gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, logits.shape[-1]))
            found.append(torch.where((rows >= 0)[..., None], aligned, logits))  # forked tokens are as in the model
            known = source >= 0 if known is None else known | (source >= 0)
        combined = self.combine(logits, found)
        if known is not None:
            combined = torch.where(known[..., None], combined, logits)
        if isinstance(output, tuple):
            return (combined, *output[1:])
        output.logits = combined
        return output


@dataclass(eq=False)
class _Held:
    """A kv cache, with what it holds of branches.

    Attributes:
        cache: the cache object.
        own: layers of the model itself.
        branches: tokens and layers of each branch.
        unfilled: layers like those that the model was given, while the cache is new.
    """

    cache: Cache
    own: list[Any]
    branches: list[tuple[BranchTokens, list[Any]]]
    unfilled: list[Any]

    def add(self, count: int) -> None:
        """Make layers for so many branches."""
        for _ in range(count):
            tokens, layers = BranchTokens(), copy.deepcopy(self.unfilled)
            self.cache.layers += [tokens, *layers]
            self.branches.append((tokens, layers))


def _held_by(cache: Cache, module: nn.Module, step: Step, unfilled: list[Any] | None) -> _Held:
    """What a cache holds of branches; in a new one, layers to come are of the same kind as those that the model was
    `unfilled` given, and with what was asked of them, such as to keep what assisted decoding may take back."""
    starts = [index for index, layer in enumerate(cache.layers) if isinstance(layer, BranchTokens)]
    bounds = [*starts, len(cache.layers)]
    own, found = cache.layers[: bounds[0]], [(cache.layers[i], cache.layers[i + 1 : j]) for i, j in pairwise(bounds)]
    if found:
        step.is_first = found[0][0].get_seq_length() == 0
        return _Held(cache, own, found, [])
    if not step.is_first:
        raise ValueError(
            "This kv cache was filled before the model was patched, or by prefix tuning: it lacks the second branch. "
            "Start with a new one, without a prefix."
        )
    if unfilled is None:  # the model has made its cache itself
        unfilled = DynamicCache(config=module.config).layers
    elif not unfilled:  # a cache that makes its layers when they are filled
        unfilled = [type(layer)() for layer in own]
    return _Held(cache, own, [], unfilled)


def _run_branch(module: nn.Module, inputs: BranchStep, held: _Held | None, number: int, step: Step) -> torch.Tensor:
    """`(B, n, V)` logits of a branch's last n tokens, of all where all are asked for."""
    real, cache, done = inputs.real, None, 0
    length = real.shape[1]
    if held is not None:
        tokens, layers = held.branches[number]
        cache, seen = Cache(layers=layers), real[:, None, :, None]
        real = tokens.update(seen, seen)[0][:, 0, :, 0]
        if step.is_first and inputs.fork and all(map(only_holds, (*held.own, *layers))):
            done = inputs.fork
            for layer, own in zip(layers, held.own, strict=True):
                layer.update(own.keys[:, :, :done], own.values[:, :, :done])
    positions = inputs.positions
    if isinstance(positions, str):
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    run = ModelRun(branch=number + 1, asked=step.asked, facts={IMAGE_TOKENS: inputs.image[:, done:]})
    with running(run):
        return module(
            inputs_embeds=inputs.embeddings[:, done:],
            attention_mask=real.long(),
            **({} if positions is None else {"position_ids": positions[..., done:]}),
            **cache_argument(module, cache),
            use_cache=cache is not None,
            logits_to_keep=min(step.asked, length - done),
            return_dict=True,
            **{RUN: run},
        ).logits
