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

_goes_on: ContextVar[bool] = ContextVar("goes_on", default=False)


@contextmanager
def prompt_goes_on() -> Iterator[None]:
    """Say, in a `with` block, that more of the prompt follows what the model is called with: no answer begins there.

    For prompts in several calls. Nothing else tells a piece of a prompt from its end.
    """
    token = _goes_on.set(True)
    try:
        yield
    finally:
        _goes_on.reset(token)


def does_prompt_go_on() -> bool:
    """Whether this is within `prompt_goes_on`."""
    return _goes_on.get()


def note_asked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note how many last tokens' logits a model is asked for (`logits_to_keep`), for `answering_rows`."""
    keep = called_with(module, args, kwargs).get("logits_to_keep", 0)
    current_run().asked = keep if isinstance(keep, int) else 0


def answering_rows(call: AttentionCall) -> torch.Tensor | None:
    """`(B, R)` numbers of the rows that tokens are chosen by; `None` where the prompt goes on.

    The last real one of each sequence; or the last n where the logits of n tokens are asked for, as assisted decoding
    does, which puts tokens that it proposes behind the others.

    Raises:
        NotImplementedError: a row of the batch holds several texts.
    """
    if does_prompt_go_on():
        return None
    batch, count, asked = len(call.query), call.query.shape[2], call.run.asked
    order = torch.arange(count, device=call.query.device)
    if count == 1 or asked > 1:
        return order[-max(asked, 1) :].expand(batch, -1)
    starts = ranks.starts(call.mask)
    if starts is not None and bool(starts.any()):
        raise NotImplementedError(
            f"A row of the batch of {call.site.name} holds several texts, whose ends nobody says: give each a row."
        )
    return (call.mask.real() * order).argmax(-1, keepdim=True).expand(batch, -1)
