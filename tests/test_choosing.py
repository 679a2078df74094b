"""Which attention modules are patched, which variants are listed, and what a patched model says of itself."""

import json
from dataclasses import fields

import pytest

import patchattn
from patchattn.cli.main import main

from .families import FAMILIES
from .toy import registered_toy

SHIPPED = [
    "a_vl",
    "act",
    "adakv",
    "agent",
    "ape",
    "attention_bias",
    "attention_buckets",
    "attention_transition",
    "axial",
    "bibert",
    "biformer",
    "block_attention",
    "cad",
    "cca",
    "cope",
    "damro",
    "decore",
    "dex",
    "differential",
    "dma",
    "duo",
    "ee_mllm",
    "entmax",
    "exclusive",
    "expected_attention",
    "fastv",
    "flap",
    "flex_prefill",
    "focus_icl",
    "fox",
    "function_vectors",
    "gated",
    "gin",
    "gpsa",
    "gqa_convert",
    "graph_kv",
    "h2o",
    "halo",
    "hat",
    "hdt",
    "heads",
    "hepos",
    "hilo",
    "hip",
    "hiprune",
    "hyper",
    "keydiff",
    "knorm",
    "landmark",
    "layer_shortcuts",
    "logn",
    "longheads",
    "longlora",
    "lserve",
    "massive",
    "maxvit",
    "meta_tokens",
    "moba",
    "moh",
    "mswa",
    "mta",
    "neighborhood",
    "nosa",
    "nsa",
    "pai",
    "paint",
    "parallel_context",
    "power",
    "prune",
    "pyramidkv",
    "qk_norm",
    "quadrangle",
    "quest",
    "rbd_like",
    "recycled",
    "self_extend",
    "shrp",
    "sigmoid",
    "sink",
    "snapkv",
    "softpick",
    "sparsifiner",
    "squeezed",
    "ssa",
    "ssmax",
    "streaming",
    "streaming_llm",
    "subsampled",
    "talking_heads",
    "task_vectors",
    "think",
    "tova",
    "triangle",
    "twilight",
    "urpe",
    "var",
    "vcd",
    "vertical_slash",
    "vhr",
    "window",
    "xattention",
]


def patched_sites(model) -> list[str]:
    return [site["name"] for site in patchattn.patch_info(model).sites if site["variants"]]


def test_several_patterns_choose_what_any_of_them_matches() -> None:
    model = FAMILIES["bart"].make()
    names = [site.name for site in patchattn.find_sites(model)]
    patchattn.patch_model(model, "ssmax", modules=["encoder_attn", r"decoder\.layers\.0\.", "encoder_attn"])
    expected = [name for name in names if "encoder_attn" in name or "decoder.layers.0." in name]
    assert patched_sites(model) == expected
    assert 0 < len(expected) < len(names)


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        (["self_attn", "nowhere"], ValueError, "'nowhere' matches none"),
        ([], ValueError, "modules is empty"),
        (["self_attn", 3], TypeError, "must be regular expressions, got 3"),
        (b"self_attn", TypeError, "a regular expression or several"),
        (7, TypeError, "a regular expression or several"),
        (["self_attn", "("], ValueError, "is not a valid regular expression"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(modules, error, message) -> None:
    model = FAMILIES["llama"].make()
    with pytest.raises(error, match=message):
        patchattn.patch_model(model, "ssmax", modules=modules)
    assert not patched_sites(model)


def test_layers_go_by_pefts_name_too() -> None:
    model = FAMILIES["llama"].make()
    patchattn.patch_model(model, "ssmax", layers_to_transform=[1])
    assert patched_sites(model) == ["model.layers.1.self_attn"]
    with patchattn.patched(FAMILIES["llama"].make(), "moh", layers_to_transform=0) as other:
        assert patched_sites(other) == ["model.layers.0.self_attn"]
    fresh = FAMILIES["llama"].make()
    with pytest.raises(ValueError, match="layers or layers_to_transform, not both"):
        patchattn.patch_model(fresh, "ssmax", layers=[0], layers_to_transform=[0])
    with pytest.raises(ValueError, match="There is no layer 9"):
        patchattn.patch_model(fresh, "ssmax", layers_to_transform=9)
    with pytest.raises(ValueError, match="chooses its own attention modules"):
        patchattn.patch_model(fresh, "damro", layers_to_transform=0)
    assert not patched_sites(fresh)


def test_info_is_a_mapping_of_its_own_fields() -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), ["ssmax", "logn"], layers=1)
    info = patchattn.patch_info(model)
    assert list(info) == [field.name for field in fields(info)]
    assert len(info) == 4
    assert all(info[name] is getattr(info, name) for name in info)
    assert [patch["variant"] for patch in info["patches"]] == ["ssmax", "logn"]
    assert {**info} == info
    assert json.loads(json.dumps({**info}))["patches"] == info.patches
    added = 2 * sum(site["query_heads"] for site in info.sites if site["variants"])  # a scale and a bias per head
    assert info.extra_parameters == added
    assert repr(info) == (f"PatchInfo(ssmax on 1 of 2, logn on 1 of 2 attention modules, {added} extra parameters)")
    with pytest.raises(KeyError):
        info["nothing"]
    assert "nothing" not in info
    plain = patchattn.patch_info(patchattn.unpatch_model(model))
    assert repr(plain) == "PatchInfo(nothing on any of 2 attention modules, 0 extra parameters)"
    assert plain != info


