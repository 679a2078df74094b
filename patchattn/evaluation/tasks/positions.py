"""Whether a model can be given as many tokens as a task wants to give it."""

import re
from typing import Any

from torch import nn

from .generation import positions

_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|positions?_embeddings?|positions_embed)$")


def check_positions(model: Any, length: int) -> None:
    """Refuse a model whose table of positions is too short.

    Only a learned table sets a limit. Where positions are computed, as rotary ones are, more than the model was trained
    on are taken: what a variant makes of those is worth measuring.

    Args:
        model: a causal language model.
        length: tokens of the longest sequence, the answer included.

    Raises:
        ValueError: it has a table with fewer entries.
    """
    known = positions(model)
    if known is None or length <= known:
        return
    for name, module in model.named_modules():
        # a vision tower's table is smaller than what the text is given
        if isinstance(module, nn.Embedding) and _TABLE.search(name) and module.num_embeddings >= known:
            raise ValueError(
                f"{type(model).__name__} has a table of {known} positions ({name}), and the task needs {length}, those "
                "of answers included: give shorter lengths."
            )
