"""Variants for tests, one for each thing that a variant may do to a model: what the seam must carry on every family.

Papers come and go; what these do is what their variants are made of. All have a `strength`, 0 being neutral.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import patchattn
from patchattn.core.registry import temporarily_registered
from patchattn.decoding.text import text_generator
from patchattn.decoding.variant import BranchStep, DecodingVariant, Step
from patchattn.surgery.heads import HeadSurgery, KeptHeads, cut_heads
from patchattn_kernels import attention_with_lse


@dataclass(frozen=True, kw_only=True)
class StrengthConfig(patchattn.VariantConfig):
    strength: float = patchattn.option(1.0, help="How much is changed; 0 changes nothing.", source="ours")


class Toy(patchattn.Variant):
    config_class = StrengthConfig

    @classmethod
    def neutral_config(cls):
        return {"strength": 0.0}


class Masks(Toy):
    """Hides about half of the keys, chosen by what is in them; a row that would see nothing sees all it saw."""

    @property
    def is_identity(self):
        return self.config.strength == 0.0

    def attend(self, call, inner):
        seen = call.mask.seen()
        marked = call.value[:, 0, :, 0] * self.config.strength > 0.0
        keep = seen & ~marked[:, None, None]
        return inner(call.seeing(keep.where(keep.any(-1, keepdim=True), seen)))


class Remembers(Toy):
    """Scales a query by the mean of what the tokens that it sees had in their own queries, which no cache keeps."""

    def key_facts(self, call):
        return {} if self.site.is_cross else {"toy.norm": call.query.norm(dim=-1).mean(dim=1)}

    def attend(self, call, inner):
        if self.site.is_cross:  # what it sees are no tokens of its own sequence
            return inner(call)
        seen = call.mask.seen().any(1)
        facts = call.key_fact("toy.norm")[:, 0]
        mean = (seen * facts[:, None]).sum(-1) / seen.sum(-1).clamp(min=1)
        factor = 1.0 + self.config.strength * (4.0 * mean).sin()
        return inner(call.replace(query=call.query * factor[:, None, :, None].to(call.query.dtype)))


class Stores(Toy):
    """Scales keys and values before a cache stores them, by what is in them and by how many keys their token sees."""

    def before_cache(self, key, value, context, visible):
        change = (8.0 * value.mean(dim=(1, 3))).tanh() + 1.0 / visible.clamp(min=1)
        factor = (1.0 + self.config.strength * change)[:, None, :, None].to(key.dtype)
        return key * factor, value * factor

    def attend(self, call, inner):
        return inner(call)


class Gates(Toy):
    """Weighs the heads of a token by its layer's input and by its queries before their norm; learned."""

    needs_context = True

    def __init__(self, config, site):
        super().__init__(config, site)
        self.weight = nn.Parameter(torch.zeros(site.query_heads, site.input_size))
        self.slope = nn.Parameter(torch.zeros(site.query_heads))

    def attend(self, call, inner):
        norms = call.context.raw_query().norm(dim=-1).transpose(1, 2)
        scores = call.context.layer_input().to(self.weight.dtype) @ self.weight.T + self.slope * norms
        gate = 1.0 + self.config.strength * scores.tanh()
        self.report(call, gate=gate)
        output, weights = inner(call)
        return output * gate[..., None].to(output.dtype), weights


class Computes(Toy):
    """Computes attention itself, from what the call says of how; at another temperature."""

    @property
    def is_identity(self):
        return self.config.strength == 0.0

    def attend(self, call, inner):
        call = call.replace(scaling=call.scaling * (1.0 + self.config.strength))
        output, weights = inner(call)
        if not call.kwargs.get("dropout"):
            output = attention_with_lse(call.query, call.key, call.value, call.rule())[0].transpose(1, 2)
        return output.to(call.query.dtype), weights


@dataclass(frozen=True, kw_only=True)
class CutConfig(patchattn.VariantConfig):
    heads: int = patchattn.option(1, help="How many of the last query heads are taken out.", source="ours")


class Cuts(HeadSurgery):
    """Takes query heads out of the weights, so that kv heads serve unequal numbers of them."""

    config_class = CutConfig

    def __init__(self, config, site):
        super().__init__(config, site)
        self.heads = KeptHeads.without(site, range(site.query_heads)[site.query_heads - config.heads :])

    @classmethod
    def neutral_config(cls):
        return {"heads": 0}

    def plan(self, model):
        return cut_heads(model, self.site, self.heads.kept)

    def attend(self, call, inner):
        return inner(self.heads.renumbered(call))


class Branches(DecodingVariant, Toy):
    """Contrasts the logits with those of the same tokens, made fainter, in two branches of their own."""

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        return config, sites[-1:]

    def prepare(self, model: nn.Module) -> None:
        self.generator = text_generator(model)
        super().prepare(model)

    def branches(self, step: Step) -> list[BranchStep]:
        rows, length = step.real.shape
        source = torch.arange(length, device=step.real.device).expand(rows, -1)
        image = torch.zeros_like(step.real)
        return [BranchStep(step.embeddings * factor, step.real, source, image) for factor in (0.5, 0.25)]

    def combine(self, logits: torch.Tensor, branch_logits: list[torch.Tensor]) -> torch.Tensor:
        fainter, faintest = branch_logits
        return logits + self.config.strength * (logits - 0.75 * fainter - 0.25 * faintest)


def _info(name: str, variant: type[patchattn.Variant], **facts: Any) -> patchattn.VariantInfo:
    words = {"title": "", "summary": "", "extra_parameters": ""}
    return patchattn.VariantInfo(
        name=name, variant=variant, **words, arxiv_id=None, year=2026, needs_training=False, **facts
    )


TOYS: dict[str, patchattn.VariantInfo] = {
    info.name: info
    for info in [
        _info("toy_mask", Masks),
        _info("toy_state", Remembers),
        _info("toy_store", Stores),
        _info("toy_gate", Gates),
        _info("toy_rule", Computes, innermost=True),
        _info("toy_cut", Cuts),
        _info("toy_branch", Branches, capabilities=patchattn.variant_info("damro").capabilities | {"without_images"}),
    ]
}


@contextmanager
def registered_toys() -> Iterator[None]:
    """All toys, known for the length of a `with` block."""
    with ExitStack() as stack:
        for info in TOYS.values():
            stack.enter_context(temporarily_registered(info))
        yield
