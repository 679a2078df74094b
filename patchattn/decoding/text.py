"""What decoding variants share whose branches are about text: where it is written, and branches of the same tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..core.selection import base_model
from ..core.sites import AttentionSite
from ..vision.images import image_layout
from .variant import BranchStep, DecodingVariant, Step

Span = tuple[int, int]
_spans: ContextVar[tuple[Span, ...] | None] = ContextVar("spans", default=None)


@contextmanager
def context_spans(spans: Sequence[Sequence[int]]) -> Iterator[None]:
    """Say which tokens of each prompt are its context, such as a document to be answered from, in a `with` block.

    Args:
        spans: for every sequence of the batch the number of its context's first token and of the one after its last;
            the first token that is no padding is 0.

    Raises:
        ValueError: a span that is empty or begins below 0.
        TypeError: something else than pairs of integers.
    """
    token = _spans.set(tuple(checked_span(span) for span in spans))
    try:
        yield
    finally:
        _spans.reset(token)


def checked_span(span: Any) -> Span:
    """Two integers, the second one larger; ValueError or TypeError otherwise."""
    numbers = list(span) if isinstance(span, Sequence) and not isinstance(span, str) else []
    if len(numbers) != 2 or any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise TypeError(f"A span is the number of its first token and of the one after its last, got {span!r}.")
    start, stop = numbers
    if not 0 <= start < stop:
        raise ValueError(f"A span begins at 0 or later and ends after it begins, got {span!r}.")
    return start, stop


def spans_of(step: Step, span: Span | None, *, by: str) -> torch.Tensor:
    """`(B, T)` bool: which tokens of a first step are in the span of their sequence.

    Args:
        step: the step.
        span: the same of all sequences; `None`: those of `context_spans`.
        by: who asks, for the message.

    Raises:
        ValueError: no spans, not as many as sequences, or one that ends behind its sequence or is all of it.
    """
    given, rows = _spans.get(), len(step.real)
    spans = given if span is None else (span,)
    if spans is None:
        raise ValueError(
            f"{by} leaves a prompt's context out in its second branch: say where it is by `with context_spans([(start, "
            "stop), ...]):`, or by span=[start, stop] for all sequences."
        )
    if rows % max(len(spans), 1) or not spans:
        raise ValueError(f"There are {len(spans)} spans for a batch of {rows} sequences.")
    limits = torch.tensor(spans, device=step.real.device).repeat_interleave(rows // len(spans), dim=0)  # by beams
    numbers = step.real.long().cumsum(-1) - 1
    for row, (start, stop) in enumerate(limits.tolist()):
        length = int(numbers[row, -1]) + 1
        if stop > length or stop - start == length:
            raise ValueError(
                f"The context of sequence {row} is the span {start} to {stop} of a prompt of {length} tokens: it must "
                "lie within it and leave something. A prompt must come in one piece."
            )
    return step.real & (numbers >= limits[:, :1]) & (numbers < limits[:, 1:])


class TextDecodingVariant(DecodingVariant):
    """A decoding variant on whatever writes text, with or without images before it."""

    placeholders: tuple[int, ...] = ()  # ids that image tokens take the place of

    def prepare(self, model: nn.Module) -> None:
        self.generator = text_generator(model)
        super().prepare(model)
        try:
            self.placeholders = image_layout(model).placeholders
        except NotImplementedError:
            return

    def same(self, step: Step) -> BranchStep:
        """A branch of the very tokens of the step, at their positions."""
        source = torch.arange(step.real.shape[1], device=step.real.device).expand(step.real.shape)
        image = torch.zeros_like(step.real)
        for placeholder in self.placeholders:
            image = image | step.where(placeholder)
        return BranchStep(step.embeddings, step.real, source, image, positions=step.positions)

    def without(self, step: Step, left_out: torch.Tensor) -> BranchStep:
        """A branch without some tokens `(B, T)` bool and without padding but that on the left; positions close up.

        Where a sequence ends with tokens that are left out, the last one corresponds to the last that is there: what
        comes next is asked of both. Where nothing of it is left in this step, none does.
        """
        kept, whole = step.real & ~left_out, self.same(step)
        counts = kept.sum(-1, keepdim=True)
        length = max(int(counts.max()), 1)
        index = kept.long().argsort(dim=-1, stable=True)[:, -length:]
        places = (kept.long().cumsum(-1) - 1 + length - counts).masked_fill(~kept, -1)
        order = torch.arange(step.real.shape[1], device=step.real.device)
        last = torch.where(step.real, order, 0).amax(dim=-1, keepdim=True)
        source = places.scatter(1, last, torch.where(counts > 0, length - 1, -1))
        return replace(
            whole,
            embeddings=step.embeddings.gather(1, index[..., None].expand(-1, -1, step.embeddings.shape[-1])),
            real=kept.gather(1, index),
            source=source,
            image=whole.image.gather(1, index),
            positions="counted",
        )


def text_generator(model: nn.Module) -> str:
    """Name of the module whose output holds the logits, `""` for the model itself or where nothing writes text."""
    writers = [name for name, module in model.named_modules() if getattr(module, "can_generate", bool)()]
    return writers[-1] if writers else ""


def decoder_sites(model: nn.Module, sites: Sequence[AttentionSite]) -> list[AttentionSite]:
    """The attention modules of what writes text; all of a model that `DecodingVariant.prepare` will refuse."""
    base: Any = base_model(model)
    generator: Any = base.get_submodule(text_generator(base))
    if not base.can_generate() or generator.config.is_encoder_decoder:
        return list(sites)
    inside = {id(module) for module in generator.get_decoder().modules()}
    return [site for site in sites if id(base.get_submodule(site.name)) in inside]
