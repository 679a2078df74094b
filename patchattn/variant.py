"""The contract of a variant: its configuration, its module, and the registry that knows it."""

import difflib
import importlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import nn

if typing.TYPE_CHECKING:
    from .call import AttentionCall, LayerContext
    from .sites import AttentionSite

AttentionOutput = tuple[torch.Tensor, torch.Tensor | None]
Attend = Callable[["AttentionCall"], AttentionOutput]

Observer = Callable[["AttentionCall", dict[str, torch.Tensor]], None]

Capability = Literal[
    "causal",  # causal self-attention
    "bidirectional",  # encoders
    "cross",  # attention to another sequence
    "gqa",  # fewer kv heads than query heads
    "padding",  # batches with padded rows
    "kv_cache",  # cached and chunked decoding
    "static_cache",  # preallocated caches, longer than the text
    "compile",  # torch.compile(fullgraph=True)
    "dropout",  # attention dropout while training
    "softcap",  # capped logits (Gemma2)
    "sinks",  # learned sink logits, `s_aux` (gpt-oss)
    "position_bias",  # additive bias per head (T5)
]
ALL_CAPABILITIES: frozenset[str] = frozenset(get_args(Capability))


def option(
    default: Any = MISSING,
    *,
    help: str,
    source: str,
    unit: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A documented field of a `VariantConfig`.

    Args:
        default: value used when the user gives none.
        help: what the field does.
        source: where the default comes from: the paper's section, the released code, or "ours".
        unit: unit of the value, where it has one.
        minimum, maximum: inclusive bounds of a number, or of every number of a sequence.
        choices: the allowed values.
    """
    metadata = {
        "help": help,
        "source": source,
        "unit": unit,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
    }
    return field(default=default, metadata=metadata, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """Settings of a variant. Subclass it as a frozen dataclass whose fields are made by `option`.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range, or (in `from_dict`) a field is unknown.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):
            object.__setattr__(self, item.name, _checked(type(self), item, hints[item.name], getattr(self, item.name)))

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of JSON and YAML types; tuples become lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from a dictionary, such as one read from JSON or YAML."""
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__} is built from a dictionary, got {type(values).__name__}.")
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"{cls.__name__} has no field {name!r}{nearest(str(name), known)}")
        return cls(**values)


def nearest(name: str, known: list[str]) -> str:
    """The end of an error message about an unknown name: the closest known one, and all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}?" if close else ".") + f" Known: {', '.join(sorted(known)) or 'none'}."


def _checked(owner: type, item: Field[Any], hint: Any, value: Any) -> Any:
    """The value of a field, a list turned into a tuple, or an error that says what was expected and got."""
    where = f"{owner.__name__}.{item.name}"
    if isinstance(value, list):
        value = tuple(value)
    if not _is_instance(value, hint):
        raise TypeError(f"{where} must be {_spell(hint)}, got {value!r} of type {type(value).__name__}.")
    limits = item.metadata
    if limits.get("choices") is not None and value not in limits["choices"]:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, limits['choices']))}, got {value!r}.")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        low, high = limits.get("minimum"), limits.get("maximum")
        if number != number or (low is not None and number < low) or (high is not None and number > high):
            bounds = f"{'-inf' if low is None else low} and {'inf' if high is None else high}"
            raise ValueError(f"{where} must lie between {bounds}, got {value!r}.")
    return value


def _is_instance(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_instance(value, part) for part in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_instance(part, get_args(hint)[0]) for part in value)
    if origin is Literal:
        return value in get_args(hint)
    if hint is float:  # an int is a fine float; a bool is neither
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


