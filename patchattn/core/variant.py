"""The contract of a variant: its configuration, its module, and what is known of it."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from ..files.documents import concerning, quoted
from .call import AttentionCall
from .hooks import Hook
from .mask import Keep
from .renaming import Renaming
from .report import Observation
from .settings import Settings, nearest
from .shards import own_parts
from .sites import AttentionSite
from .surroundings import LayerContext

AttentionOutput = tuple[torch.Tensor, torch.Tensor | None]
Attend = Callable[[AttentionCall], AttentionOutput]

Observer = Callable[[Observation], None]

Kind = Literal["attention", "surgery", "decoding", "cache"]
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
    "without_images",  # models without image tokens
]
KINDS: frozenset[str] = frozenset(get_args(Kind))
ALL_CAPABILITIES: frozenset[str] = frozenset(get_args(Capability))


@dataclass(frozen=True, kw_only=True)
class VariantConfig(Settings):
    """Settings of a variant. Subclass it as a frozen dataclass whose fields are made by `option`.

    Attributes:
        by_module: names of the fields that, once fitted, are dictionaries by the name of the attention module.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range, or (in `from_dict`) a field is unknown.
    """

    by_module: ClassVar[tuple[str, ...]] = ()

    @property
    def looks_ahead(self) -> bool:
        """Whether these settings let rows depend on later ones, as `VariantInfo.looks_ahead` says of all settings."""
        return False


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
    kind: ClassVar[Kind] = "attention"  # for who lists variants; the core reads what the class does
    attends: ClassVar[bool] = True  # changes calls of attention, so that its place among other variants counts
    neutral_rounds: ClassVar[bool] = False  # neutral settings give the model but for the order in which sums are made
    from_scratch: ClassVar[str | None] = None  # settings, in words, that are only for models trained with them
    acts_on_logits: ClassVar[bool] = False  # it chooses its own attention modules, and is the model's only such variant

    def __init__(self, config: Any, site: AttentionSite) -> None:
        super().__init__()
        self.config = config
        self.site = site
        self.observers: list[Observer] = []
        self.number = 0  # of the patch that attached it, among those of the model, outermost first

    def rename(self, site: AttentionSite, config: Any, renaming: Renaming) -> None:
        """Take the names that modules have from another object, around or inside the one that was patched.

        Args:
            site: the attention module under its name there.
            config: the settings, likewise.
            renaming: for whatever else is kept by name.

        Raises:
            ValueError: something that this variant changed lies outside of that object. Nothing is renamed then.
        """
        self.site, self.config = site, config

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        """Compute attention.

        Args:
            call: the call as this variant sees it: query `(B, H, Tq, D)`, key and value `(B, Hkv, Tk, D)`, mask, ...
            inner: what comes next, another variant or the model's own implementation. Call it with `call` or with
                `call.replace(...)`.

        Returns:
            Output `(B, Tq, H, D)` and the attention weights `(B, H, Tq, Tk)`, or `None` where they are not computed.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attend(call, inner).")

    def forward(self, stage: str, *arguments: Any) -> Any:
        """Run one stage, a method by its name. What gathers parameters before a forward (FSDP, accelerate's offloading)
        relies on it, so that whatever reads parameters of a variant while the model runs is called so."""
        if self.site.shard is None:
            return getattr(self, stage)(*arguments)
        with own_parts(self):
            return getattr(self, stage)(*arguments)

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        """Fit settings to a model, when patching; not when a saved patch is loaded, which holds what came out.

        Refuses settings that are made for another model, works out those that depend on its weights, and leaves out
        attention modules that the variant has no business with.

        Args:
            config: the settings as given.
            model: a transformers model.
            sites: the attention modules chosen; a decoding variant is given all.

        Returns:
            The settings, and the attention modules to attach to.

        Raises:
            ValueError, NotImplementedError: they do not fit. The model is then as it was.
        """
        return config, sites

    def prepare(self, model: nn.Module) -> None:
        """Read off the model, before this patch touches it, what the variant must know; what it raises leaves the model
        as it was."""

    def exchange(self, model: nn.Module) -> None:
        """Swap what the variant holds with what it takes the place of in the model; twice changes nothing."""

    def check_undo(self, model: nn.Module) -> None:
        """ValueError if what `exchange` took out cannot be put back."""

    def fold(self, plain: nn.Module) -> None:
        """Write what this variant does into a plain model, for `patchattn.export`.

        Asked of every variant that is no identity, outermost first.

        Args:
            plain: an unpatched model of the same class, with the shapes and weights of the patched one. Its parameters
                may be exchanged, and not written to: the patched model shares them.

        Raises:
            NotImplementedError: weights cannot say it; the message gives the reason, and what can be said instead.
        """
        raise NotImplementedError("what it computes is not in the weights")

    @classmethod
    def exchanges(cls) -> bool:
        """Whether it changes the model itself: it then comes before all that is made for the shapes it leaves."""
        return cls.exchange is not Variant.exchange

    def carried(self) -> list[str]:
        """Names, in the model's state dict, of exchanged parameters whose values only this patch knows."""
        return []

    @property
    def is_identity(self) -> bool:
        """Whether this configuration changes nothing, whatever the input and the parameters; it is then skipped."""
        return False

    @property
    def needs_context(self) -> bool:
        """Whether `attend` reads what the module was called with: the layer's input, the query before its norm."""
        return False

    @property
    def needs_groups(self) -> bool:
        """Whether it relies on kv heads that serve equally many query heads each, which follow each other."""
        return False

    @property
    def leaves_groups(self) -> bool:
        """Whether that holds of the attention module with what it has exchanged there."""
        return True

    @property
    def needs_grid(self) -> bool:
        """Whether `attend` asks `call.grid()`; towers without patches are then refused."""
        return False

    @property
    def changes_cache(self) -> bool:
        """Whether `before_cache` changes what the kv cache stores: with every setting, where the class defines it."""
        return type(self).before_cache is not Variant.before_cache

    @property
    def keeps_state(self) -> bool:
        """Whether `attend` reads or writes `call.context.sequence_state()`, which lives with the kv cache."""
        return False

    @property
    def batches_continuously(self) -> bool:
        """Whether it is right where one row holds new tokens of several texts, of which some decode and others do not,
        beside the keys of all of them, and the mask alone says whose is whose. Nothing is that is remembered with the
        kv cache."""
        tells = type(self).key_facts is not Variant.key_facts
        return not (tells or self.changes_cache or self.keeps_state or self.acts_on_logits)

    @property
    def splits_by_head(self) -> bool:
        """Whether processes may hold some heads each (tensor parallelism), as many kv heads as query heads in
        proportion: what it does of a head then depends on no other head of another kv head, and on its number only
        through parameters of a size by head, which are split, and through `AttentionSite.own_heads`."""
        return False

    @property
    def routes(self) -> bool:
        """Whether it chooses heads per token, and reports `router_probability` and `router_choice` `(B, T, R)`."""
        return False

    def before_cache(
        self, key: torch.Tensor, value: torch.Tensor, context: LayerContext, visible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change new keys and values `(B, Hkv, T, D)` before a kv cache stores them, and equally without a cache.

        Args:
            key: `(B, Hkv, T, D)`, of the tokens of this call only.
            value: likewise.
            context: what the attention module was called with.
            visible: `(B or 1, T)` number of keys each of these tokens sees, itself included.
        """
        return key, value

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        """What is to be known later of the tokens of this call, by name, such as which ones are image tokens.

        `(B, Tq)`, or by head `(B, 1 or Hkv or H, Tq)`. The chain asks in every call and keeps it with the kv cache;
        `call.key_fact(name)` then says it of all keys.
        """
        return {}

    def rule(self, call: AttentionCall) -> Keep | None:
        """What queries see at most, told from columns or from earlier calls; `None`: everything.

        The chain asks before the outermost variant, all of which then see that mask, in whatever order they are.
        """
        return None

    def hooks(self, model: nn.Module) -> list[Hook]:
        """Methods of this variant to be called around modules of the model other than the attention module.

        Placed by `patch_model`, taken off by `unpatch_model`. A method is placed once on a module, also where
        several attention modules with this variant ask for it.
        """
        return []

    def report(self, source: AttentionCall | LayerContext, **values: torch.Tensor) -> None:
        """Show intermediate values, such as gates or temperatures, to whoever observes (`patchattn.observe`)."""
        for observer in self.observers:
            observer(Observation(self.site, values, source))

    def fast_parameters(self) -> list[nn.Parameter]:
        """Parameters that need a learning rate of their own, far above that of weights, such as a temperature's scale.

        `patchattn.training` puts them into an optimizer group without weight decay.
        """
        return []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "observers": []}  # who watches this one does not watch its copies

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
        needs_training: whether it is of use only after training.
        looks_ahead: whether the rows of one call depend on later rows of it, or those of later calls on where one ends,
            so that decoding token by token is not one forward over all tokens; its page says what is.
        innermost: whether it computes attention weights itself, from the call as it gets it, so that no other variant
            can come after it.
        capabilities: what it supports; anything else is refused.
        extra_parameters: what it adds, in words.
        summary: one line.
        presets: settings under a name, such as those of a published model; `patch_model(..., preset="name")`.
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
    looks_ahead: bool = False
    innermost: bool = False
    code: str | None = None
    capabilities: frozenset[str] = ALL_CAPABILITIES
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    examples: tuple[Mapping[str, Any], ...] = ({},)

    @property
    def kind(self) -> Kind:
        """`attention` changes calls of attention; `surgery` weights and shapes; `decoding` the logits; `cache` which
        keys a kv cache keeps."""
        return self.variant.kind

    @property
    def family(self) -> str:
        """The mechanism: the folder of `patchattn.variants` that it is in; `other` for a variant from elsewhere."""
        package, *path = self.variant.__module__.split(".")
        return path[1] if package == __name__.partition(".")[0] and path[:1] == ["variants"] else "other"

    def configure(self, settings: VariantConfig | Mapping[str, Any] | None = None) -> VariantConfig:
        """The configuration that settings describe; `preset` among them names a preset that the others override.

        Raises:
            TypeError: settings of another variant, or a value of the wrong type.
            ValueError: an unknown setting or preset, or a value out of range.
        """
        wanted = self.variant.config_class
        if isinstance(settings, VariantConfig):
            if type(settings) is not wanted:
                raise TypeError(f"{self.name!r} is configured by {wanted.__name__}, got {type(settings).__name__}.")
            return settings
        if not isinstance(settings, Mapping) or "preset" not in settings:
            return self._made({} if settings is None else settings)
        preset = settings["preset"]
        if not isinstance(preset, str) or preset not in self.presets:
            raise ValueError(f"{self.name!r} has no preset {quoted(preset)}{nearest(str(preset), list(self.presets))}")
        given = {name: value for name, value in settings.items() if name != "preset"}
        return self._made({**self.presets[preset], **given})

    def fitted(
        self, settings: VariantConfig | Mapping[str, Any] | None, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[VariantConfig, Sequence[AttentionSite]]:
        """`configure`, then `Variant.fit`; what does not fit the model names the file that the settings name."""
        config = self.configure(settings)
        given = settings.values() if isinstance(settings, Mapping) else ()
        files = [value for value in given if isinstance(value, str | os.PathLike) and os.path.isfile(value)]
        with concerning(files[0] if len(files) == 1 else None):
            return self.variant.fit(config, model, sites)

    def _made(self, settings: Mapping[str, Any]) -> VariantConfig:
        with concerning(self.name):
            return self.variant.config_class.from_dict(settings)

    @property
    def config_fields(self) -> dict[str, dict[str, Any]]:
        """Name to default, help, source, unit and bounds of every setting."""
        return {item.name: {"default": item.default, **item.metadata} for item in fields(self.variant.config_class)}
