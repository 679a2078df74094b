"""What the core reads of a variant is what its class defines, not the name of its sort."""

from dataclasses import dataclass

import pytest

import patchattn
from patchattn.core.registry import temporarily_registered

from .families import FAMILIES


@dataclass(frozen=True, kw_only=True)
class NoConfig(patchattn.VariantConfig):
    pass


class Shrinks(patchattn.Variant):
    """Attends, and exchanges parts of the model: of no family of variants that the package has."""

    config_class = NoConfig

    def exchange(self, model):
        pass

    def attend(self, call, inner):
        return inner(call)


def registered(variant: type[patchattn.Variant]):
    facts = {"title": "", "summary": "", "extra_parameters": "", "arxiv_id": None, "year": 2026}
    return temporarily_registered(patchattn.VariantInfo(name="shrinks", variant=variant, needs_training=False, **facts))


def test_what_exchanges_parts_of_the_model_comes_first_whoever_it_is() -> None:
    with registered(Shrinks) as name:
        model = patchattn.patch_model(FAMILIES["llama"].make(), "logn", train_length=4)
        with pytest.raises(ValueError, match=r"put it first, as in \['shrinks', 'logn'\]"):
            patchattn.patch_model(model, name)
        assert model.model.layers[0].self_attn.patchattn.names() == ["logn"]
        model = patchattn.patch_model(FAMILIES["llama"].make(), [name, "logn"], {"logn": {"train_length": 4}})
        assert model.model.layers[0].self_attn.patchattn.names() == [name, "logn"]


def test_sites_are_found_anew_behind_what_exchanges_parts_of_the_model() -> None:
    """A variant behind it is made for the shapes that it leaves."""

    class Widens(Shrinks):
        def exchange(self, model):
            attention = model.get_submodule(self.site.name)
            attention.head_dim, self.was = getattr(self, "was", 4), attention.head_dim

    sizes = []

    class Sees(patchattn.Variant):
        config_class = NoConfig

        def __init__(self, config, site):
            super().__init__(config, site)
            sizes.append(site.head_dim)

        def attend(self, call, inner):
            return inner(call)

    facts = {**vars(patchattn.variant_info("logn")), "name": "sees", "variant": Sees, "presets": {}, "examples": ({},)}
    with registered(Widens) as name, temporarily_registered(patchattn.VariantInfo(**facts)) as other:
        before = [site["head_dim"] for site in patchattn.patch_info(FAMILIES["llama"].make()).sites]
        patchattn.patch_model(FAMILIES["llama"].make(), [name, other])
    assert before == [8, 8]
    assert sizes == [4, 4]