class Variant(nn.Module):
    """One published attention, attached to one attention module.

    A subclass gives `config_class` and `attend`; the rest is optional. It holds no reference to the module it is
    attached to, so that copies and pickles of a patched model are complete and independent. Its weights are
    nn.Parameter, not nn.Linear: PEFT's `target_modules="all-linear"` would put LoRA on those.

    Args:
        config: settings, validated.
        site: the attention module it will be attached to.

    Raises:
        ValueError, NotImplementedError: in `__init__`, if the configuration does not fit the site.
    """

    config_class: ClassVar[type[VariantConfig]]

    def __init__(self, config: Any, site: "AttentionSite") -> None:
        super().__init__()
        self.config = config
        self.site = site
        self.observers: list[Observer] = []

    def attend(self, call: "AttentionCall", inner: Attend) -> AttentionOutput:
        """Compute attention.

        Args:
            call: the call as this variant sees it: query `(B, H, Tq, D)`, key and value `(B, Hkv, Tk, D)`, mask, ...
            inner: what comes next, another variant or the model's own implementation. Call it with `call` or with
                `call.replace(...)`.

        Returns:
            Output `(B, Tq, H, D)` and the attention weights `(B, H, Tq, Tk)`, or `None` where they are not computed.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attend(call, inner).")

    def forward(self, stage: Literal["attend", "before_cache"], *arguments: Any) -> Any:
        """Run one stage. What gathers parameters before a forward (FSDP, accelerate's offloading) relies on it."""
        return getattr(self, stage)(*arguments)

    @property
    def is_identity(self) -> bool:
        """Whether this configuration changes nothing, whatever the input and the parameters; it is then skipped."""
        return False

    @property
    def needs_context(self) -> bool:
        """Whether `attend` reads `call.context` (the layer's input, the query before its norm)."""
        return False

    @property
    def changes_cache(self) -> bool:
        """Whether `before_cache` changes what the kv cache stores."""
        return False

    def before_cache(
        self, key: torch.Tensor, value: torch.Tensor, context: "LayerContext", visible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change new keys and values `(B, Hkv, T, D)` before a kv cache stores them, and equally without a cache.

        Args:
            key, value: of the tokens of this call only.
            context: what the attention module was called with.
            visible: `(B or 1, T)` number of keys each of these tokens sees, itself included.
        """
        return key, value

    def report(self, call: "AttentionCall", **values: torch.Tensor) -> None:
        """Show intermediate values, such as gates or temperatures, to whoever observes (`patchattn.observe`)."""
        for observer in self.observers:
            observer(call, {name: value.detach() for name, value in values.items()})

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        """Settings with which a freshly attached variant leaves every model as it was."""
        return {}

    def extra_repr(self) -> str:
        return f"{self.config}"


@dataclass(frozen=True, kw_only=True)
class VariantInfo:
    """What the registry knows of a variant.

    Attributes:
        name: how `patch_model` calls it.
        variant: the module class.
        title, arxiv_id, year: the paper.
        code: where the authors' own code is, `None` if none was released.
        kind: `attention` changes the call.
        needs_training: whether it is of use only after training.
        capabilities: what it supports; anything else is refused.
        extra_parameters: what it adds, in words.
        summary: one line.
        examples: settings that between them reach every path of the variant; the test suite runs each on every family.
    """

    name: str
    variant: type[Variant]
    title: str
    arxiv_id: str | None
    year: int
    summary: str
    extra_parameters: str
    needs_training: bool
    code: str | None = None
    kind: Literal["attention"] = "attention"
    capabilities: frozenset[str] = ALL_CAPABILITIES
    examples: tuple[Mapping[str, Any], ...] = ({},)

    @property
    def config_fields(self) -> dict[str, dict[str, Any]]:
        """Name to default, help, source, unit and bounds of every setting."""
        return {item.name: {"default": item.default, **item.metadata} for item in fields(self.variant.config_class)}


_REGISTRY: dict[str, VariantInfo] = {}


def register_variant(info: VariantInfo) -> None:
    """Make a variant known under its name.

    Raises:
        ValueError: the name is taken or not a lower-case identifier, or a capability is unknown.
        TypeError: the variant or its configuration class is of the wrong kind.
    """
    if not isinstance(info, VariantInfo):
        raise TypeError(f"register_variant expects a VariantInfo, got {type(info).__name__}.")
    if not (info.name.isidentifier() and info.name == info.name.lower()):
        raise ValueError(f"A variant's name must be a lower-case identifier, got {info.name!r}.")
    if info.name in _registry() and _REGISTRY[info.name].variant is not info.variant:
        raise ValueError(f"The variant {info.name!r} is registered already; choose another name.")
    if not (isinstance(info.variant, type) and issubclass(info.variant, Variant)):
        raise TypeError(f"Variant {info.name!r}: expected a subclass of patchattn.Variant, got {info.variant!r}.")
    if not issubclass(getattr(info.variant, "config_class", object), VariantConfig):
        raise TypeError(f"Variant {info.name!r}: config_class must be a subclass of patchattn.VariantConfig.")
    if unknown := sorted(info.capabilities - ALL_CAPABILITIES):
        raise ValueError(f"Variant {info.name!r}: unknown capabilities {unknown}. Known: {sorted(ALL_CAPABILITIES)}.")
    _REGISTRY[info.name] = info


@contextmanager
def temporarily_registered(info: VariantInfo) -> Iterator[str]:
    """The variant's name, known for the length of a `with` block."""
    register_variant(info)
    try:
        yield info.name
    finally:
        del _REGISTRY[info.name]


def list_variants() -> list[str]:
    """Names of all registered variants, sorted."""
    return sorted(_registry())


def variant_info(name: str) -> VariantInfo:
    """What is known of a variant: paper, settings, capabilities.

    Raises:
        ValueError: no such variant; the message names the nearest one.
        TypeError: `name` is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"A variant is named by a string, got {type(name).__name__}.")
    if name not in _registry():
        raise ValueError(f"Unknown variant {name!r}{nearest(name, list_variants())}")
    return _REGISTRY[name]


def _registry() -> dict[str, VariantInfo]:
    importlib.import_module("patchattn.variants")  # the shipped variants register themselves when first asked for
    return _REGISTRY
