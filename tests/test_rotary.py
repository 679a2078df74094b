"""Rotary embeddings found by looking, against rotation written out in float64 from each family's definition."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from patchattn import find_sites, patched, probed
from patchattn.core.call import AttentionCall
from patchattn.positions.looking import find_rotations
from patchattn.positions.rotary import Rotary, Rotation, parse_rotations

from .families import FAMILIES

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_THETA = 10000.0


def _made(name: str, **extra: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(tf, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**{**_TEXT, **extra})
    return getattr(tf, f"{name}ForCausalLM")(config).eval()


# The layout of each family as its paper or code defines it: rotated dimensions and pairs.
FAMILY_LAYOUTS = [
    ("Llama", {}, 16, "half"),
    ("GPTNeoX", {}, 4, "half"),
    ("Cohere", {}, 16, "interleaved"),
    ("Glm", {"head_dim": 16}, 8, "interleaved"),
    ("Qwen3", {"head_dim": 16}, 16, "half"),
    ("Gemma", {"head_dim": 16}, 16, "half"),
]


def _rotary(model: nn.Module, layer: int = 0) -> Rotary:
    sites = find_sites(model)
    found = find_rotations(model, sites, by="the test")
    return Rotary(Rotation.from_dict(found[sites[layer].name]), model)


def _calls(model: nn.Module, positions: torch.Tensor, layer: int = 0) -> AttentionCall:
    seen: list[AttentionCall] = []
    ids = torch.randint(3, 64, positions.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), probed(model, lambda call, output: seen.append(call), layers=layer):
        model(input_ids=ids, position_ids=positions)
    return seen[0]


def _rotated(vector: np.ndarray, angle: Callable[[int], float], size: int, layout: str) -> np.ndarray:
    """One head's vector, pair by pair: pair c turned by `angle(c)`; the dimensions behind `size` stay."""
    out = vector.copy()
    for pair in range(size // 2):
        one, other = (pair, pair + size // 2) if layout == "half" else (2 * pair, 2 * pair + 1)
        cos, sin = np.cos(angle(pair)), np.sin(angle(pair))
        out[one], out[other] = vector[one] * cos - vector[other] * sin, vector[other] * cos + vector[one] * sin
    return out


@pytest.mark.parametrize(("name", "extra", "size", "layout"), FAMILY_LAYOUTS, ids=[f[0] for f in FAMILY_LAYOUTS])
def test_turned_is_the_rotation_written_out(name: str, extra: dict[str, Any], size: int, layout: str) -> None:
    model = _made(name, **extra)
    rotary = _rotary(model, layer=1)
    old, new = torch.arange(5, 14)[None], torch.tensor([[40, 0, 3, 3, 900, 8, 77, 1, 12]])
    key = _calls(model, old, layer=1).key
    turned = rotary.turned(key, old, new).double().numpy()
    expected, theta = np.empty_like(turned), model.config.rope_parameters["rope_theta"]
    for head in range(key.shape[1]):
        for t in range(key.shape[2]):
            shift = float(new[0, t] - old[0, t])
            vector = key[0, head, t].double().numpy()
            expected[0, head, t] = _rotated(vector, lambda c, s=shift: s / theta ** (2 * c / size), size, layout)
    assert np.abs(turned - expected).max() < 2e-4 * np.abs(expected).max()  # the model's own angles are float32
    assert np.abs(turned - key.double().numpy()).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": _THETA},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": _THETA, "original_max_position_embeddings": 256},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_theta": _THETA,
            "original_max_position_embeddings": 256,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_turned_is_the_models_own_key_there(scaling: dict[str, Any]) -> None:
    """Whatever the scaling; layer 0 alone, whose input no position reaches."""
    model = _made("Llama", rope_parameters=scaling)
    old, new = torch.arange(3, 15)[None], torch.arange(200, 212)[None]
    here, there = _calls(model, old), _calls(model, new)
    rotary = _rotary(model)
    for one, other in ((here.key, there.key), (here.query, there.query)):
        turned = rotary.turned(one, old, new)
        assert float((turned - other).norm() / other.norm()) < 1e-6
    cos, sin = rotary.tables(new)
    assert float((cos**2 + sin**2 - 1).abs().max()) < 1e-6  # without the factor that YaRN puts on them


def test_other_frequencies() -> None:
    """Turned to those of another base, a key is what a model with that base makes of it."""
    model, other = (_made("Llama", rope_parameters={"rope_type": "default", "rope_theta": b}) for b in (1e4, 2e4))
    places = torch.arange(50, 60)[None]
    frequencies = 1 / 2e4 ** (torch.arange(0, 16, 2) / 16)
    turned = _rotary(model).turned(_calls(model, places).key, places, places, frequencies)
    wanted = _calls(other, places).key
    assert float((turned - wanted).norm() / wanted.norm()) < 1e-5


def test_half_precision_is_chosen_by_the_gap() -> None:
    for name, extra, size, layout in FAMILY_LAYOUTS:
        rotation = _rotary(_made(name, **extra).bfloat16()).rotation
        assert (rotation.share, rotation.layout) == ("first", layout), (name, size)
    smallest = _rotary(_made("GPTNeoX", hidden_size=32).bfloat16())  # one pair, in which both layouts are one
    assert smallest.tables(torch.zeros(1, 1))[0].shape[-1] == 1


def test_layers_differ() -> None:
    """Gemma 3 rotates sliding layers by another base; SmolLM3 leaves some layers unrotated."""
    kinds = ["sliding_attention", "full_attention"]
    model = _made("Gemma3", head_dim=16, layer_types=kinds, sliding_window=4)
    found = find_rotations(model, find_sites(model), by="the test")
    assert [each["given"]["layer_type"] for each in found.values()] == kinds
    model = _made("SmolLM3", no_rope_layers=[1, 0])
    found = find_rotations(model, find_sites(model), by="the test")
    assert [each["share"] for each in found.values()] == ["first", "none"]
    with pytest.raises(NotImplementedError, match="no attention module that was chosen in SmolLM3ForCausalLM rotates"):
        find_rotations(model, find_sites(model)[1:], by="the test")


def _qwen2_vl() -> nn.Module:
    return FAMILIES["qwen2_5_vl"].make()


def _deepseek() -> nn.Module:
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    return _made("DeepseekV3", **sizes, **experts, num_key_value_heads=4, first_k_dense_replace=2)


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return _made("Llama")


def _called_with_a_dtype() -> nn.Module:
    model = _made("Llama")
    plain = type(model.model.rotary_emb)

    class Typed(plain):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor, kind: Any = None) -> Any:
            return super().forward(x, position_ids)

    model.model.rotary_emb.__class__ = Typed
    add = lambda module, args, kwargs: (args, {**kwargs, "kind": torch.float32})  # noqa: E731
    model.model.rotary_emb.register_forward_pre_hook(add, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (FAMILIES["gpt2"].make, r"GPT2Attention \(transformer.h.0.attn\).*its positions are learned"),
        (_qwen2_vl, r"Qwen2_5_VLAttention .*positions along several axes \(M-RoPE\)"),
        (_deepseek, r"DeepseekV3Attention .*compressed latents"),
        (FAMILIES["t5"].make, "no model around it can be run on input_ids at given position_ids"),
        (_on_meta, "its weights are on the meta device"),
        (lambda: _made("Llama", max_position_embeddings=8), "trained length is 8 tokens"),
        (_called_with_a_dtype, "Typed is called with what no patch can be saved with .*dtype"),
    ],
    ids=["learned", "mrope", "mla", "relative", "meta", "short", "dtype"],
)
def test_refused_by_name(build: Callable[[], nn.Module], reason: str) -> None:
    model = build()
    sites = [site for site in find_sites(model) if "visual" not in site.name]
    with pytest.raises(NotImplementedError, match=f"self_extend must know how .*{reason}"):
        find_rotations(model, sites, by="self_extend")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length(kind: str) -> None:
    """Known inside the border; asked for beyond it they are refused, and the model's own are never touched."""
    factors = {"long_factor": [4.0] * 8, "short_factor": [1.0] * 8, "original_max_position_embeddings": 64}
    extra: dict[str, Any] = {"factor": 4.0, **(factors if kind == "longrope" else {})}
    model = _made(
        "Llama",
        max_position_embeddings=64 if kind == "dynamic" else 256,
        rope_parameters={"rope_type": kind, "rope_theta": _THETA, **extra},
    )
    before = model.model.rotary_emb.inv_freq.clone()
    rotary = _rotary(model)
    assert rotary.rotation.border == 64
    old, new = torch.arange(3, 15)[None], torch.arange(40, 52)[None]
    turned, wanted = rotary.turned(_calls(model, old).key, old, new), _calls(model, new).key
    assert float((turned - wanted).norm() / wanted.norm()) < 1e-6
    with pytest.raises(NotImplementedError, match=r"From 64 tokens on .*position 70 is asked for"):
        rotary.turned(wanted, new, torch.full_like(new, 70))
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_tables_that_end() -> None:
    model = _made("Llama", max_position_embeddings=64)
    plain = type(model.model.rotary_emb)

    class Ends(plain):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
            if int(position_ids.max()) >= 64:
                raise IndexError("index out of range")
            return super().forward(x, position_ids)

    model.model.rotary_emb.__class__ = Ends
    rotary = _rotary(model)
    assert rotary.rotation.border == 64
    assert rotary.rotation.layout == "half"
    with pytest.raises(NotImplementedError, match=r"From 64 tokens on .* ends"):
        rotary.tables(torch.tensor([[63]]))


