"""Patching, unpatching and composing; every mistake a user can make, and the model as it was after it."""

import copy
import gc
import threading
from functools import partial

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

import patchattn
from patchattn.hosts.transformers.bases import live_chains
from patchattn.hosts.transformers.compatibility import seam_name

from .behaviour import assert_same, implementations, randomise, registered, snapshot
from .families import FAMILIES, outputs
from .long_context import BYTES
from .toy import Toy


@pytest.fixture
def llama() -> nn.Module:
    return FAMILIES["llama"].make()


@pytest.fixture
def tokens() -> torch.Tensor:
    return FAMILIES["llama"].inputs()["input_ids"]


def test_the_first_of_several_variants_is_outermost(llama, tokens, toy) -> None:
    seen: list[tuple[str, torch.Tensor]] = []
    patchattn.patch_model(llama, [toy, "moh"], {"moh": {"active_ratio": 0.5}})
    chain = llama.model.layers[0].self_attn.patchattn
    assert chain.names() == ["toy", "moh"]
    with patchattn.observe(llama, lambda got: seen.append((next(iter(got.values)), got.source.query))):
        both = outputs(llama, input_ids=tokens)[0]
    assert [name for name, _ in seen[:2]] == ["query", "gate"]
    torch.testing.assert_close(seen[1][1], seen[0][1] + 1.0)  # the inner one sees what the outer one made of the query
    patchattn.unpatch_model(llama)
    patchattn.patch_model(llama, toy)
    patchattn.patch_model(llama, "moh", active_ratio=0.5)  # a later patch goes inside
    assert torch.equal(outputs(llama, input_ids=tokens)[0], both)
    assert [patch["variant"] for patch in patchattn.patch_info(llama)["patches"]] == ["toy", "moh"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("mho",), ValueError, "Unknown variant 'mho'; did you mean 'moh'"),
        ((3,), TypeError, "variant must be a name or a list"),
        (([],), TypeError, "variant must be a name or a list"),
        ((["moh", "moh"],), ValueError, "same variant twice"),
        (("moh", {"active_ratoi": 0.5}), ValueError, "did you mean 'active_ratio'"),
        (("moh", 0.5), TypeError, "Settings are a dictionary"),
        ((["ssa", "moh"], {"mho": {}}), ValueError, "did you mean 'moh'"),
        ((["ssa", "moh"], 3), TypeError, "map names to settings"),
    ],
)
def test_bad_arguments(llama, arguments, error, message) -> None:
    before = snapshot(llama)
    with pytest.raises(error, match=message):
        patchattn.patch_model(llama, *arguments)
    assert_same(before, snapshot(llama))


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"layers": 7}, ValueError, "There is no layer 7: layers with attention are 0 to 1"),
        ({"layers": -1}, ValueError, "There is no layer -1"),
        ({"layers": []}, ValueError, "layers is empty"),
        ({"layers": "0"}, TypeError, "layers must be an integer or several"),
        ({"layers": [0.5]}, TypeError, "layers must be integers"),
        ({"layers": True}, TypeError, "layers must be integers"),
        ({"modules": "vision"}, ValueError, "matches none of the 2 attention modules"),
        ({"modules": "("}, ValueError, "not a valid regular expression"),
        ({"modules": 3}, TypeError, "must be a regular expression"),
    ],
)
def test_bad_places(llama, where, error, message) -> None:
    before = snapshot(llama)
    with pytest.raises(error, match=message):
        patchattn.patch_model(llama, "moh", **where)
    assert_same(before, snapshot(llama))


def test_settings_twice_and_settings_of_several_are_refused(llama) -> None:
    with pytest.raises(ValueError, match="not both"):
        patchattn.patch_model(llama, "moh", {"active_ratio": 0.5}, router="learned")
    with pytest.raises(ValueError, match="give settings per name"):
        patchattn.patch_model(llama, ["moh", "ssa"], active_ratio=0.5)
    with pytest.raises(TypeError, match="configured by MoHConfig, got SSAConfig"):
        patchattn.patch_model(llama, "moh", patchattn.variant_info("ssa").variant.config_class())


