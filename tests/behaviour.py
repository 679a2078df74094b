"""What the behaviour suite is made of: which variant runs on which family, live parameters, exact snapshots."""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.core.packing import CHILD

from .families import LENGTH, VOCABULARY, outputs
from .refusals import REFUSALS, Refusal
from .toys import TOYS

# A paper's first example runs on these and on families that its page names, others on one; toys run on every family.
REPRESENTATIVES = ("llama", "qwen3", "bert", "t5", "llava")
ONLY_WHILE_DECODING = ("recycled",)  # what comes in calls of several tokens reads all keys
PAGES = Path(__file__).parents[1] / "docs" / "variants"
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}  # of what differs by the order of sums alone


@dataclass(frozen=True)
class Case:
    """One variant with one of the settings that its registration names as worth trying.

    Attributes:
        variant: its name.
        settings: of its configuration.
        example: which of the variant's examples it is, or is made from.
    """

    variant: str
    settings: tuple[tuple[str, Any], ...]
    example: int = 0

    @property
    def info(self) -> patchattn.VariantInfo:
        return TOYS.get(self.variant) or patchattn.variant_info(self.variant)

    @property
    def looks_ahead(self) -> bool:
        """Whether rows of one call depend on later ones, under these settings."""
        return self.info.looks_ahead or self.info.configure(dict(self.settings)).looks_ahead

    def patch(self, model: nn.Module, live: bool = True, **where: Any) -> nn.Module:
        """Patch, and give the variant's parameters values far from their start, so that they matter."""
        patchattn.patch_model(model, self.variant, **dict(self.settings), **where)
        if live:
            randomise(model)
        return model

    def train(self, model: nn.Module) -> nn.Module:
        """Training mode; without dropout of attention weights where the variant knows none."""
        for module in model.modules() if "dropout" not in self.info.capabilities else ():
            if hasattr(module, "patchattn"):
                without_dropout(module)
        return model.train()

    @property
    def neutral(self) -> "Case":
        """The same variant with its neutral settings, on top of these."""
        return Case(
            self.variant, tuple({**dict(self.settings), **self.info.variant.neutral_config()}.items()), self.example
        )

    def refusal(self, family: str) -> Refusal | None:
        """The declared reason why the variant is not to run on a family."""
        for refusal in REFUSALS.get(self.variant, ()):
            if family in refusal.families and (refusal.examples is None or self.example in refusal.examples):
                return refusal
        return None

    def runs_by_default_on(self, family: str) -> bool:
        """Whether the default suite runs it there; the others are marked `full`."""
        return self.variant in TOYS or family in REPRESENTATIVES or is_named(family, self.variant)

    def __str__(self) -> str:
        return "-".join([self.variant, *(f"{name}={value}" for name, value in self.settings)])


@cache
def is_named(family: str, variant: str) -> bool:
    """Whether the documentation page of a variant names a family, such as `GPT-2` or `LLaVA-1.5`."""
    page = PAGES / f"{variant}.md"
    name = "[-_. ]?".join(re.findall(r"[a-z]+|\d+", family.removesuffix("_text")))
    return page.is_file() and re.search(rf"\b{name}(?![a-z])", page.read_text(encoding="utf-8"), re.I) is not None


def cases(*kinds: str) -> list[Case]:
    """Every registered variant of some kinds with each of its examples; all but decoding variants by default."""
    names = [name for kind in kinds or ("attention", "surgery") for name in patchattn.list_variants(kind)]
    return [case for name in names for case in _examples(name, patchattn.variant_info(name))]


def toys(*kinds: str) -> list[Case]:
    """The same of the toys, which are registered only while a test uses the fixture `toys`."""
    wanted = kinds or ("attention", "surgery")
    return [case for name, info in TOYS.items() if info.kind in wanted for case in _examples(name, info)]


def _examples(name: str, info: patchattn.VariantInfo) -> list[Case]:
    return [Case(name, tuple(example.items()), number) for number, example in enumerate(info.examples)]


def accepted(family: str, *kinds: str) -> list[Case]:
    """The papers' cases that a family takes."""
    return [case for case in cases(*kinds) if case.refusal(family) is None]


