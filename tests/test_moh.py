"""MoH against its formulas (arXiv 2410.11842), computed independently in numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import patchattn
from patchattn.variants.routing.moh import MoH, MoHConfig, anneal_active_heads

from .behaviour import randomise
from .families import FAMILIES, outputs
from .reference import HEADS, attend, layer_in_and_out, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13]])
ORDER = ("shared_heads", "active_heads")


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def chosen(scores: np.ndarray, k: int) -> np.ndarray:
    mask = np.zeros_like(scores)
    mask[np.argsort(-scores)[:k]] = 1
    return mask


def expected(model: torch.nn.Module, gate) -> tuple[np.ndarray, np.ndarray]:
    inputs, given = layer_in_and_out(model, TOKENS)
    return attend(model.model.layers[0].self_attn, inputs[0], gate=gate), given[0]


@pytest.mark.parametrize(("ratio", "shared", "k"), [(0.75, 2, 1), (0.5, 1, 1), (0.25, 1, 0)])
def test_query_norm_router_keeps_the_heads_with_the_longest_queries(ratio: float, shared: int, k: int) -> None:
    model = patchattn.patch_model(tiny_llama(), "moh", active_ratio=ratio)

    def gate(x: np.ndarray, queries: np.ndarray) -> np.ndarray:
        return np.concatenate([np.ones(shared), chosen(np.linalg.norm(queries[shared:], axis=-1), k)])

    want, got = expected(model, gate)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shared", [0, 1, 2, 3])
def test_learned_router_has_the_released_codes_factors(shared: int) -> None:
    model = patchattn.patch_model(tiny_llama(), "moh", router="learned", active_ratio=0.75, shared_ratio=shared / HEADS)
    randomise(model)
    variant = model.model.layers[0].self_attn.patchattn.moh
    weights = {name: p.detach().numpy() for name, p in variant.named_parameters()}
    k = 3 - shared
    assert set(weights) == (
        ({"routed_weight"} if k else set())
        | ({"shared_weight"} if shared > 1 else set())
        | ({"type_weight"} if shared and k else set())
    )

    def gate(x: np.ndarray, queries: np.ndarray) -> np.ndarray:
        shared_gate = softmax(weights["shared_weight"] @ x) * shared if shared > 1 else np.ones(shared)
        if not k:
            return np.concatenate([shared_gate, np.zeros(HEADS - shared)])
        scores = softmax(weights["routed_weight"] @ x)
        kept = scores * chosen(scores, k)
        routed_gate = kept / kept.sum() * k
        if not shared:
            return routed_gate
        first, second = 2 * softmax(weights["type_weight"] @ x)
        return np.concatenate([first * shared_gate, second * routed_gate])

    want, got = expected(model, gate)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_the_router_reads_the_query_before_its_norm() -> None:
    model, tokens = FAMILIES["qwen3"].make(), FAMILIES["qwen3"].inputs()["input_ids"]
    module = model.model.layers[0].self_attn
    norms: list[torch.Tensor] = []
    module.q_proj.register_forward_hook(lambda _, __, output: norms.append(output.unflatten(-1, (4, 8)).norm(dim=-1)))
    gates: list[torch.Tensor] = []
    patchattn.patch_model(model, "moh", active_ratio=0.5, shared_ratio=0.0)
    with patchattn.observe(model, lambda seen: gates.append(seen.values["gate"])):
        outputs(model, input_ids=tokens)
    want = torch.zeros_like(norms[0]).scatter(-1, norms[0].topk(2, dim=-1).indices, 1.0)
    assert torch.equal(gates[0], want)


def test_heads_equal_rows_are_told_apart() -> None:
    """With as many tokens as heads only the memory layout says which axis of the query is which."""
    for family in ("qwen3", "gemma3_text"):
        model = patchattn.patch_model(FAMILIES[family].make(), "moh", active_ratio=0.5)
        tokens = FAMILIES[family].inputs()["input_ids"]
        four = outputs(model, input_ids=tokens[:, :4])[0]
        torch.testing.assert_close(four, outputs(model, input_ids=tokens[:, :5])[0][:, :4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["all", "selected"])
def test_straight_through_gradient_is_that_of_the_scores(form: str) -> None:
    """Forward 0 or 1; backward that of p_i for every routed head, or of m_i p_i, built by hand beside it."""
    torch.manual_seed(1)
    settings = {"active_ratio": 0.5, "shared_ratio": 0.25, "straight_through": form}
    model = patchattn.patch_model(tiny_llama(), "moh", **settings).train()
    module = model.model.layers[0].self_attn
    heads_out: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        args[0].retain_grad()
        heads_out.append(args[0])

    hook = module.o_proj.register_forward_pre_hook(keep)
    module.q_proj.register_forward_hook(lambda _, args, __: inputs.append(args[0].detach()))
    (model(TOKENS).logits * torch.randn(1, 7, 50, dtype=torch.float64)).sum().backward()
    got = module.q_proj.weight.grad.clone()
    hook.remove()

    # what reaches the gates: <gradient of the gated output, output of the head>, with the heads' output ungated
    with torch.no_grad(), patchattn.unpatched(model):
        plain: list[torch.Tensor] = []
        handle = module.o_proj.register_forward_pre_hook(lambda _, args: plain.append(args[0]))
        model(TOKENS)
        handle.remove()
    upstream = heads_out[0].grad.unflatten(-1, (HEADS, 8))
    slope = (upstream * plain[0].unflatten(-1, (HEADS, 8))).sum(-1)[..., 1:]
    weight = module.q_proj.weight.detach().clone().requires_grad_(True)
    norms = torch.linalg.vector_norm((inputs[0] @ weight.T).unflatten(-1, (HEADS, 8)), dim=-1)[..., 1:]
    centred = norms - norms.mean(-1, keepdim=True)
    std = (centred.pow(2).sum(-1, keepdim=True) / 2).sqrt()
    powers = (norms / std).exp()
    probability = powers / powers.sum(-1, keepdim=True)
    mask = torch.zeros_like(norms).scatter(-1, norms.argmax(-1, keepdim=True), 1.0)
    (slope * (mask if form == "selected" else 1.0) * probability).sum().backward()
    through_router = weight.grad

    # the rest of the gradient runs through the attention scores: it is all there is in evaluation mode
    model.zero_grad()
    model.eval()
    torch.manual_seed(1)
    model = patchattn.patch_model(tiny_llama(), "moh", **settings).eval()
    (model(TOKENS).logits * torch.randn(1, 7, 50, dtype=torch.float64)).sum().backward()
    through_attention = model.model.layers[0].self_attn.q_proj.weight.grad
    assert float(through_router.abs().max()) > 1e-3
    # transformers turns queries by float32 angles, so that their norms change by as much
    torch.testing.assert_close(got, through_attention + through_router, rtol=1e-4, atol=1e-6)


def test_with_all_heads_the_query_norm_router_is_the_base_bit_for_bit() -> None:
    """Also where the router does run, while training."""
    for family in ("llama", "gpt2", "bert", "vit"):
        model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
        expected = outputs(model, **inputs)[0]
        patchattn.patch_model(model, "moh", active_ratio=0.5)
        anneal_active_heads(model, 0, 1)
        for variant in (m for m in model.modules() if isinstance(m, patchattn.Variant)):
            variant.train()
        assert torch.equal(outputs(model, **inputs)[0], expected)


def test_a_uniform_learned_router_over_all_heads_is_neutral() -> None:
    for shared in range(HEADS + 1):
        model = tiny_llama()
        expected = outputs(model, input_ids=TOKENS)[0]
        settings = {"router": "learned", "active_heads": HEADS, "shared_heads": shared, "router_std": 0.0}
        patchattn.patch_model(model, "moh", settings)
        torch.testing.assert_close(outputs(model, input_ids=TOKENS)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router", ["query_norm", "learned"])
def test_the_choice_depends_on_the_token_alone_not_on_padding_or_batch(router: str) -> None:
    model = patchattn.patch_model(tiny_llama(), "moh", router=router, active_heads=2, shared_heads=0)
    randomise(model)

    def gates(tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        with patchattn.observe(model, lambda seen: kept.append(seen.values["gate"])):
            outputs(model, input_ids=tokens, **inputs)
        return kept[0]

    alone = gates(TOKENS)[0]
    other = torch.tensor([[9, 9, 9, 30, 31, 32, 33, 34, 35]])
    for left in (0, 2):
        padded = torch.zeros(1, 9, dtype=torch.long)
        padded[0, left : left + 7] = TOKENS[0]
        mask = torch.zeros(2, 9, dtype=torch.long)
        mask[0, left : left + 7] = 1
        mask[1] = 1
        together = gates(torch.cat([padded, other]), attention_mask=mask)[0, left : left + 7]
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(heads=st.integers(1, 16), active=st.integers(1, 16), shared=st.integers(0, 16))
def test_budgets_are_kept_by_every_token(heads: int, active: int, shared: int) -> None:
    """As a count, and as the ratio that it makes; impossible ones are refused."""
    site = replace(patchattn.find_sites(tiny_llama())[0], query_heads=heads)
    counts = {"active_heads": active, "shared_heads": shared}
    if active > heads or shared > heads or shared > active:
        with pytest.raises(ValueError, match="heads"):
            MoH(MoHConfig(**counts), site)
        return
    ratios = {"active_ratio": active / heads, "shared_ratio": shared / heads}
    for given_as in (counts, ratios):
        variant = MoH(MoHConfig(**given_as), site)
        assert (variant.shared, variant.routed) == (shared, active - shared)


def test_budgets_per_layer() -> None:
    model = FAMILIES["llama"].make()
    patchattn.patch_model(model, "moh", active_heads=[4, 2], shared_heads=[1, 0])
    with patchattn.routing_statistics(model) as statistics:
        outputs(model, input_ids=TOKENS)
    [second] = statistics.layers()  # the first keeps every head: it is skipped altogether
    assert second.site.layer_index == 1
    assert sum(second.usage) == pytest.approx(2.0)
    patchattn.unpatch_model(model)
    with pytest.raises(ValueError, match=r"active heads are given for 3 layers, but model has 2"):
        patchattn.patch_model(model, "moh", active_ratio=[1.0, 0.5, 0.5])


@pytest.mark.parametrize(
    ("preset", "heads", "layers", "active", "total"),
    [
        ("llama3_8b_75", 32, 2, 48, 64),  # every layer 24 of 32
        ("dit_b_75", 12, 12, 108, 144),
        ("dit_s_75", 6, 12, 54, 72),
    ],
)
def test_presets_have_the_published_share_of_heads(
    preset: str, heads: int, layers: int, active: int, total: int
) -> None:
    sizes = {"hidden_size": 4 * heads, "intermediate_size": 8, "num_hidden_layers": layers, "vocab_size": 50}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=heads))
    patchattn.patch_model(model, "moh", preset=preset)
    with patchattn.routing_statistics(model) as statistics:
        outputs(model, input_ids=TOKENS)
    assert sum(map(sum, statistics.usage())) == pytest.approx(active)
    assert active / total == 0.75
    patchattn.unpatch_model(model)
    patchattn.patch_model(model, "moh", preset=preset, router="query_norm")
    assert patchattn.patch_info(model)["patches"][0]["config"]["router"] == "query_norm"


@pytest.mark.parametrize(
    ("preset", "stages", "share"),
    [
        ("dit_s_75", [(12, 6)], 0.75),
        ("dit_s_90", [(12, 6)], 0.889),
        ("dit_b_75", [(12, 12)], 0.75),
        ("dit_b_90", [(12, 12)], 0.896),
        ("dit_l_75", [(8, 8), (8, 16), (8, 24)], 0.75),
        ("dit_l_90", [(8, 8), (8, 16), (8, 24)], 0.896),
        ("dit_xl_75", [(9, 8), (10, 16), (9, 24)], 0.75),
        ("dit_xl_90", [(9, 8), (10, 16), (9, 24)], 0.900),
        ("vit_s_75", [(5, 3), (5, 6), (22, 12), (5, 24)], 0.753),
        ("vit_s_80", [(5, 3), (5, 6), (22, 12), (5, 24)], 0.800),
        ("vit_b_50", [(5, 4), (5, 8), (23, 16), (5, 32)], 0.5),
        ("vit_b_75", [(5, 4), (5, 8), (23, 16), (5, 32)], 0.75),
    ],
)
def test_published_budgets_keep_the_share_in_their_name(
    preset: str, stages: list[tuple[int, int]], share: float
) -> None:
    """Stages are layers and their heads; the published share counts heads over all layers."""
    settings = patchattn.variant_info("moh").presets[preset]
    heads = [count for layers, count in stages for _ in range(layers)]
    assert len(settings["active_heads"]) == len(settings["shared_heads"]) == len(heads)
    assert all(shared <= on <= of for shared, on, of in zip(*(settings[k] for k in ORDER), heads, strict=True))
    assert sum(settings["active_heads"]) / sum(heads) == pytest.approx(share, abs=5e-4)
    assert abs(share - int(preset[-2:]) / 100) < 0.012


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active_ratio": 1.5}, "active_ratio must lie between 0.0 and 1.0, got 1.5"),
        ({"active_ratio": "half"}, r"active_ratio must be float \| tuple\[float, ...\] \| None, got 'half'"),
        ({"active_ratio": 0.25, "shared_ratio": 0.5}, "fewer than the 2 shared ones"),
        ({"router": "random"}, "router"),
        ({"active_ratio": 0.5, "active_heads": 2}, "either active_ratio or active_heads, got 0.5 and 2"),
        ({"active_heads": 5}, "keep 5 active heads, but model.layers.0.self_attn has 4"),
        ({"active_heads": 0}, "active_heads must lie between 1 and inf"),
        ({"active_heads": [2, 2]}, "given for 2 layers, but model has 1"),
        ({"shared_heads": []}, "given for 0 layers"),
        ({"active_heads": 2.5}, "active_heads must be int"),
        ({"preset": "llama"}, "no preset 'llama'; did you mean 'llama3_8b_75'"),
        ({"active_ration": 0.5}, "did you mean 'active_ratio'"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    model = tiny_llama()
    with pytest.raises((ValueError, TypeError), match=message):
        patchattn.patch_model(model, "moh", **settings)
    assert not patchattn.patch_info(model)["patches"]


def test_one_head_is_always_kept() -> None:
    model = tiny_llama(num_attention_heads=1, num_key_value_heads=1)
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "moh", active_ratio=0.1)
    assert torch.equal(outputs(model, input_ids=TOKENS)[0], before)
