"""MoH that computes the selected heads alone: equal to dense attention and gates, and where it does so."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

import patchattn
import patchattn.variants.routing.moh.variant as moh
from patchattn.core.chain import attention_call
from patchattn.core.module_call import ModuleCall
from patchattn_kernels import routed_attention_cpu

from .families import FAMILIES, outputs
from .reference import HEADS, attend, layer_in_and_out, tiny_llama

LENGTH = 800
TEXT = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_bert(implementation: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    model = tf.BertModel(tf.BertConfig(**TEXT, max_position_embeddings=1024), add_pooling_layer=False)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def inputs(padding: int = 0, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Two sequences, the first padded on the right."""
    tokens = torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if padding:
        mask[0, -padding:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every call of attention that may do without the base implementation: whether it does."""
    found = []
    original = moh.routed_attention_if_faster

    def noted(*operands: Any, **how: Any) -> torch.Tensor | None:
        output = original(*operands, **how)
        found.append(output is not None)
        return output

    monkeypatch.setattr(moh, "routed_attention_if_faster", noted)
    return found


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")


def dense(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    """What comes out where attention is the base implementation's."""
    with monkeypatch.context() as patch:
        patch.setenv("PATCHATTN_KERNELS", "reference")
        return run()


@pytest.mark.parametrize("padding", [0, 100])
@pytest.mark.parametrize("router", ["query_norm", "learned"])
def test_long_sequences_of_an_encoder(
    router: str, padding: int, computed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where a choice of heads does not hang on rounding."""
    model = patchattn.patch_model(tiny_bert(), "moh", router=router, active_ratio=0.5, shared_ratio=0.25).double()
    given = inputs(padding)

    def run() -> torch.Tensor:
        return outputs(model, **given)[0]

    want = dense(monkeypatch, run)
    assert computed == [False, False]
    got = run()
    assert computed == [False, False, True, True]
    real = given["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-10, atol=1e-10)


def test_gradients_of_a_long_sequence(computed: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through attention, and through the straight-through gates; without attention dropout."""
    model = without_dropout(straight_through="selected")
    given = inputs(100)
    upstream = torch.randn(2, LENGTH, 32, dtype=torch.float64) * given["attention_mask"][..., None]

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        (model(**given).last_hidden_state * upstream).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    want, got = dense(monkeypatch, run), run()
    assert computed == [False, False, True, True]
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-8, atol=1e-8, msg=name)


def without_dropout(**how: Any) -> nn.Module:
    model = patchattn.patch_model(tiny_bert(), "moh", active_ratio=0.5, shared_ratio=0.25, **how).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_all_heads_are_computed_where_the_gradient_of_dropped_ones_counts(computed: list[bool]) -> None:
    """Against a gate that is moved: the loss is linear in the gates of the last layer, its slope there the gradient."""
    model, given = without_dropout(straight_through="all"), inputs()
    layer = model.encoder.layer[-1].attention.self
    variant = layer.patchattn.moh
    upstream = torch.randn(2, LENGTH, 32, dtype=torch.float64)
    gates: list[torch.Tensor] = []
    norm_gate, moved = variant.norm_gate, torch.zeros(2, LENGTH, HEADS, dtype=torch.float64)

    def noted(call: Any) -> Any:
        gate, routing = norm_gate(call)
        gate = gate + moved
        if gate.requires_grad:
            gate.retain_grad()
        gates.append(gate)
        return gate, routing

    seen: list[torch.Tensor] = []
    hook = model.encoder.layer[-1].attention.output.dense.register_forward_hook(
        lambda _, __, output: seen.append(output)
    )
    variant.norm_gate = noted
    model(**given)
    (seen[0] * upstream).sum().backward()
    assert computed == []  # neither layer asks for the selected heads alone
    slope = gates[0].grad
    assert slope is not None
    choices = [(0, 5, 1), (0, 700, 2), (1, 3, 3), (1, 799, 1), (1, 200, 2)]
    assert any(float(gates[0].detach()[place]) == 0.0 for place in choices)
    before = (seen[0].detach() * upstream).sum()
    with torch.no_grad():
        for place in choices:
            seen.clear()
            moved.zero_()[place] = 0.5
            model(**given)
            change = (seen[0] * upstream).sum() - before
            torch.testing.assert_close(change / 0.5, slope[place], rtol=1e-6, atol=1e-8)
    hook.remove()


def test_rows_of_dropped_heads_are_not_attended(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of four heads is shared; another is chosen by each token, so that all others together have each row once."""
    attended: list[int] = []
    attend_to = routed_attention_cpu.scaled_dot_product_attention

    def counted(query: torch.Tensor, *operands: torch.Tensor, **how: Any) -> torch.Tensor:
        attended.append(int((query != 0).any(dim=-1).sum()))
        return attend_to(query, *operands, **how)

    monkeypatch.setattr(routed_attention_cpu, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(routed_attention_cpu, "UNEVENNESS", 1.0)  # no pack is filled up
    model = patchattn.patch_model(tiny_bert(), "moh", active_ratio=0.5, shared_ratio=0.25)
    outputs(model, **inputs())
    assert sum(attended) == 2 * 2 * LENGTH * 2  # layers, sequences, tokens, active heads


def patched_bert(**how: Any) -> nn.Module:
    return patchattn.patch_model(tiny_bert(**how), "moh", active_ratio=0.5)


def test_left_to_the_base_implementation(computed: list[bool]) -> None:
    """Eager attention, dropout and short sequences never ask; many heads and causal attention are asked and decline."""
    outputs(patched_bert(implementation="eager"), **inputs())
    with torch.no_grad():
        patched_bert().train()(**inputs())
    assert computed == []
    outputs(patched_bert(), **inputs(length=700))
    assert computed == []
    outputs(patchattn.patch_model(tiny_bert(), "moh", active_heads=4, shared_heads=3, router="learned"), **inputs())
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)).eval()
    outputs(patchattn.patch_model(llama, "moh", active_ratio=0.5), **inputs())
    assert computed == 4 * [False]


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({}, True),
        ({"base": "flash_attention_2"}, True),
        ({"base": "kernels-community/flash-attn3"}, True),
        ({"kwargs": {"dropout": 0.0, "output_attentions": False}}, True),
        ({"innermost": False}, False),
        ({"base": "eager"}, False),
        ({"base": "flex_attention"}, False),
        ({"kwargs": {"dropout": 0.1}}, False),
        ({"kwargs": {"output_attentions": True}}, False),
        ({"query": torch.zeros(1, 4, 3, 8)}, False),  # queries that all sequences share
    ],
)
def test_calls_that_need_no_base_implementation(changes: dict[str, Any], alone: bool) -> None:
    module = tiny_bert().encoder.layer[0].attention.self
    query, key, value = torch.zeros(3, 2, 4, 3, 8)
    [site, *_] = patchattn.find_sites(tiny_bert())
    call = attention_call(ModuleCall(module, query, key, value, None, {}), site, "sdpa")
    assert call.replace(**{"innermost": True, **changes}).stands_alone is alone


@pytest.mark.parametrize(("order", "asked"), [(["ssa", "moh"], True), (["moh", "ssa"], False)])
def test_other_variants_inside_it_need_the_base_implementation(
    order: list[str], asked: bool, computed: list[bool]
) -> None:
    model = patchattn.patch_model(tiny_bert(), order, {"moh": {"active_ratio": 0.5}})
    outputs(model, **inputs())
    assert computed == ([True, True] if asked else [])


def test_short_sequences_are_the_base_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = patched_bert(), inputs(3, length=30)
    want = dense(monkeypatch, lambda: outputs(model, **given)[0])
    assert torch.equal(outputs(model, **given)[0], want)


def test_compiled_whole() -> None:
    """The rows to gather depend on values: a compiled model computes every head."""
    model = patched_bert()
    given = {"input_ids": inputs()["input_ids"]}
    eager = outputs(model, **given)[0]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(compiled, **given)[0], eager, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_triton_follows_the_formula(ratio: float, by_triton: None) -> None:
    """A causal model with grouped queries, against the layer computed token by token in float64."""
    model = patchattn.patch_model(tiny_llama().float(), "moh", active_ratio=ratio)
    shared = {0.5: 1, 0.75: 2}[ratio]
    tokens = torch.tensor([[3, 7, 1, 9, 22, 5, 13]])
    given, got = layer_in_and_out(model, tokens)

    def gate(x: np.ndarray, queries: np.ndarray) -> np.ndarray:
        kept = np.zeros(HEADS)
        kept[:shared] = 1
        kept[shared + np.argmax(np.linalg.norm(queries[shared:], axis=-1))] = 1
        return kept

    want = attend(model.model.layers[0].self_attn, given[0].astype(np.float64), gate=gate)
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_triton_equals_dense(
    family: str, by_triton: None, computed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With padding on the left where there are tokens: outputs of real tokens, and gradients."""
    model, given = FAMILIES[family].make(), FAMILIES[family].inputs()
    patchattn.patch_model(model, "moh", active_ratio=0.5)
    real: Any = ...
    if "input_ids" in given:
        mask = torch.ones_like(given["input_ids"])
        mask[0, :3] = 0
        given, real = {**given, "attention_mask": mask}, mask.bool()

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        output = model(**given)[0][real]
        output.square().sum().backward()
        return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    want, want_gradients = dense(monkeypatch, run)
    computed.clear()
    got, gradients = run()
    assert computed == [True, True]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    for name, gradient in want_gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-2, atol=1e-4 * scale + 1e-6, msg=name)


def test_triton_generates_what_dense_attention_does(by_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache and left padding: the prompt, then token by token."""
    model = patchattn.patch_model(FAMILIES["llama"].make(), "moh", active_ratio=0.5)
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0

    def run() -> torch.Tensor:
        return model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)

    assert torch.equal(run(), dense(monkeypatch, run))
