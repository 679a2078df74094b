"""Head pruning: removed equals masked equals zeroed by hand; exact undo; saved and reloaded; refusals."""

import copy
import re

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument

from .families import FAMILIES, outputs
from .saving import base as small_llama

WIDTH = 8  # of a head, in every family
# The projection that reads the heads, as each family calls it; Conv1D stores its inputs first.
OUTPUTS = (".o_proj", ".out_proj", ".c_proj", "attention.dense", "attention.output.dense", ".out_lin", ".Wo")
OUTPUTS += ("Attention.o", ".proj")
ATTENTION = re.compile(r"(?i)attn|attention")


def zeroed(model: nn.Module, layer: int, heads: list[int]) -> nn.Module:
    """The model with nothing read from some heads of a layer, in all towers: an independent reference."""
    found = 0
    for name, module in model.named_modules():
        number = re.search(r"\.(\d+)\.", f".{name}.")
        if number is None or int(number[1]) != layer or not (name.endswith(OUTPUTS) and ATTENTION.search(name)):
            continue
        weight = module.weight.data if hasattr(module, "nf") else module.weight.data.T
        for head in heads:
            weight[head * WIDTH : (head + 1) * WIDTH] = 0.0
        found += 1
    assert found
    return model


@pytest.mark.parametrize("heads", [[0], [1, 2], [0, 1, 3]], ids=str)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_removed_equals_masked_equals_zeroed_by_hand(family: str, heads: list[int]) -> None:
    make, inputs = FAMILIES[family].make_exact, FAMILIES[family].inputs()
    dtype = next(make().parameters()).dtype
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    expected = outputs(zeroed(make(), 1, heads), **inputs)
    before = sum(p.numel() for p in make().parameters())
    for physical in (True, False):
        model = patchattn.patch_model(make(), "prune", heads={1: heads}, physical=physical)
        for left, right in zip(expected, outputs(model, **inputs), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9 if dtype == torch.float64 else 1e-4)
        assert (sum(p.numel() for p in model.parameters()) < before) == physical


@pytest.mark.parametrize(
    ("family", "heads", "removed"),
    [
        # (weights and biases of q, k and v) + weights of the output, 32 wide
        ("bert", [0, 1], 2 * (3 * (32 * 8 + 8) + 8 * 32)),
        ("gpt2", [3], 3 * (32 * 8 + 8) + 8 * 32),
        ("gpt_neox", [2], 3 * (32 * 8 + 8) + 8 * 32),
        ("llama", [0], 32 * 8 + 8 * 32),  # its kv head serves another
        ("llama", [0, 1], 2 * (32 * 8 + 8 * 32) + 2 * 32 * 8),  # the kv head goes too
        ("phi3", [2, 3], 2 * (32 * 8 + 8 * 32) + 2 * 32 * 8),
        ("qwen3", [0, 1, 2], 3 * (32 * 8 + 8 * 32) + 2 * 32 * 8),
    ],
)
def test_parameters_saved_by_formula(family: str, heads: list[int], removed: int) -> None:
    model = FAMILIES[family].make()
    before = sum(p.numel() for p in model.parameters())
    patchattn.patch_model(model, "prune", heads={0: heads})
    assert before - sum(p.numel() for p in model.parameters()) == removed


@settings(max_examples=25, deadline=None)
@given(
    removed=st.lists(st.sets(st.integers(0, 3), max_size=3), min_size=2, max_size=2).filter(lambda sets: any(sets)),
    implementation=st.sampled_from(["sdpa", "eager"]),
)
def test_any_heads_of_a_grouped_model(removed: list[set[int]], implementation: str) -> None:
    heads = {layer: sorted(chosen) for layer, chosen in enumerate(removed) if chosen}
    make, inputs = FAMILIES["llama"].make_exact, FAMILIES["llama"].inputs()
    expected = make()
    for layer, chosen in heads.items():
        zeroed(expected, layer, chosen)
    model = make()
    model.set_attn_implementation(implementation)
    patchattn.patch_model(model, "prune", heads=heads)
    small = 1e-9 if implementation == "sdpa" else 1e-5  # transformers' eager softmax is in float32
    torch.testing.assert_close(outputs(model, **inputs)[0], outputs(expected, **inputs)[0], rtol=small, atol=small)