def test_a_failure_in_the_last_layer_leaves_the_model_as_it_was(llama, toy) -> None:
    before = snapshot(llama)
    with pytest.raises(NotImplementedError, match="cannot be built"):
        patchattn.patch_model(llama, toy, fail_at=1)
    assert_same(before, snapshot(llama))
    patchattn.patch_model(llama, "ssa")
    before = snapshot(llama)
    with pytest.raises(NotImplementedError, match="cannot be built"):
        patchattn.patch_model(llama, toy, fail_at=1)
    assert_same(before, snapshot(llama))


def test_the_wrong_state_of_a_model(llama) -> None:
    with pytest.raises(ValueError, match="is not patched"):
        patchattn.unpatch_model(llama)
    with pytest.raises(TypeError, match="expects a model, got dict"):
        patchattn.patch_model({}, "moh")
    with pytest.raises(TypeError, match="expects a model, got str: load it first, with from_pretrained"):
        patchattn.patch_model("some/model", "moh")
    pipe = tf.TextGenerationPipeline(model=llama, tokenizer=BYTES)
    for call in (partial(patchattn.patch_model, variant="moh"), patchattn.unpatch_model, patchattn.patch_info):
        with pytest.raises(TypeError, match=r"got TextGenerationPipeline, whose model is its \.model: give that"):
            call(pipe)
    with pytest.raises(TypeError, match="transformers model"):
        patchattn.patch_model(nn.Linear(2, 2), "moh")
    patchattn.patch_model(llama, "moh")
    with pytest.raises(ValueError, match="already has the variant 'moh'"):
        patchattn.patch_model(llama, "moh", layers=1)
    with pytest.raises(ValueError, match="this one is patched"), patchattn.patched(llama, "ssa"):
        pass
    assert len(patchattn.patch_info(llama)["patches"]) == 1


def test_other_layers_may_have_other_settings(llama, tokens) -> None:
    patchattn.patch_model(llama, "moh", active_ratio=0.5, layers=0)
    patchattn.patch_model(llama, "moh", active_ratio=0.75, layers=1)
    gates: dict[int, float] = {}
    with patchattn.observe(
        llama, lambda seen: gates.update({seen.site.layer_index: float(seen.values["gate"].mean())})
    ):
        outputs(llama, input_ids=tokens)
    assert gates == {0: 0.5, 1: 0.75}


def test_patched_restores_after_an_exception(llama) -> None:
    before = snapshot(llama)
    with patchattn.patched(llama, "moh") as inside:
        assert inside is llama
    with pytest.raises(KeyError), patchattn.patched(llama, "moh"):
        raise KeyError
    assert_same(before, snapshot(llama))


def test_unpatched_brings_trained_values_back(llama, tokens) -> None:
    base = outputs(llama, input_ids=tokens)[0]
    patchattn.patch_model(llama, "ssa")
    randomise(llama)
    trained, before = outputs(llama, input_ids=tokens)[0], snapshot(llama)
    with patchattn.unpatched(llama):
        assert torch.equal(outputs(llama, input_ids=tokens)[0], base)
    after = snapshot(llama)
    for key in ("state", "config", "implementations", "modules", "attributes"):
        assert_same({key: before[key]}, {key: after[key]})
    assert torch.equal(outputs(llama, input_ids=tokens)[0], trained)


def test_layers_may_come_from_numpy(llama) -> None:
    patchattn.patch_model(llama, "moh", layers=np.arange(1, 2))
    assert patchattn.patch_info(llama)["patches"][0]["sites"] == ["model.layers.1.self_attn"]


def test_towers_are_chosen_by_name() -> None:
    model = FAMILIES["llava"].make()
    patchattn.patch_model(model, "moh", modules=r"language_model\..*")
    towers = {site["tower"] for site in patchattn.patch_info(model)["sites"] if site["variants"]}
    assert towers == {"model.language_model"}
    assert implementations(model).count("patchattn_sdpa") == 2  # one for each layer of the language model


