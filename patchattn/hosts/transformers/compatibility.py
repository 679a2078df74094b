"""Model code that asks for the attention implementation by name: under ours it is to take the branch of the base's."""

import ast
import functools
import inspect
import re
import types
from typing import Any

from torch import nn

_PREFIX = "patchattn_"
_QUESTION = re.compile(
    r"""_attn_implementation\s*(?:==|!=|not\s+in|in)\s*(\([^()]*\)|\[[^\[\]]*\]|"[^"]*"|'[^']*')""", re.VERBOSE
)


def seam_name(base: str) -> str:
    """The name registered for a base implementation: no "/" or "@", which transformers takes for a Hub kernel."""
    return _PREFIX + re.sub(r"[^0-9a-zA-Z]+", "_", base)


class AnsweringName(str):
    """A name of ours, for a module whose code asks for the implementation: it answers as the base's name does.

    It is looked up as ours all the same, since lookups go by its hash.

    Args:
        base: the base implementation.
    """

    base: str
    own: str

    def __new__(cls, base: str) -> "AnsweringName":
        name = super().__new__(cls, seam_name(base))
        name.base, name.own = base, seam_name(base)  # which compiled code reads more easily than the string itself
        return name

    def __getnewargs__(self) -> tuple[str]:
        return (self.base,)

    def __eq__(self, other: object) -> bool:
        return other == self.base or other == self.own

    def __ne__(self, other: object) -> bool:
        return other != self.base and other != self.own

    def __hash__(self) -> int:  # in Python, as compiled code asks
        return hash(self.own)


def asks_for_name(module: nn.Module, base: str) -> bool:
    """Whether the code of an attention module has a question that our name answers in another way than `base`.

    Only attention modules are shown our name: the rest of the model goes on to read the base's.
    """
    kind: Any = type(module)
    for right in _questions(kind):
        names = ast.literal_eval(right)
        names = (names,) if isinstance(names, str) else tuple(names)
        if (base in names) != (seam_name(base) in names):
            return True
    return False


@functools.cache
def _questions(kind: Any) -> tuple[str, ...]:
    """The right side of every comparison of the implementation's name in a class."""
    found: list[str] = []
    classes = [parent for parent in kind.__mro__ if not parent.__module__.startswith("torch.")]
    for value in (value for parent in classes for value in vars(parent).values()):
        function = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
        code = getattr(function, "__code__", None)
        # Reading source is slow; most functions show in their compiled code that they do not ask.
        if code is None or not _mentions(code, "_attn_implementation"):
            continue
        try:
            found += _QUESTION.findall(inspect.getsource(code))
        except OSError:  # defined in a console: there is no file to read
            continue
    return tuple(found)


def _mentions(code: types.CodeType, name: str) -> bool:
    return name in code.co_names or any(_mentions(c, name) for c in code.co_consts if isinstance(c, types.CodeType))
