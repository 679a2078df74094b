"""Self-Extend against all its logits written out in float64, from unrotated queries and keys."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument

from .families import FAMILIES
from .reference import DIM, HEADS, KV_HEADS, layer_in_and_out, rotate, tiny_llama

GROUP, WINDOW = 3, 4
SETTINGS = {"group": GROUP, "window": WINDOW}


def distance(row: int, key: int, group: int = GROUP, window: int = WINDOW) -> int:
    """Between two tokens, by the paper: floor division, and a query moved so that the borders meet."""
    return row - key if row - key < window else row // group + window - window // group - key // group


def by_loops(module: Any, inputs: np.ndarray, group: int, window: int) -> np.ndarray:
    """Output `(T, E)` of a layer for one sequence `(T, E)`."""
    weights = {name: getattr(module, f"{name}_proj").weight.detach().numpy() for name in "qkvo"}
    queries, keys, values = ((inputs @ weights[name].T).reshape(len(inputs), -1, DIM) for name in "qkv")
    rows = []
    for row in range(len(inputs)):
        heads = []
        for head in range(HEADS):
            own = head // (HEADS // KV_HEADS)
            logits = [
                rotate(queries[row, head], distance(row, key, group, window)) @ keys[key, own] / DIM**0.5
                for key in range(row + 1)
            ]
            exponentials = np.exp(np.array(logits) - max(logits))
            heads.append(exponentials / exponentials.sum() @ values[: row + 1, own])
        rows.append(weights["o"] @ np.concatenate(heads))
    return np.stack(rows)


def test_the_table_of_distances() -> None:
    table = [9, 9, 9, 8, 8, 8, 7, 7, 7, 6, 6, 6, 5, 5, 5, 4, 3, 2, 1, 0]
    assert [distance(19, key) for key in range(20)] == table


@pytest.mark.parametrize(("group", "window"), [(3, 4), (2, 6), (5, 1), (4, 19)])
def test_all_logits_written_out(group: int, window: int) -> None:
    model = patchattn.patch_model(tiny_llama(), "self_extend", group=group, window=window)
    inputs, found = layer_in_and_out(model, torch.arange(3, 23)[None])
    expected = by_loops(model.model.layers[0].self_attn, inputs[0], group, window)
    np.testing.assert_allclose(found[0], expected, atol=2e-6)  # the model's angles are float32
    if window < 10:
        plain = by_loops(model.model.layers[0].self_attn, inputs[0], 1, 1)
        assert np.abs(plain - expected).max() > 1e-3


@pytest.mark.parametrize("settings", [{"group": 1, "window": 2}, {"group": 3, "window": 20}])
def test_the_model_itself(settings: dict[str, int]) -> None:
    model, ids = tiny_llama(), torch.arange(3, 23)[None]
    with torch.no_grad():
        plain = model(ids).logits
        assert torch.equal(patchattn.patch_model(model, "self_extend", **settings)(ids).logits, plain)


@pytest.fixture(scope="module")
def model() -> Any:
    return patchattn.patch_model(FAMILIES["llama"].make_exact(), "self_extend", **SETTINGS)


def _texts() -> torch.Tensor:
    return torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sizes", [[17, 13, *[1] * 10], [1] * 40, [30, 10]])
def test_any_calls_are_one_forward(model: Any, sizes: list[int]) -> None:
    ids, cache, parts = _texts(), DynamicCache(), []
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for part in ids.split(sizes, dim=1):
            parts.append(model(part, **cache_argument(model, cache)).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("given", [True, False], ids=["position_ids", "by_column"])
def test_left_padding(model: Any, given: bool) -> None:
    """Also where the model rotates by column, and far keys must stand where they really are."""
    ids, mask = _texts(), torch.ones(2, 40, dtype=torch.long)
    ids[1, :7], mask[1, :7] = 0, 0
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if given else {}
    with torch.no_grad():
        found = model(ids, attention_mask=mask, **positions).logits
        alone = [model(ids[:1]).logits[0], model(ids[1:, 7:]).logits[0]]
    torch.testing.assert_close(found[0], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1, 7:], alone[1], rtol=1e-5, atol=1e-5)


def test_a_second_turn(model: Any) -> None:
    ids, how = _texts()[:1], {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = DynamicCache()
    first = model.generate(ids[:, :20], **how, **cache_argument(model, cache))
    turn = torch.cat([first, ids[:, 20:]], dim=1)
    again = model.generate(turn, **how, **cache_argument(model, cache))
    assert torch.equal(again, model.generate(turn, **how))
    beams = {**how, "num_beams": 3}
    assert torch.equal(model.generate(turn, **beams), model.generate(turn, use_cache=False, **beams))


def test_weights_are_those_of_one_softmax() -> None:
    ids = _texts()
    eager = patchattn.patch_model(FAMILIES["llama"].make(implementation="eager"), "self_extend", **SETTINGS)
    fused = patchattn.patch_model(FAMILIES["llama"].make(), "self_extend", **SETTINGS)
    with torch.no_grad():
        found = eager(ids, output_attentions=True)
        torch.testing.assert_close(found.logits, fused(ids).logits, rtol=1e-4, atol=1e-4)
    sums = found.attentions[1].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_layers_that_rotate_nothing_are_left_out_and_others_refused() -> None:
    from .test_rotary import _made

    made = patchattn.patch_model(_made("SmolLM3", no_rope_layers=[1, 0]), "self_extend", **SETTINGS)
    assert [site["name"] for site in patchattn.patch_info(made).sites if site["variants"]] == [
        "model.layers.0.self_attn"
    ]
    for family, reason in (("gpt2", "are learned"), ("bert", "bidirectional"), ("qwen2_5_vl", "M-RoPE")):
        with pytest.raises(NotImplementedError, match=f"self_extend.*{reason}"):
            patchattn.patch_model(FAMILIES[family].make(), "self_extend", modules=r"^(?!.*visual)")
