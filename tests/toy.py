"""A variant for tests: it shifts the query, scales the output, and cannot be built where it is told so."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import patchattn
from patchattn.core.registry import temporarily_registered


@dataclass(frozen=True, kw_only=True)
class ToyConfig(patchattn.VariantConfig):
    factor: float = patchattn.option(2.0, help="Multiplies the output.", source="ours")
    fail_at: int = patchattn.option(-1, help="Layer that cannot be built.", source="ours")


class Toy(patchattn.Variant):
    config_class = ToyConfig

    def __init__(self, config, site) -> None:
        super().__init__(config, site)
        if site.layer_index == config.fail_at:
            raise NotImplementedError("this layer cannot be built")

    def attend(self, call, inner):
        self.report(call, query=call.query)
        output, weights = inner(call.replace(query=call.query + 1.0))
        return output * self.config.factor, weights


@contextmanager
def registered_toy(missing: frozenset[str]) -> Iterator[str]:
    """The name of the toy variant, registered without some capabilities."""
    capabilities = patchattn.variant_info("moh").capabilities - missing
    words = {"title": "", "summary": "", "extra_parameters": ""}
    facts = {**words, "arxiv_id": None, "year": 2026, "needs_training": False}
    with temporarily_registered(
        patchattn.VariantInfo(name="toy", variant=Toy, capabilities=capabilities, **facts)
    ) as name:
        yield name