def test_the_model_is_left_as_it_was() -> None:
    model = _made("Llama").train()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = torch.get_rng_state()
    find_rotations(model, find_sites(model), by="the test")
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_positions_of_padded_and_packed_batches() -> None:
    model, seen = _made("Llama"), []
    rotary = _rotary(model)
    ids, mask = torch.full((2, 6), 5), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    with torch.no_grad(), probed(model, lambda call, output: seen.append(call), layers=0):
        model(ids, attention_mask=mask)
        model(ids[:1], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    padded, packed = seen
    assert rotary.rotated_by(padded).tolist() == [[0, 1, 2, 3, 4, 5]]  # by column
    assert padded.query_positions()[1, 2:].tolist() == [0, 1, 2, 3]  # and where they stand
    assert padded.key_positions()[1, 0].tolist() == [-1, -1, 0, 1, 2, 3]
    assert padded.query_positions()[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert rotary.rotated_by(packed).tolist() == packed.query_positions().tolist() == [[0, 1, 2, 0, 1, 2]]
    assert packed.key_positions().tolist() == [[[0, 1, 2, 0, 1, 2]]]


def test_positions_in_a_cache_that_forgets() -> None:
    model, seen = _made("Llama"), []
    ids = torch.arange(3, 13)[None]
    with patched(model, "streaming_llm", sinks=2, recent=3, slack=0), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with probed(model, lambda call, output: seen.append(call), layers=0):
            model(ids[:, :1], past_key_values=cache)
    assert seen[0].key_positions().tolist() == [[[0, 1, 7, 8, 9, 10]]]
    assert seen[0].query_positions().tolist() == [[10]]


def test_settings_from_a_file_are_checked() -> None:
    good = find_rotations(model := _made("Llama"), find_sites(model), by="the test")
    assert parse_rotations(good) == good
    name = next(iter(good))
    for change in ({"layout": "third"}, {"module": 3}, {"border": 0}, {"unknown": 1}, {"given": {"a": {}}}):
        with pytest.raises((ValueError, TypeError), match=next(iter(change))):
            parse_rotations({name: {**good[name], **change}})
    with pytest.raises(TypeError, match="got list"):
        parse_rotations([1])
    with pytest.raises(ValueError, match=r"has no module nowhere\.rotary"):
        Rotary(Rotation.from_dict({**good[name], "module": ["nowhere.rotary"]}), model)