def test_the_kv_cache_shrinks_with_whole_groups_only() -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "prune", heads={0: [0, 1], 1: [0]})
    cache = DynamicCache(config=model.config)
    outputs(model, **FAMILIES["llama"].inputs(), **cache_argument(model, cache))
    assert [layer.keys.shape[1] for layer in cache.layers] == [1, 2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "phi3"])
def test_unpatching_gives_back_the_same_tensors(family: str) -> None:
    model = FAMILIES[family].make()
    parameters = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in parameters.items()}
    patchattn.patch_model(model, "prune", heads={0: [0], 1: [2, 3]})
    for parameter in model.parameters():  # as training would
        parameter.data.add_(1.0)
    touched = {name for name, p in model.named_parameters() if p is parameters[name]}
    patchattn.unpatch_model(model)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, values[name] + 1.0 if name in touched else values[name])


def test_what_was_taken_out_follows_the_model_to_another_dtype() -> None:
    model, inputs = FAMILIES["bert"].make(), FAMILIES["bert"].inputs()
    expected = outputs(copy.deepcopy(model).double(), **inputs)[0]
    patchattn.patch_model(model, "prune", heads={0: [0]}).double()
    torch.testing.assert_close(outputs(patchattn.unpatch_model(model), **inputs)[0], expected)


def test_training_a_pruned_model_survives_a_look_at_the_whole_one() -> None:
    model, inputs = FAMILIES["llama"].make(), FAMILIES["llama"].inputs()
    whole = outputs(model, **inputs)[0]
    patchattn.patch_model(model, "prune", heads={1: [0, 1]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    trained = outputs(model, **inputs)[0]
    kept = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    with patchattn.unpatched(model):
        assert model.model.layers[1].self_attn.q_proj.weight.shape == (32, 32)
        assert not torch.equal(outputs(model, **inputs)[0], whole)  # the other weights are trained
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, kept)
    assert torch.equal(outputs(model, **inputs)[0], trained)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "t5", "bert", "vit"])
def test_a_pruned_model_is_saved_reloaded_and_trained_on(family: str, tmp_path) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
    patchattn.patch_model(model, "prune", heads={0: [1], 1: [0, 1]})
    expected = outputs(model, **inputs)
    patchattn.save_pretrained(model, tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):  # transformers alone must not load it as something else
        type(model).from_pretrained(tmp_path)
    loaded = patchattn.from_pretrained(tmp_path)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    for left, right in zip(expected, outputs(loaded, **inputs), strict=True):
        assert torch.equal(left, right)
    loaded.train()(**inputs).logits.pow(2).mean().backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad and p.shape == (24, 32))
    with pytest.raises(ValueError, match="was loaded without what Prune took out"):
        patchattn.unpatch_model(loaded)
    patchattn.save_pretrained(loaded, tmp_path / "again")
    again = patchattn.from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again, **inputs)[0], expected[0])


def test_a_pruned_model_generates_with_every_cache(tmp_path) -> None:
    model = FAMILIES["llama"].make_exact()
    patchattn.patch_model(model, "prune", heads={0: [0, 1], 1: [3]})
    patchattn.save_pretrained(model, tmp_path)
    loaded = patchattn.from_pretrained(tmp_path, dtype=torch.float64)
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **settings, use_cache=False)
    for one in (model, loaded):
        assert torch.equal(one.generate(tokens, **settings), expected)
        static = one.generate(tokens, **settings, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, expected)


def test_other_variants_come_after_it_and_are_reloaded_with_it(tmp_path) -> None:
    model, inputs = FAMILIES["llama"].make(), FAMILIES["llama"].inputs()
    whole = outputs(model, **inputs)[0]
    patchattn.patch_model(
        model, ["prune", "moh"], {"prune": {"heads": {0: [0, 1], 1: [3]}}, "moh": {"active_ratio": 0.5}}
    )
    assert [site["query_heads"] for site in patchattn.patch_info(model)["sites"]] == [2, 3]
    expected = outputs(model, **inputs)[0]
    patchattn.save_pretrained(model, tmp_path / "whole")
    assert torch.equal(outputs(patchattn.from_pretrained(tmp_path / "whole"), **inputs)[0], expected)
    patchattn.save_patch(model, tmp_path / "patch")
    loaded = patchattn.load_patch(FAMILIES["llama"].make(), tmp_path / "patch")
    assert torch.equal(outputs(loaded, **inputs)[0], expected)
    assert torch.equal(outputs(patchattn.unpatch_model(model), **inputs)[0], whole)


