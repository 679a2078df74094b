"""What the core asks of a library whose models it patches. It knows none by name: a host is handed to it.

Nothing here imports torch before a host is asked for.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from torch import nn

    from .mask import Mask
    from .sites import AttentionSite


class PatchedModule(Protocol):
    """What a host must know of the chain of variants on an attention module."""

    base: str


class Host(Protocol):
    """A module with these functions.

    The base implementation of an attention module is what computes attention for it in an unpatched model.
    """

    def find_sites(self, model: "nn.Module") -> "list[AttentionSite]":
        """All attention sites of a model, in the order of its modules."""

    def find_undispatched(self, model: "nn.Module") -> "list[tuple[str, nn.Module]]":
        """Modules that compute attention where nothing can step in, by name."""

    def base_of(self, module: "nn.Module") -> str:
        """Name of the base implementation of an attention module, patched or not."""

    def refuse_bases(self, model: "nn.Module", sites: Sequence[str]) -> None:
        """NotImplementedError if some attention modules, by name, would compute something else once patched."""

    def connect(self, model: "nn.Module", module: "nn.Module") -> None:
        """Have an attention module that carries variants call them."""

    def disconnect(self, module: "nn.Module") -> None:
        """Have an attention module call its base implementation again."""

    def forget(self, module: "nn.Module") -> None:
        """Take off what `connect` put on a module of the model, whichever it is."""

    def owns(self, hook: Any) -> bool:
        """Whether a hook on a module was placed by `connect`."""

    def keep(self, chain: PatchedModule) -> None:
        """Whatever the chain's base implementation needs stays, as long as the chain is on a module."""

    def let_go(self, chain: PatchedModule) -> None:
        """The inverse of `keep`."""

    def release(self) -> None:
        """Take away what no chain needs any more."""

    def computes_softmax(self, base: str) -> bool:
        """Whether a base implementation computes what an operation of `patchattn_kernels` may compute instead."""

    def mask_of_call(
        self, given: Any, base: str, arguments: Mapping[str, Any], *, is_causal: bool, **sizes: Any
    ) -> "Mask":
        """The mask of a call of a base implementation, from what its attention function was given."""


_modules: list[str] = []
_loaded: list[Host] = []


def offer_host(module: str) -> None:
    """Make a host known by the dotted name of its module; it is imported when a model is first looked at."""
    _modules.append(module)


def host() -> Host:
    """The host of the models that are patched."""
    if not _loaded:
        _loaded.append(cast(Host, importlib.import_module(_modules[0])))
    return _loaded[0]


def find_sites(model: "nn.Module") -> "list[AttentionSite]":
    """All attention sites of a model, in the order of its modules."""
    return host().find_sites(model)