def on(
    families: Sequence[str],
    *kinds: str,
    once: bool = False,
    first: bool = False,
    papers: int | None = None,
    without: Container[str] = (),
) -> pytest.MarkDecorator:
    """Parametrize a test by `family` and `case`.

    Args:
        families: those that the test makes sense for. Toys run on all of them, a paper's first example on those that
            stand for the others and on those that its page names, its other ones on the first of these; the rest is
            marked `full`.
        kinds: of variants; attention and surgery by default.
        once: everything runs on the first family that takes it, for tests that take long.
        first: of a paper's examples only the first that a family takes, for tests that take seconds each.
        papers: on how many of these families a paper's first example runs by default, none of its examples with 0: for
            what the families of toys show for all. On all of those that are said above by default.
        without: names of variants to leave out.
    """
    found: list[Any] = []
    had: set[str] = set()
    for case in [case for case in [*toys(*kinds), *cases(*kinds)] if case.variant not in without]:
        taking = [family for family in families if case.refusal(family) is None]
        default = [family for family in taking if case.runs_by_default_on(family)]
        if once:
            default = taking[:1]
        if case.variant in had and case.variant not in TOYS:
            default = [] if first else default[:1]
        if taking and case.variant not in TOYS:
            had.add(case.variant)
        if papers is not None and case.variant not in TOYS:
            default = default[:papers]
        for family in taking:
            marks = () if family in default else pytest.mark.full
            found.append(pytest.param(family, case, id=f"{family}-{case}", marks=marks))
    return pytest.mark.parametrize(("family", "case"), found)


def without_full(mark: pytest.Mark) -> pytest.Mark:
    """A mark of a test, which parametrizes it with nothing that is marked `full` unless with nothing else."""
    if mark.name != "parametrize" or len(mark.args) != 2 or not isinstance(mark.args[1], Sequence):
        return mark
    names, parameters = mark.args
    left = [one for one in parameters if "full" not in [each.name for each in getattr(one, "marks", ())]]
    return mark if len(left) in (0, len(parameters)) else pytest.mark.parametrize(names, left, **mark.kwargs).mark


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=TOLERANCES[left.dtype], atol=TOLERANCES[left.dtype])


def text(length: int = LENGTH, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 4, (rows, length), generator=torch.Generator().manual_seed(3))


def decoded(model: nn.Module, tokens: torch.Tensor, sizes: list[int], kind: str = "dynamic") -> torch.Tensor:
    """Outputs of calls of these sizes, one after the other on one cache."""
    config = model.config.get_text_config()
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=16)
    parts = tokens.split(sizes, dim=1)
    return torch.cat(
        [outputs(model, input_ids=part, **cache_argument(model, cache), use_cache=True)[0] for part in parts], dim=1
    )


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def without_dropout(model: nn.Module) -> None:
    """No dropout while training, of activations or of attention weights."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def variant_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if f".{CHILD}." in name}


def variants_in(model: nn.Module) -> list[patchattn.Variant]:
    return [module for module in model.modules() if isinstance(module, patchattn.Variant)]


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in variant_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def implementations(model: nn.Module) -> list[str]:
    modules = [m for m in model.modules() if hasattr(m, "config") and not isinstance(m, patchattn.Variant)]
    configs = {id(m.config): m.config for m in modules}
    return [config._attn_implementation for config in configs.values()]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a patch could leave behind."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "config": model.config.to_dict(),
        "implementations": implementations(model),
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: (
                list(m._forward_pre_hooks.items()),
                list(m._forward_hooks.items()),
                list(m._forward_pre_hooks_with_kwargs),
                list(m._forward_hooks_with_kwargs),
                list(m._forward_hooks_always_called),
            )
            for name, m in model.named_modules()
        },
        "grads": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": model.training,
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before:
        if key == "state":
            assert list(before[key]) == list(after[key])
            for name, tensor in before[key].items():
                assert torch.equal(tensor, after[key][name]), name
        else:
            assert before[key] == after[key], key


def registered() -> set[str]:
    return set(ALL_ATTENTION_FUNCTIONS.valid_keys())
