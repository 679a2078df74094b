"""Model code that asks for the attention implementation by name, and would take another branch under ours."""

import ast
import functools
import inspect
import re
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

_PREFIX = "patchattn_"
_QUESTION = re.compile(
    r"""_attn_implementation\s*(==|!=|not\s+in|in)\s*(\([^()]*\)|\[[^\[\]]*\]|"[^"]*"|'[^']*')""", re.VERBOSE
)

# Where the branch makes no difference to what is computed, and why.
_HARMLESS: dict[str, Any] = {
    # Matters only together with reorder_and_upcast_attn, which replaces the whole attention function.
    "GPT2Attention": lambda module: not module.reorder_and_upcast_attn,
    "DecisionTransformerGPT2Attention": lambda module: not module.reorder_and_upcast_attn,
}


def seam_name(base: str) -> str:
    """The name registered for a base implementation: no "/" or "@", which transformers takes for a Hub kernel."""
    return _PREFIX + re.sub(r"[^0-9a-zA-Z]+", "_", base)


def name_branches(modules: Iterable[nn.Module], base: str) -> list[str]:
    """Questions in the code of attention modules that get another answer under our name than under `base`.

    Only attention modules are shown our name: the rest of the model goes on to read the base's.

    Returns:
        One line per question: the class and the comparison. Empty for nearly every family.
    """
    found: list[str] = []
    seen: set[type] = set()
    for module in modules:
        kind: Any = type(module)
        if kind in seen:
            continue
        seen.add(kind)
        if kind.__name__ in _HARMLESS and _HARMLESS[kind.__name__](module):
            continue
        for operator, right in _questions(kind):
            names = ast.literal_eval(right)
            names = (names,) if isinstance(names, str) else tuple(names)
            if (base in names) != (seam_name(base) in names):
                found.append(f"{kind.__name__}: _attn_implementation {operator} {right}")
    return found


@functools.cache
def _questions(kind: Any) -> tuple[tuple[str, str], ...]:
    """Operator and right side of every comparison of the implementation's name in a class."""
    found: list[tuple[str, str]] = []
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