def test_variants_are_listed_by_what_they_are() -> None:
    infos = {name: patchattn.variant_info(name) for name in SHIPPED}
    assert patchattn.list_variants() == SHIPPED
    assert patchattn.list_variants("surgery") == ["flap", "gqa_convert", "prune", "shrp"]
    assert patchattn.list_variants(family="temperature") == ["logn", "qk_norm", "ssa", "ssmax"]
    assert patchattn.list_variants("surgery", family="temperature") == []
    for wanted in (True, False):
        named = [name for name in SHIPPED if infos[name].needs_training is wanted]
        assert named
        assert patchattn.list_variants(needs_training=wanted) == named
    assert "var" in patchattn.list_variants(capability="kv_cache")
    assert "var" not in patchattn.list_variants(capability="without_images")
    both = {"causal", "cross"}
    assert patchattn.list_variants(capability=both) == [n for n in SHIPPED if both <= infos[n].capabilities]
    with registered_toy(frozenset()) as name:
        assert patchattn.variant_info(name).family == "other"
        assert patchattn.list_variants(family="other") == [name]


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"kind": "attentoin"}, ValueError, "no kind 'attentoin'; did you mean 'attention'"),
        ({"family": "llama"}, ValueError, "no family 'llama'.*temperature"),
        ({"capability": "kv_cash"}, ValueError, "did you mean 'kv_cache'"),
        ({"capability": ["gqa", "speed"]}, ValueError, "no capability 'speed'"),
        ({"needs_training": "no"}, TypeError, "True, False or None, got 'no'"),
        ({"family": 3}, TypeError, "named by a string, got int"),
    ],
)
def test_a_choice_that_there_is_not_is_refused(choice, error, message) -> None:
    with pytest.raises(error, match=message):
        patchattn.list_variants(**choice)


def test_the_command_lists_by_the_same_choices(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main(["list", "--kind", "attention", "--training-free", "--capability", "without_images"])
    assert ended.value.code == 0
    table = capsys.readouterr().out
    named = [line.split()[0] for line in table.splitlines() if line.startswith("  ")]
    assert sorted(name for name in named if name in SHIPPED) == [
        "act",
        "ape",
        "attention_transition",
        "flex_prefill",
        "focus_icl",
        "function_vectors",
        "graph_kv",
        "heads",
        "hip",
        "hyper",
        "logn",
        "longheads",
        "lserve",
        "massive",
        "parallel_context",
        "quest",
        "recycled",
        "self_extend",
        "sparsifiner",
        "squeezed",
        "streaming",
        "task_vectors",
        "triangle",
        "twilight",
        "vertical_slash",
        "xattention",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["list", "--family", "nothing"])
    assert ended.value.code == 2
    assert "There is no family 'nothing'" in capsys.readouterr().err