def test_a_second_call_adds_to_it() -> None:
    model, inputs = FAMILIES["bert"].make(), FAMILIES["bert"].inputs()
    whole = outputs(model, **inputs)[0]
    patchattn.patch_model(model, "prune", heads={0: [0, 1]})
    patchattn.patch_model(model, "moh", active_ratio=0.5)
    patchattn.unpatch_model(model)
    patchattn.patch_model(model, "prune", modules=r"layer\.0\.", heads={0: [0, 1]})
    patchattn.patch_model(model, "moh", active_ratio=0.5, layers=0)
    patchattn.patch_model(model, "prune", layers=1, heads={1: [0]})
    assert patchattn.patch_info(model)["sites"][0]["variants"] == ["prune", "moh"]
    outputs(model, **inputs)
    assert torch.equal(outputs(patchattn.unpatch_model(model), **inputs)[0], whole)


def test_heads_by_module_pairs_and_file(tmp_path) -> None:
    name = "model.layers.1.self_attn"
    (tmp_path / "heads.json").write_text('{"1": [0, 3]}')
    for heads in ({1: [0, 3]}, {"1": [3, 0]}, [(1, 0), (1, 3)], {name: [0, 3]}, str(tmp_path / "heads.json")):
        model = patchattn.patch_model(FAMILIES["llama"].make(), "prune", heads=heads)
        assert patchattn.patch_info(model)["patches"] == [
            {
                "variant": "prune",
                "config": {**patchattn.variant_info("prune").variant.config_class().to_dict(), "heads": {name: [0, 3]}},
                "sites": [name],
            }
        ]


def test_sparsity_takes_the_heads_of_least_norm() -> None:
    model = FAMILIES["bert"].make()
    with torch.no_grad():
        for layer, head in ((0, 2), (1, 1)):
            for name in ("query", "key", "value"):
                own = model.get_submodule(f"bert.encoder.layer.{layer}.attention.self.{name}")
                own.weight[head * WIDTH : (head + 1) * WIDTH] *= 1e-3
            model.bert.encoder.layer[layer].attention.output.dense.weight[:, head * WIDTH : (head + 1) * WIDTH] *= 1e-3
    patchattn.patch_model(model, "prune", sparsity=0.25, importance="magnitude")
    (patch,) = patchattn.patch_info(model)["patches"]
    assert patch["config"]["heads"] == {
        "bert.encoder.layer.0.attention.self": [2],
        "bert.encoder.layer.1.attention.self": [1],
    }


def test_sparsity_by_scores_in_a_file_or_at_hand(tmp_path) -> None:
    model, inputs = FAMILIES["llama"].make(), FAMILIES["llama"].inputs()
    importance = patchattn.head_importance(model, [inputs], "michel")
    importance.save(tmp_path / "scores.json")
    expected = {name: list(heads) for name, heads in importance.lowest(count=3).items()}
    for scores in (importance, str(tmp_path / "scores.json")):
        with patchattn.patched(model, "prune", sparsity=0.4, importance=scores):  # 3.2 of 8 heads
            (patch,) = patchattn.patch_info(model)["patches"]
            assert patch["config"]["heads"] == expected
    other = tf.LlamaForCausalLM(
        tf.LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=9)
    )
    with pytest.raises(ValueError, match="Score this model anew"):
        patchattn.patch_model(other, "prune", sparsity=0.4, importance=importance)


