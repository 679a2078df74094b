"""NSA (arXiv 2502.11089) against loops in float64: scores of blocks, three branches, and the gates that add them."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.core.places import Places
from patchattn.variants.selection.nsa import NSA

from .behaviour import close, decoded, positions, randomise, text
from .families import FAMILIES, outputs
from .reference import DIM, HEADS, KV_HEADS, WIDTH, layer_in_and_out, tiny_llama
from .selecting import projected

TOKENS = torch.arange(3, 31)[None]
SMALL = {"block": 4, "top_k": 3, "first": 1, "local": 2, "length": 4, "stride": 2, "window": 3}
GROUP = HEADS // KV_HEADS


def patched(**settings: Any) -> torch.nn.Module:
    model = patchattn.patch_model(tiny_llama(), "nsa", **{**SMALL, **settings})
    randomise(model)
    return model


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def phi(nsa: NSA, name: str, window: np.ndarray) -> np.ndarray:
    """What the keys or values `(l, D)` of a window are compressed into: their mean, and what an MLP adds."""
    found = window.mean(axis=0)
    if nsa.config.compression == "mlp":
        place, weight, out = (getattr(nsa, f"{name}_{part}").detach().numpy() for part in ("place", "in", "out"))
        hidden = sum((x + p) @ w for x, p, w in zip(window, place, weight, strict=True))
        found = found + out @ np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in hidden])
    return found


def compressed(nsa: NSA, query: np.ndarray, states: np.ndarray, i: int) -> np.ndarray:
    """`(W,)` weights that a query `(D,)` of token i gives to compressed keys `(T, D)`, none without a window."""
    length, stride = nsa.config.length, nsa.config.stride
    starts = [s for s in range(0, i + 1, stride) if s + length - 1 <= i]
    means = np.array([phi(nsa, "keys", states[s : s + length]) for s in starts])
    return softmax(means @ query / np.sqrt(DIM)) if starts else np.zeros(0)


def chosen(shares: np.ndarray, i: int, settings: dict[str, int]) -> set[int]:
    """Blocks that token i reads, by the weights of windows `(W,)`: each shares some keys with a block."""
    block, length, stride = settings["block"], settings["length"], settings["stride"]
    own = i // block
    forced = {p for p in range(own + 1) if p < settings["first"] or p > own - settings["local"]}
    scores = np.zeros(own + 1)
    for w, share in enumerate(shares):
        for key in range(w * stride, w * stride + length, stride):  # once for every stride of keys in the block
            if key // block <= own:
                scores[key // block] += share
    others = [p for p in np.argsort(-scores, kind="stable") if p not in forced]
    return forced | set(others[: settings["top_k"] - len(forced)])


def by_loops(model: torch.nn.Module, settings: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """What the layer should give `(T, E)`, and did."""
    inputs, got = layer_in_and_out(model, TOKENS)
    module = model.model.layers[0].self_attn
    nsa = module.patchattn.nsa
    query, key, value = projected(module, inputs[0])
    gates = {
        name: 1 / (1 + np.exp(-inputs[0] @ getattr(nsa, f"{name}_gate").detach().numpy().T))
        for name in ("chosen", "compressed", "window")
    }
    want = []
    for i in range(len(query)):
        heads = []
        shares = [compressed(nsa, query[i, h], key[:, h // GROUP], i) for h in range(HEADS)]
        for h in range(HEADS):
            group, kv = h // GROUP * GROUP, h // GROUP
            blocks = chosen(sum(shares[group : group + GROUP]), i, settings)
            read = [j for j in range(i + 1) if j // settings["block"] in blocks]
            near = list(range(max(0, i + 1 - settings["window"]), i + 1))
            branches = [softmax(key[some, kv] @ query[i, h] / np.sqrt(DIM)) @ value[some, kv] for some in (read, near)]
            starts = np.arange(len(shares[h])) * settings["stride"]
            means = [
                share * phi(nsa, "values", value[s : s + settings["length"], kv])
                for s, share in zip(starts, shares[h], strict=True)
            ]
            heads.append(
                2 * gates["chosen"][i, h] * branches[0]
                + (2 * gates["window"][i, h] - 1) * branches[1]
                + (2 * gates["compressed"][i, h] - 1) * sum(means, np.zeros(DIM))
            )
        want.append(module.o_proj.weight.detach().numpy() @ np.concatenate(heads))
    return np.array(want), got[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"length": 2, "first": 0, "local": 1, "top_k": 2, "window": 1},
        {"block": 3, "length": 3, "stride": 3, "top_k": 4},  # as flash-linear-attention has it
        {"compression": "mlp"},
    ],
)
def test_three_branches_are_added_by_their_gates(changes: dict[str, Any]) -> None:
    want, got = by_loops(patched(**changes), {**SMALL, **changes})
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_windows_count_for_the_blocks_they_lie_in() -> None:
    """A window of two strides: blocks of four strides get 1, 2, 2, 2, 1 times those from one before their own on."""
    nsa = patchattn.patch_model(tiny_llama(), "nsa").model.layers[0].self_attn.patchattn.nsa
    scores = nsa.by_stride(torch.eye(15), 4, 0.0).sum(dim=(-1, -2))
    assert scores[7].tolist() == [0, 1, 1, 0]
    assert scores[:, 1].tolist() == [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0]


def test_a_learned_compression_starts_as_the_mean_and_learns_with_the_gates() -> None:
    plain, found = patchattn.patch_model(tiny_llama(), "nsa", **SMALL), []
    model = patchattn.patch_model(tiny_llama(), "nsa", **SMALL, compression="mlp")
    for one in (plain, model):
        nsa = one.model.layers[0].self_attn.patchattn.nsa
        with torch.no_grad():
            nsa.compressed_gate.fill_(0.1)
        found.append(outputs(one, input_ids=TOKENS)[0])
        close(found[-1], decoded(one, TOKENS, [20, 1, 7]))
    assert torch.equal(*found)
    learning = [getattr(nsa, f"{stream}_out") for stream in ("keys", "values")]
    model(TOKENS).logits.square().sum().backward()
    assert all(bool((weight.grad != 0).all()) for weight in learning)
    assert nsa.keys_in.shape == (SMALL["length"], DIM, DIM)
    randomise(model)
    close(outputs(model, input_ids=TOKENS)[0], decoded(model, TOKENS, [9, 1, 5, 1, 12]))


def test_calls_of_any_size_agree_and_single_tokens_read_places(monkeypatch: pytest.MonkeyPatch) -> None:
    found, original = [], NSA.select

    def watched(self: NSA, call: Any) -> Any:
        found.append(original(self, call))
        return found[-1]

    monkeypatch.setattr(NSA, "select", watched)
    model = patched()
    whole = outputs(model, input_ids=TOKENS)[0]
    close(decoded(model, TOKENS, [9, 1, 5, 1, 1, 3, 1, 7]), whole)
    assert [isinstance(keep, Places) for keep in found[-3:]] == [False, True, False]
    short = outputs(model, input_ids=TOKENS[:, :15])[0]
    close(decoded(model, TOKENS[:, :15], [13, 1, 1], kind="static"), short)


def test_padding_of_whole_blocks_changes_nothing() -> None:
    model = patched()
    mask = torch.ones(2, 28, dtype=torch.long)
    mask[1, :8] = 0
    together = outputs(model, input_ids=TOKENS.repeat(2, 1), attention_mask=mask, position_ids=positions(mask))[0]
    close(together[:1], outputs(model, input_ids=TOKENS)[0])
    close(together[1:, 8:], outputs(model, input_ids=TOKENS[:, 8:])[0])


def test_untrained_gates_are_one_and_two_zeros_bit_for_bit() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected, cached = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 2])
    learning = model(tokens).logits
    small = {"block": 4, "length": 2, "stride": 2, "window": 3}
    for settings in ({**small, "top_k": 3}, {**small, "top_k": None}):
        with patchattn.patched(model, "nsa", **settings):
            assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
            assert torch.equal(decoded(model, tokens, [9, 1, 2]), cached)
            assert torch.equal(model(tokens).logits, learning)
    with patchattn.patched(model, "nsa", **small, top_k=2, first=0):
        assert not torch.equal(outputs(model, input_ids=tokens)[0], expected)


def test_gates_learn_at_once_and_means_give_gradients_beside_a_cache() -> None:
    model = patchattn.patch_model(tiny_llama(), "nsa", **SMALL)
    nsa = model.model.layers[0].self_attn.patchattn.nsa
    assert nsa.fast_parameters() == [nsa.chosen_gate, nsa.compressed_gate, nsa.window_gate]
    assert patchattn.patch_info(model)["extra_parameters"] == 3 * HEADS * WIDTH
    (model(TOKENS).logits * torch.linspace(-1, 1, 50)).sum().backward()
    for gate in nsa.fast_parameters():
        assert bool((gate.grad != 0).all())
    found = []
    randomise(model)
    for use_cache in (False, True):
        model.zero_grad()
        model(TOKENS, use_cache=use_cache).logits.square().sum().backward()
        found.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert bool(found[0].isfinite().all())
    close(*found)


def test_weights_are_those_of_the_keys_that_means_are_made_of() -> None:
    model = tiny_llama(attn_implementation="eager")
    patchattn.patch_model(model, "nsa", **SMALL)
    randomise(model)
    attended = []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: attended.append((call, output))):
        weights = model(TOKENS, output_attentions=True).attentions[0]
    call, output = attended[0]
    value = call.value.repeat_interleave(GROUP, dim=1)
    close((weights @ value).transpose(1, 2), output)


def test_what_does_not_fit_is_refused() -> None:
    for settings, message in (
        ({"length": 24}, "multiples of stride"),
        ({"block": 40}, "multiples of stride"),
        ({"top_k": 2}, "fewer than those that are always read"),
    ):
        with pytest.raises(ValueError, match=message):
            patchattn.patch_model(tiny_llama(), "nsa", **settings)
    assert patchattn.variant_info("nsa").configure({"preset": "fla"}).stride == 64
