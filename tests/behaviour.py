"""What the behaviour suite is made of: the cases, live parameters, and exact snapshots of a model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import patchattn
from patchattn.packing import CHILD


@dataclass(frozen=True)
class Case:
    """One variant with one of the settings that its registration names as worth trying."""

    variant: str
    settings: tuple[tuple[str, Any], ...]

    def patch(self, model: nn.Module, live: bool = True, **where: Any) -> nn.Module:
        """Patch, and give the variant's parameters values far from their start, so that they matter."""
        patchattn.patch_model(model, self.variant, **dict(self.settings), **where)
        if live:
            randomise(model)
        return model

    def __str__(self) -> str:
        return "-".join([self.variant, *(f"{name}={value}" for name, value in self.settings)])


def cases(*kinds: str) -> list[Case]:
    """Every registered variant of some kinds with each of its examples; all but decoding variants by default."""
    return [
        Case(name, tuple(example.items()))
        for kind in kinds or ("attention", "surgery")
        for name in patchattn.list_variants(kind)
        for example in patchattn.variant_info(name).examples
    ]


def neutral_cases(*kinds: str) -> list[Case]:
    """The same variants, with their neutral settings, on top of each of its examples."""
    found = []
    for case in cases(*kinds):
        neutral = patchattn.variant_info(case.variant).variant.neutral_config()
        found.append(Case(case.variant, tuple({**dict(case.settings), **neutral}.items())))
    return found


def variant_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if f".{CHILD}." in name}


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