def test_cross_attention_is_a_site_of_its_own() -> None:
    model = FAMILIES["bart"].make()
    patchattn.patch_model(model, "ssa", modules="encoder_attn")
    sites = [site for site in patchattn.patch_info(model)["sites"] if site["variants"]]
    assert len(sites) == 2
    assert all(site["is_cross"] for site in sites)


def test_gemma4_branches_on_the_name_outside_its_attention() -> None:
    """Its text model asks for the implementation by name; it is still shown the base's."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "vocab_size": 64}
    config = tf.Gemma4TextConfig(**sizes, **heads, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8)
    torch.manual_seed(0)
    model, tokens = tf.Gemma4ForCausalLM(config).eval(), FAMILIES["llama"].inputs()["input_ids"]
    with torch.no_grad():
        expected = model(tokens, logits_to_keep=3).logits
        patchattn.patch_model(model, "moh", active_ratio=1.0)
        assert torch.equal(model(tokens, logits_to_keep=3).logits, expected)
        patchattn.unpatch_model(model)
        patchattn.patch_model(model, "moh", active_ratio=0.5)
        assert not torch.equal(model(tokens, logits_to_keep=3).logits, expected)


def test_models_on_one_configuration_do_not_meet(tokens) -> None:
    config = FAMILIES["llama"].make().config
    first, second = (tf.LlamaForCausalLM(config).eval() for _ in range(2))
    plain = outputs(second, input_ids=tokens)[0]
    patchattn.patch_model(first, "moh")
    assert config._attn_implementation == "sdpa"
    third = tf.LlamaForCausalLM(config).eval()
    third.load_state_dict(second.state_dict())
    assert torch.equal(outputs(second, input_ids=tokens)[0], plain)
    patchattn.patch_model(second, "ssa")
    randomise(second)
    changed = outputs(second, input_ids=tokens)[0]
    patchattn.unpatch_model(first)
    assert torch.equal(outputs(second, input_ids=tokens)[0], changed)
    assert not torch.equal(changed, plain)
    assert torch.equal(outputs(third, input_ids=tokens)[0], plain)


def test_only_patched_modules_see_another_configuration(llama) -> None:
    config = llama.config
    patchattn.patch_model(llama, "moh", layers=1)
    assert llama.config is config
    assert [layer.self_attn.config is config for layer in llama.model.layers] == [True, False]
    assert config._attn_implementation == "sdpa"
    patchattn.patch_model(llama, "ssa")
    assert all(layer.self_attn.config is not config for layer in llama.model.layers)
    assert sum(len(layer.self_attn._forward_pre_hooks) for layer in llama.model.layers) == 2
    patchattn.unpatch_model(llama)
    assert all(layer.self_attn.config is config for layer in llama.model.layers)


def test_the_registry_is_left_clean(llama) -> None:
    gc.collect()
    patchattn.patch_model(llama, "moh")
    assert "patchattn_sdpa" in registered()
    twin = copy.deepcopy(llama)
    patchattn.unpatch_model(llama)
    assert "patchattn_sdpa" in registered()  # the twin still needs it
    patchattn.unpatch_model(twin)
    gc.collect()  # of what earlier tests left behind
    patchattn.unpatch_model(patchattn.patch_model(llama, "moh"))
    if any(name.startswith("patchattn_") for name in registered()):
        assert {chain.base for chain in live_chains}, "registered for no model at all"


@pytest.mark.parametrize("family", ["Rwkv", "Reformer"])
def test_families_without_a_softmax_are_refused_by_name(family) -> None:
    model_class, config = getattr(tf, f"{family}Model"), getattr(tf, f"{family}Config")()
    with torch.device("meta"):
        refused = model_class(config)
    modules = [name for name, _ in refused.named_modules()]
    with pytest.raises(
        NotImplementedError, match=f"'{config.model_type}'.*does not call transformers' attention interface"
    ):
        patchattn.patch_model(refused, "moh")
    assert [name for name, _ in refused.named_modules()] == modules


@torch.no_grad()
def test_a_branch_by_the_implementations_name_that_calls_no_attention_function_is_refused() -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50}
    tokens = torch.tensor([[5, 9, 3]])
    model = tf.GPT2Model(tf.GPT2Config(**sizes, reorder_and_upcast_attn=True, attn_implementation="eager")).eval()
    before = model(tokens)[0]
    patchattn.patch_model(model, "logn", train_length=2)  # which needs nothing of the module's input
    with pytest.raises(NotImplementedError, match="asks for the implementation by name, and under 'eager' calls no"):
        model(tokens)
    patchattn.unpatch_model(model)
    assert torch.equal(model(tokens)[0], before)
    model = tf.GPT2Model(tf.GPT2Config(**sizes, attn_implementation="eager")).eval()
    patchattn.patch_model(model, "moh")  # where that branch makes no difference, it is no reason
    assert bool(model(tokens)[0].isfinite().all())


def test_registration_checks_what_it_is_given(toy) -> None:
    info = patchattn.variant_info("moh")
    with pytest.raises(TypeError, match="expects a VariantInfo"):
        patchattn.register_variant("moh")
    for changes, error, message in (
        ({"name": "My-Variant"}, ValueError, "lower-case identifier"),
        ({"name": "moh", "variant": Toy}, ValueError, "registered already"),
        ({"name": "other", "variant": nn.Linear}, TypeError, "subclass of patchattn.Variant"),
        ({"name": "other", "capabilities": frozenset({"speed"})}, ValueError, "unknown capabilities"),
    ):
        with pytest.raises(error, match=message):
            patchattn.register_variant(type(info)(**{**vars(info), **changes}))
    with pytest.raises(ValueError, match="did you mean 'ssa'"):
        patchattn.variant_info("sssa")
    assert patchattn.list_variants() == sorted(patchattn.list_variants())


def test_names_of_the_seam_are_no_hub_kernels() -> None:
    for base in ("sdpa", "eager", "flash_attention_2", "kernels-community/flash-attn2@v1:flash"):
        name = seam_name(base)
        assert "/" not in name
        assert "|" not in name
        assert ("flash" in name) == ("flash" in base)  # model code looks for that word


def test_threads_do_not_see_each_others_layers(tokens) -> None:
    model = patchattn.patch_model(FAMILIES["qwen3"].make(), ["ssa", "moh"])
    randomise(model)
    batches = [tokens[:, :length] for length in (3, 5, 7, 9)]
    expected = [outputs(model, input_ids=batch)[0] for batch in batches]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.equal(outputs(model, input_ids=batches[index])[0], expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_calling_forward_around_the_hooks_is_refused(tokens) -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "ssa")
    layer = model.model.layers[0].self_attn
    hidden = torch.randn(2, 9, 32)
    angles = model.model.rotary_emb(hidden, torch.arange(9)[None])
    with pytest.raises(RuntimeError, match="must be called, not its forward"):
        layer.forward(hidden_states=hidden, position_embeddings=angles)


def test_what_a_site_is_made_of_and_what_it_lies_in_is_no_attention_that_is_left_out() -> None:
    from patchattn.core.host import host

    for model_class, config in (
        (tf.CvtModel, tf.CvtConfig()),  # convolutions inside
        (tf.LxmertModel, tf.LxmertConfig(l_layers=1, x_layers=1, r_layers=1)),  # an output projection beside
        (
            tf.DabDetrModel,
            tf.DabDetrConfig(backbone_config=tf.ResNetConfig(out_features=["stage4"]), use_timm_backbone=False),
        ),  # projections around
    ):
        with torch.device("meta"):
            model = model_class(config)
        assert not host().find_undispatched(model)
        first = host().find_sites(model)[0]
        parent, _, name = first.name.rpartition(".")
        unknown = type("UnknownAttention", (torch.nn.Module,), {"forward": lambda self, states: states})()
        unknown.query, unknown.key = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        setattr(model.get_submodule(parent), f"{name}_beside", unknown)
        assert [found for found, _ in host().find_undispatched(model)] == [f"{first.name}_beside"]
