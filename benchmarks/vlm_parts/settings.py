"""The settings that are measured, and what some of them must beat: image tokens dropped at random, and no picture."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import patchattn
from patchattn import option
from patchattn.core.registry import temporarily_registered
from patchattn.core.variant import ALL_CAPABILITIES, VariantConfig, VariantInfo
from patchattn.vision.token_pruning import PruningStep, TokenPruning

BLIND = "a grey picture"  # the plain model, which sees nothing of what is asked
HEADS = 14  # of a list of retrieval heads, a twentieth of SmolLM2-135M's, as 50 are of Llama-2-7B's
SETTINGS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "dense": None,
    BLIND: None,
    "pai": ("pai", {}),
    "pai, boost alone": ("pai", {"gamma": 1.0}),
    "paint": ("paint", {}),
    "vhr": ("vhr", {}),
    "vcd": ("vcd", {}),
    "damro 2": ("damro", {"alpha": 2.0, "top_k": 4}),
    "damro 0.5": ("damro", {"alpha": 0.5, "top_k": 4}),
    "var": ("var", {}),
    "decore": ("decore", {}),
    "rbd_like": ("rbd_like", {}),
    "fastv 50 %": ("fastv", {"layer": 2, "ratio": 0.5}),
    "fastv 75 %": ("fastv", {"layer": 2, "ratio": 0.75}),
    "random half from layer 2": ("random_tokens", {"layer": 2, "share": 0.5}),
    "hiprune 1/3": ("hiprune", {}),
    "random third": ("random_tokens", {"layer": 0, "share": 1 / 3}),
    "a_vl": ("a_vl", {}),
    "ee_mllm": ("ee_mllm", {}),
}


@dataclass(frozen=True, kw_only=True)
class RandomTokensConfig(VariantConfig):
    """Settings of tokens dropped at random."""

    layer: int = option(0, help="The first layer that some tokens do not go through.", minimum=0)
    share: float = option(0.5, help="Share of the image tokens that is kept.", minimum=0.0, maximum=1.0)


class RandomTokens(TokenPruning):
    """Image tokens that are drawn go on, as many in every row, the same in every call."""

    config_class = RandomTokensConfig
    config: RandomTokensConfig
    name = "random_tokens"

    @classmethod
    def first_pruned(cls, config: RandomTokensConfig) -> int:
        return config.layer

    def keep(self, step: PruningStep) -> torch.Tensor:
        draws = torch.rand(step.image.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~step.image, 2.0)
        order = draws.argsort(-1).argsort(-1)
        return order < torch.round(self.config.share * step.image.sum(-1, keepdim=True))


@contextmanager
def as_set(model: Any, setting: str, heads: Path) -> Iterator[Any]:
    """The model in that setting.

    Args:
        model: a LLaVA.
        setting: its name.
        heads: JSON file of pairs of layer and head, the strongest retrieval heads first.
    """
    chosen = SETTINGS[setting]
    with ExitStack() as stack:
        if chosen is not None:
            name, given = chosen
            if name == RandomTokens.name:
                stack.enter_context(temporarily_registered(_RANDOM))
            if name == "decore":
                given = {**given, "heads": json.loads(heads.read_text(encoding="utf-8"))[:HEADS]}
            stack.enter_context(patchattn.patched(model, name, **given))
        yield model


_RANDOM = VariantInfo(
    name=RandomTokens.name,
    variant=RandomTokens,
    title="Image tokens dropped at random",
    arxiv_id=None,
    year=0,
    summary="Image tokens dropped at random.",
    extra_parameters="none",
    needs_training=False,
    capabilities=ALL_CAPABILITIES - {"cross", "compile", "position_bias", "without_images"},
)
