"""What is an attention site, and what only looks like one."""

import dataclasses

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import eager_attention_forward

import patchattn
from patchattn.checking.coverage.tiny import SCALES, model_classes, tiny_config, tiny_model

from .behaviour import randomise
from .families import FAMILIES, outputs


class LearnedQueries(nn.Module):
    """Mixes outputs of earlier layers `(B, T, n, E)` by attention of learned queries; T is where heads would be."""

    def __init__(self, config: tf.LlamaConfig, queries: int) -> None:
        super().__init__()
        self.config = config
        self.num_key_value_groups, self.is_causal = 1, False
        shape = (config.hidden_size,) if queries == 1 else (queries, config.hidden_size)
        self.query = nn.Parameter(torch.randn(shape))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        query = self.query.view(-1, states.shape[-1]).expand(*states.shape[:2], -1, -1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, query, states, states, None, scaling=states.shape[-1] ** -0.5)
        return output.transpose(1, 2)[:, :, 0]


class MixingLlama(tf.LlamaForCausalLM):
    def __init__(self, config: tf.LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mix = LearnedQueries(config, queries=layer.self_attn.layer_idx + 1)


def test_learned_queries_are_no_site() -> None:
    model = MixingLlama(FAMILIES["llama"].make().config)
    assert [site.name for site in patchattn.find_sites(model)] == [f"model.layers.{i}.self_attn" for i in range(2)]
    states = torch.randn(2, 4, 3, 32)  # as many tokens as the model has heads
    expected = [layer.mix(states) for layer in model.model.layers]
    patchattn.patch_model(model, ["ssa", "moh"])
    randomise(model)
    assert all(torch.equal(layer.mix(states), e) for layer, e in zip(model.model.layers, expected, strict=True))


@pytest.mark.parametrize("model_type", ["inkling2_text", "inkling2_loop_text"])
def test_a_model_with_learned_queries_between_its_layers_runs_patched(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip("not in the installed transformers")
    torch.manual_seed(0)
    model = tiny_model(model_classes(model_type)[0], tiny_config(model_type, SCALES[0])).eval()
    assert all(
        "Attention" in (kind := site.module_class) and "Residual" not in kind for site in patchattn.find_sites(model)
    )
    tokens = torch.randint(3, 60, (2, 4))
    base = outputs(model, input_ids=tokens)[0]
    patchattn.patch_model(model, "moh", active_ratio=0.5, shared_ratio=0.0)
    assert not torch.equal(outputs(model, input_ids=tokens)[0], base)
    patchattn.unpatch_model(model)
    assert torch.equal(outputs(model, input_ids=tokens)[0], base)


def test_what_a_variant_cannot_do_without_is_required() -> None:
    (site, *_) = patchattn.find_sites(FAMILIES["llama"].make())
    for fact in ("query_heads", "kv_heads", "head_dim", "input_size", "memory_size"):
        assert site.require(fact, by="Toy") == getattr(site, fact)
        unknown = dataclasses.replace(site, **{fact: None})
        with pytest.raises(NotImplementedError, match=rf"^Toy cannot tell the .* of {site.name}; give it\.$"):
            unknown.require(fact, by="Toy", instead="give it")
    unknown = dataclasses.replace(site, query_heads=None)
    for variant in ("act", "moh", "shrp", "ssmax"):
        info = patchattn.variant_info(variant)
        with pytest.raises(NotImplementedError, match=rf"cannot tell the number of query heads of {site.name}\.$"):
            info.variant(info.configure(), unknown)


def test_a_variant_that_defines_before_cache_changes_the_cache() -> None:
    (site, *_) = patchattn.find_sites(FAMILIES["llama"].make())

    class Plain(patchattn.Variant):
        config_class = patchattn.VariantConfig

    class Stores(Plain):
        def before_cache(self, key, value, context, visible):
            return key, value

    config = patchattn.VariantConfig()
    assert not Plain(config, site).changes_cache
    assert Stores(config, site).changes_cache
    ssa = patchattn.variant_info("ssa")
    for key in (True, False):
        variant = ssa.variant(ssa.configure({"key": key, "value": False}), site)
        assert variant.changes_cache is key  # some settings leave the cache alone
