"""Merged kv heads: exact where heads are copies, turned or mapped; best of their rank; refusals; plain models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import patchattn
from patchattn.surgery.projections import head_projections
from patchattn.variants.grouping.gqa_convert import fold

from .families import FAMILIES, outputs
from .reference import DIM, HEADS, KV_HEADS, WIDTH, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
METHODS = ("components", "procrustes", "mean")


def glm() -> Any:
    """Rotary embedding of neighbouring channels, of half of each head, and biases."""
    config = tf.GlmConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
        pad_token_id=0,
    )
    return tf.GlmForCausalLM(config)


def smollm3() -> Any:
    """No rotary embedding in one of its two layers."""
    config = tf.SmolLM3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        no_rope_layers=[1, 0],
        pad_token_id=0,
    )
    return tf.SmolLM3ForCausalLM(config)


def stablelm() -> Any:
    """Rotary embedding of the first quarter of each head, by halves."""
    config = tf.StableLmConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        partial_rotary_factor=0.25,
        pad_token_id=0,
    )
    return tf.StableLmForCausalLM(config)


MODELS = {
    "llama": tiny_llama,
    "biases": lambda: tiny_llama(attention_bias=True),
    "four heads into two": lambda: tiny_llama(num_key_value_heads=4),
    "fused": FAMILIES["phi3"].make,
    "glm": glm,
    "stablelm": stablelm,
    "smollm3": smollm3,
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def change_heads(model: Any, kind: str, change: Any) -> None:
    """Let `change(head, rows)` say what the rows (bias as the last column) of each kv head after the first become."""
    for site in patchattn.find_sites(model):
        _, key, value, _ = head_projections(model, site)
        for part in (key, value):
            module = model.get_submodule(part.projection)
            bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias
            rows = torch.cat([module.weight, bias.to(module.weight)[:, None]], dim=1)
            for head in range(1, len(part.index)):
                of = head - head % 2 if kind == "pairs" else 0
                new = change(part is key, head, rows[part.index[of]])
                module.weight[part.index[head]] = new[:, :-1]
                if module.bias is not None:
                    module.bias[part.index[head]] = new[:, -1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_heads_that_are_equal_in_a_group_convert_exactly(name: str, method: str) -> None:
    model = made(name)
    into = 2 if name == "four heads into two" else 1
    change_heads(model, "pairs" if into == 2 else "one", lambda is_key, head, rows: rows)
    before = outputs(model, input_ids=TOKENS)[0]
    parameters = {name: tensor.clone() for name, tensor in model.named_parameters()}
    patchattn.patch_model(model, "gqa_convert", kv_heads=into, method=method)
    assert {site.kv_heads for site in patchattn.find_sites(model)} == {into}
    torch.testing.assert_close(outputs(model, input_ids=TOKENS)[0], before, rtol=0, atol=1e-8)
    with torch.no_grad():
        cache = model(TOKENS).past_key_values
    assert cache.layers[0].keys.shape[1] == into
    patchattn.unpatch_model(model)
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in model.named_parameters())


@pytest.mark.parametrize(("method", "scaled"), [("components", True), ("components", False), ("procrustes", False)])
def test_heads_that_are_turned_by_pairs_convert_exactly_and_their_mean_does_not(method: str, scaled: bool) -> None:
    model = made("llama")
    generator = torch.Generator().manual_seed(1)
    angle = torch.rand(DIM // 2, generator=generator, dtype=torch.float64) * 6
    length = 0.5 + torch.rand(DIM // 2, generator=generator, dtype=torch.float64) if scaled else torch.ones(DIM // 2)
    mixing = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    mixing = mixing if scaled else torch.linalg.qr(mixing).Q

    def change(is_key: bool, head: int, rows: torch.Tensor) -> torch.Tensor:
        if not is_key:
            return mixing @ rows
        first, second = rows.view(2, DIM // 2, -1)
        cos, sin = ((length * turn)[:, None] for turn in (angle.cos(), angle.sin()))
        return torch.cat([first * cos - second * sin, second * cos + first * sin])

    change_heads(model, "one", change)
    before = outputs(model, input_ids=TOKENS)[0]
    with patchattn.patched(model, "gqa_convert", method="mean"):
        assert float((outputs(model, input_ids=TOKENS)[0] - before).abs().max()) > 1e-2
    patchattn.patch_model(model, "gqa_convert", method=method)
    torch.testing.assert_close(outputs(model, input_ids=TOKENS)[0], before, rtol=0, atol=1e-6)


def inputs_of(model: Any, tokens: torch.Tensor, keep: torch.Tensor) -> np.ndarray:
    """`(N, E + 1)` of the first attention module, by a hook of torch's."""
    seen: list[torch.Tensor] = []
    module = model.model.layers[0].self_attn
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(tokens, attention_mask=keep.long())
    handle.remove()
    rows = seen[0][keep].numpy()
    return np.concatenate([rows, np.ones((len(rows), 1))], axis=1)


