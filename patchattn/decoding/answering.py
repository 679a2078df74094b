"""The rows that tokens are chosen by: a prompt's last one, which answers begin with, and those that come after it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..core import ranks
from ..core.call import AttentionCall
from ..core.hooks import called_with
from ..core.run import current_run

_goes_on: ContextVar[bool | None] = ContextVar("goes_on", default=None)


@contextmanager
def prompt_goes_on(more: bool = True) -> Iterator[None]:
    """Say, in a `with` block, that more of the prompt follows what the model is called with: no answer begins there.

    For prompts in several calls: nothing else tells a piece of a prompt from its end.

    Args:
        more: false says the opposite: an answer begins, or began, behind every call, also where no token of it was fed
            back before more text came, as after an answer of one token.
    """
    token = _goes_on.set(more)
    try:
        yield
    finally:
        _goes_on.reset(token)


def note_asked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note how many last tokens' logits a model is asked for (`logits_to_keep`), for `answering_rows`."""
    keep = called_with(module, args, kwargs).get("logits_to_keep", 0)
    current_run().asked = keep if isinstance(keep, int) else 0


def answering_rows(call: AttentionCall, owner: str) -> torch.Tensor | None:
    """`(B, R)` numbers of the rows that tokens are chosen by; `None` where the prompt goes on.

    The last real one of each sequence; or the last n where the logits of n tokens are asked for, as assisted decoding
    does, which puts tokens that it proposes behind the others.

    Args:
        call: of attention, of a variant whose `keeps_state` is true.
        owner: its name.

    Raises:
        NotImplementedError: a row of the batch holds several texts.
        ValueError: several tokens come right behind several, and nobody said whether the prompt went on.
    """
    goes_on = _goes_on.get()
    batch, count, asked = len(call.query), call.query.shape[2], call.run.asked
    ends = count > 1 and asked <= 1 and goes_on is None
    state = call.context.sequence_state(f"{owner}, by its calls,")
    if state is not None:
        before = state.tensors.get("ended")
        if ends and before is not None and bool(before.any()):
            raise ValueError(
                f"{owner} took the end of the last call for that of a prompt, and now more than one token follows. "
                "Call the model on the earlier pieces of a prompt under `with "
                "patchattn.decoding.answering.prompt_goes_on():`, and leave out prefill_chunk_size; if an answer of "
                "one token began there, call it on what follows under `with prompt_goes_on(False):`."
            )
        state.write("ended", torch.full((batch,), ends))  # on the CPU: no device is waited for
    if goes_on:
        return None
    order = torch.arange(count, device=call.query.device)
    if count == 1 or asked > 1:
        return order[-max(asked, 1) :].expand(batch, -1)
    starts = ranks.starts(call.mask)
    if starts is not None and bool(starts.any()):
        raise NotImplementedError(
            f"A row of the batch of {call.site.name} holds several texts, whose ends nobody says: give each a row."
        )
    return (call.mask.real() * order).argmax(-1, keepdim=True).expand(batch, -1)