def test_a_pruned_encoder_is_exported(tmp_path) -> None:
    model, inputs = FAMILIES["bert"].make(), FAMILIES["bert"].inputs()
    patchattn.patch_model(model, "prune", heads={0: [0, 2], 1: [1]})
    expected = outputs(model, **inputs)[0]
    tokens = inputs["input_ids"]
    program = torch.export.export(model, (), {"input_ids": tokens})
    torch.testing.assert_close(program.module()(input_ids=tokens).logits, expected)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids).logits

    torch.onnx.export(Logits().eval(), (tokens,), tmp_path / "bert.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "bert.onnx")
    (result,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-4, atol=1e-4)


# --- refusals


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({}, ValueError, "needs heads"),
        ({"heads": {}}, ValueError, "empty"),
        ({"heads": {1: [0, 1, 2, 3]}}, ValueError, "All 4 query heads"),
        ({"heads": {1: [0, 0]}}, ValueError, "twice"),
        ({"heads": [(1, 0), (1, 0)]}, ValueError, "twice"),
        ({"heads": {1: [4]}}, ValueError, "counted from 0"),
        ({"heads": {7: [0]}}, ValueError, "counted from 0"),
        ({"heads": {"model.layers.9.self_attn": [0]}}, ValueError, "no attention module"),
        ({"heads": {"model.layers.1.self_attn": [4]}}, ValueError, "counted from 0"),
        ({"heads": {"model.layers.1.self_attn": [0, 1, 2, 3]}}, ValueError, "All 4"),
        ({"heads": {1: "0"}}, TypeError, "list of heads"),
        ({"heads": {1: [True]}}, TypeError, "integers"),
        ({"heads": "missing.json"}, ValueError, "no head list"),
        ({"heads": {1: [0]}, "sparsity": 0.5}, ValueError, "leave out sparsity"),
        ({"sparsity": 1.0}, ValueError, "at least one"),
        ({"sparsity": 1.5}, ValueError, "between"),
        ({"sparsity": 0.5}, ValueError, "needs importance"),
        ({"sparsity": 0.5, "importance": "michel"}, ValueError, "calibrate heads"),
        ({"sparsity": 0.9, "importance": "random"}, ValueError, "only 6"),
        ({"sparsity": "half"}, TypeError, "sparsity"),
        ({"sparsity": 0.5, "importance": 3}, TypeError, r"must be str \| Path \| HeadImportance \| None, got 3"),
    ],
    ids=str,
)
def test_what_cannot_be_pruned_is_refused(wrong: dict, error: type[Exception], message: str) -> None:
    model = FAMILIES["llama"].make()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        patchattn.patch_model(model, "prune", **wrong)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_shapes_are_refused_to_change_under_another_variant() -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "moh")
    with pytest.raises(ValueError, match=r"put it first, as in \['prune', 'moh'\]"):
        patchattn.patch_model(model, "prune", heads={0: [0]})


def test_a_failure_behind_the_surgery_puts_everything_back() -> None:
    model, inputs = FAMILIES["llama"].make(), FAMILIES["llama"].inputs()
    expected, parameters = outputs(model, **inputs)[0], dict(model.named_parameters())
    with pytest.raises(ValueError, match="head"):  # there is no third head any more
        patchattn.patch_model(
            model,
            ["prune", "act"],
            {"prune": {"heads": {0: [0, 1], 1: [0]}}, "act": {"heads": {0: [3], 1: [3]}}},
        )
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert torch.equal(outputs(model, **inputs)[0], expected)
    assert not hasattr(model.config, "patchattn")


def test_adapters_come_after_pruning() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(FAMILIES["llama"].make(), config)
    with pytest.raises(ValueError, match="before adding adapters"):
        patchattn.patch_model(model, "prune", heads={0: [0]})
    model = get_peft_model(patchattn.patch_model(FAMILIES["llama"].make(), "prune", heads={0: [0]}), config)
    with pytest.raises(ValueError, match="carries a PEFT adapter"):
        patchattn.unpatch_model(model)
    whole = patchattn.unpatch_model(model.merge_and_unload())
    assert whole.model.layers[0].self_attn.q_proj.weight.shape == (32, 32)


def test_a_layout_that_is_not_known_is_refused() -> None:
    config = tf.Olmo2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    model = tf.Olmo2ForCausalLM(config)  # it normalises all heads of a query together
    with pytest.raises(NotImplementedError, match=r"q_norm\.weight .* may belong to heads"):
        patchattn.patch_model(model, "prune", heads={0: [0]})
    patchattn.patch_model(model, "prune", heads={0: [0]}, physical=False)


def test_code_that_takes_its_inputs_width_for_that_of_the_heads_is_refused() -> None:
    config = tf.Blip2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    model = tf.Blip2VisionModel(config)
    with pytest.raises(NotImplementedError, match="takes embed_dim, the width of its input"):
        patchattn.patch_model(model, "prune", heads={0: [0]})


def test_a_truncated_checkpoint_is_refused(tmp_path) -> None:
    model = patchattn.patch_model(small_llama(), "prune", heads={0: [0]})
    patchattn.save_pretrained(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        patchattn.from_pretrained(tmp_path)