def batch_of_text() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(1, 50, (6, 40), generator=torch.Generator().manual_seed(3))
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[0, :11] = False
    return tokens, keep


def test_moments_are_the_mean_products_of_what_layers_read() -> None:
    model = made("llama")
    tokens, keep = batch_of_text()
    rows = inputs_of(model, tokens, keep)
    found = patchattn.kv_moments(
        model, [{"input_ids": tokens[i : i + 3], "attention_mask": keep[i : i + 3].long()} for i in (0, 3)]
    )
    ((name, moments),) = found.sites.items()
    assert name == "model.layers.0.self_attn"
    np.testing.assert_allclose(moments.inputs.numpy(), rows.T @ rows / len(rows), rtol=1e-9, atol=1e-12)
    assert moments.pairs.tolist() == [[i, i + DIM // 2] for i in range(DIM // 2)]
    assert moments.fault is None


def test_pairs_of_other_rotary_embeddings() -> None:
    for name, want in (
        ("glm", [[[0, 1], [2, 3], [4, 5], [6, 7]]]),  # the last two are not turned, and may be taken for pairs
        ("stablelm", [[[0, 2], [1, 3]]]),
        ("smollm3", [[[i, i + 4] for i in range(4)], []]),
    ):
        model = made(name)
        found = patchattn.kv_moments(model, [{"input_ids": TOKENS}])
        assert [moments.pairs.tolist() for moments in found.sites.values()] == want, name


def test_what_is_left_of_keys_is_the_best_of_rank_one_pair_by_pair() -> None:
    """A singular value decomposition in numpy of what the keys of the calibration text are says how well it can be."""
    model = made("llama")
    tokens, keep = batch_of_text()
    rows = inputs_of(model, tokens, keep)
    attention = model.model.layers[0].self_attn
    weight, query = (getattr(attention, f"{name}_proj").weight.detach().numpy().copy() for name in "kq")
    moments = patchattn.kv_moments(model, [{"input_ids": tokens, "attention_mask": keep.long()}])
    patchattn.patch_model(model, "gqa_convert", moments=moments)
    keys = (rows[:, :-1] @ weight.T).reshape(-1, KV_HEADS, DIM)
    queries = (rows[:, :-1] @ query.T).reshape(-1, KV_HEADS, HEADS // KV_HEADS, DIM)
    shared = rows[:, :-1] @ attention.k_proj.weight.detach().numpy().T
    read = attention.q_proj.weight.detach().numpy().reshape(HEADS, DIM, WIDTH)
    half, lost, least = DIM // 2, 0.0, 0.0
    for pair in range(half):
        z = keys[:, :, pair] + 1j * keys[:, :, pair + half]
        energy = (queries[..., pair] ** 2 + queries[..., pair + half] ** 2).mean((0, 2)) ** 0.5
        values = np.linalg.svd(z * energy, compute_uv=False)
        least += float((values[1:] ** 2).sum())
        # the map back, read off how the queries of each kv head were changed: q' = conj(d) q
        for head in range(KV_HEADS):
            old = query.reshape(HEADS, DIM, WIDTH)[head * 2]
            new = read[head * 2]
            ratio = (new[pair] + 1j * new[pair + half]) / (old[pair] + 1j * old[pair + half])
            np.testing.assert_allclose(ratio, ratio[0], rtol=1e-8)
            back = np.conj(ratio[0]) * (shared[:, pair] + 1j * shared[:, pair + half])
            lost += float((np.abs(z[:, head] - back) ** 2).sum() * energy[head] ** 2)
    assert least <= lost * (1 + 1e-9)
    assert lost <= least * (1 + 1e-4)


def test_what_is_left_of_values_is_the_best_of_their_rank_once_read() -> None:
    model = made("llama")
    tokens, keep = batch_of_text()
    rows = inputs_of(model, tokens, keep)[:, :-1]
    attention = model.model.layers[0].self_attn

    def read_values() -> np.ndarray:
        """`(N, heads, E)` what the output projection makes of each head's own value."""
        value, output = (getattr(attention, f"{name}_proj").weight.detach().numpy() for name in "vo")
        values = (rows @ value.T).reshape(len(rows), -1, DIM)
        values = np.repeat(values, HEADS // values.shape[1], axis=1)
        return np.einsum("nhd,ehd->nhe", values, output.reshape(WIDTH, HEADS, DIM))

    before = read_values()
    moments = patchattn.kv_moments(model, [{"input_ids": tokens, "attention_mask": keep.long()}])
    patchattn.patch_model(model, "gqa_convert", moments=moments)
    lost = float(((read_values() - before) ** 2).sum())
    values = np.linalg.svd(before.reshape(len(rows), -1), compute_uv=False)
    least = float((values[DIM:] ** 2).sum())
    assert least <= lost * (1 + 1e-9)
    assert lost <= least * (1 + 1e-4)


def test_norms_of_queries_and_keys_are_refused_by_name_but_for_means() -> None:
    model = FAMILIES["qwen3"].make()
    for method in ("components", "procrustes"):
        with pytest.raises(NotImplementedError, match=r"a norm comes after.*method='mean'"):
            patchattn.patch_model(model, "gqa_convert", method=method)
    assert not patchattn.patch_info(model)["patches"]
    change_heads(model, "one", lambda is_key, head, rows: rows)
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "gqa_convert", method="mean")
    torch.testing.assert_close(outputs(model, input_ids=TOKENS)[0], before, rtol=0, atol=1e-5)


def test_models_that_know_no_number_of_kv_heads_and_numbers_that_do_not_divide() -> None:
    for family in ("bert", "gpt2", "t5", "whisper"):
        with pytest.raises(NotImplementedError, match="cannot be cut into heads"):
            patchattn.patch_model(FAMILIES[family].make(), "gqa_convert")
    alibi = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(NotImplementedError, match="cannot be cut into heads: it computes attention in its own code"):
        patchattn.patch_model(alibi, "gqa_convert")
    with pytest.raises(ValueError, match="has 4 kv heads, which 3 does not divide"):
        patchattn.patch_model(tiny_llama(num_key_value_heads=4), "gqa_convert", kv_heads=3)
    other = tiny_llama(hidden_size=16)
    moments = patchattn.kv_moments(other, [{"input_ids": TOKENS}])
    with pytest.raises(ValueError, match=r"inputs 16 wide.*make them on this model"):
        patchattn.patch_model(tiny_llama(), "gqa_convert", moments=moments)


def test_a_cache_of_before_is_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        cache = model(TOKENS).past_key_values
    patchattn.patch_model(model, "gqa_convert")
    with pytest.raises(ValueError, match="has 1 kv heads left, but its kv cache holds 2"):
        model(TOKENS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "biases", "fused", "glm", "smollm3"])
def test_a_folded_model_is_plain_and_loads_without_us(name: str, tmp_path: Path) -> None:
    model = patchattn.patch_model(made(name), "gqa_convert")
    want = outputs(model, input_ids=TOKENS)[0]
    folded = fold(model)
    assert folded.config.num_key_value_heads == 1
    assert type(folded) is type(model)
    assert not any("patchattn" in key for key in folded.state_dict())
    torch.testing.assert_close(outputs(folded, input_ids=TOKENS)[0], want, rtol=0, atol=1e-9)
    folded.save_pretrained(tmp_path)
    loaded = type(folded).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(outputs(loaded, input_ids=TOKENS)[0], want, rtol=0, atol=1e-9)
    torch.testing.assert_close(outputs(model, input_ids=TOKENS)[0], want, rtol=0, atol=0)


def test_what_cannot_be_folded() -> None:
    with pytest.raises(ValueError, match="carries no patch"):
        fold(tiny_llama())
    with pytest.raises(ValueError, match="Only merged kv heads can be folded"):
        fold(patchattn.patch_model(tiny_llama(), "ssmax"))
    model = patchattn.patch_model(made("smollm3"), "gqa_convert", layers=0)
    with pytest.raises(ValueError, match="merge those of all layers"):
        fold(model)


def test_all_that_is_merged_can_be_trained() -> None:
    model = patchattn.patch_model(made("biases"), "gqa_convert").train()
    model(TOKENS).logits.square().sum().backward()
    attention = model.model.layers[0].self_attn
    for name in "qkvo":
        gradient = getattr(attention, f"{name}_proj").weight.grad
        assert gradient.shape == getattr(attention, f"{name}_proj").weight.shape
        assert bool(gradient.any())
