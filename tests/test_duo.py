"""DuoAttention: what each kv head sees, by loops; heads stored apart; gates, by the definition of a quantile."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.reading import selection
from patchattn.reading.gates import HeadGates

from .evictions import HOW, LANGUAGE, allocated, dense, extended, fed, padded, registered
from .families import FAMILIES, outputs

GATES = [[0.9, 0.1], [0.2, 0.3]]
STREAMING = {0.0: [[], []], 0.5: [[1], [0]], 0.75: [[1], [0, 1]], 1.0: [[0, 1], [0, 1]]}
LIMITS = {"sinks": 2, "recent": 4, "slack": 3}


def model_of(**settings: Any) -> Any:
    return patchattn.patch_model(FAMILIES["llama"].make_exact(), "duo", gates=GATES, **{**LIMITS, **settings})


def text(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, real = padded()
    more = torch.randint(3, 60, (3, length - 12), generator=torch.Generator().manual_seed(1))
    return torch.cat([ids, more], dim=1), extended(real, length)


def seen_by_loops(
    real: torch.Tensor,
    streaming: list[int],
    full_rows: int = 0,
    heads: int = 4,
    group: int = 2,
    recent_of_prompt: int = 0,
) -> torch.Tensor:
    """`(B, H, T, T)` bool of one layer: the first rows may see everything, the first 12 more keys, in all heads."""
    batch, length = real.shape
    seen = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for row in range(batch):
        places = [place for place in range(length) if real[row, place]]
        for own_rank, own in enumerate(places):
            for rank, place in enumerate(places[: own_rank + 1]):
                near = recent_of_prompt if recent_of_prompt and own < 12 else LIMITS["recent"]
                is_near = rank < LIMITS["sinks"] or own_rank - rank <= near
                for head in range(heads):
                    seen[row, head, own, place] = head // group not in streaming or is_near or own < full_rows
    return seen | torch.eye(length, dtype=torch.bool)  # rows of padding see something


@pytest.fixture(autouse=True)
def helpers() -> Any:
    with registered():
        yield


@pytest.mark.parametrize("sizes", [[12, *[1] * 12], [5, 4, 3, *[1] * 12], [1, 1, 10, 1, 5, 6], [24]], ids=str)
@pytest.mark.parametrize("sparsity", STREAMING)
def test_calls_are_one_forward_in_which_heads_see_what_they_keep(sparsity: float, sizes: list[int]) -> None:
    ids, real = text(24)
    found = fed(model_of(sparsity=sparsity), DynamicCache(), ids, real, sizes)
    expected = dense([seen_by_loops(real, heads) for heads in STREAMING[sparsity]], ids, real)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sparsity", STREAMING)
def test_what_a_long_call_does_not_see_is_not_read(sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text(24)[0].clamp(min=3)  # without padding
    real = torch.ones_like(ids, dtype=torch.bool)
    used, original = [], selection.block_sparse_attention
    monkeypatch.setattr(selection, "_PAYS_FROM", 1)
    monkeypatch.setattr(selection, "block_sparse_attention", lambda *given: used.append(1) or original(*given))
    found = fed(model_of(sparsity=sparsity), DynamicCache(), ids, real, [16, 1, 1, 6])
    expected = dense([seen_by_loops(real, heads) for heads in STREAMING[sparsity]], ids, real)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)
    assert bool(used) == bool(sparsity)


@pytest.mark.parametrize(("family", "layers"), [("qwen3", None), ("gpt2", None), ("llava", None), ("gemma2", [1])])
def test_other_families(family: str, layers: list[int] | None) -> None:
    """Norms of queries, learned positions and a head for each query, a vision tower; full among sliding layers."""
    ids, real = text(24)
    model: Any = FAMILIES[family].make_exact()
    tower = [site for site in patchattn.find_sites(model) if "vision" not in site.name]
    heads, kv_heads = tower[0].query_heads, tower[0].kv_heads
    gates = [[(head + layer) % 2 / 2 for head in range(kv_heads)] for layer in range(len(tower))]
    patchattn.patch_model(model, "duo", gates=gates, layers=layers, modules=LANGUAGE, **LIMITS)
    cache = DynamicCache(config=model.config.get_text_config())
    found = fed(model, cache, ids, real, [7, 5, *[1] * 12])
    chosen = range(len(tower)) if layers is None else layers
    streaming = [[head for head in range(kv_heads) if gates[layer][head] == 0] for layer in chosen]
    seen = [seen_by_loops(real, each, heads=heads, group=heads // kv_heads) for each in streaming]
    expected = dense(seen, ids, real, family, layers)
    exact = found.dtype == torch.float64
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9 if exact else 1e-4, atol=1e-9 if exact else 1e-4)
    assert [list(cache.layers[layer].apart[0]) for layer in chosen] == streaming


def test_learned_sinks_are_refused_where_keys_are_apart() -> None:
    model: Any = FAMILIES["gpt_oss"].make()
    site = patchattn.find_sites(model)[0]
    gates = [[0.0, *[1.0] * (site.kv_heads - 1)]] * site.layer_count
    patchattn.patch_model(model, "duo", gates=gates, layers=[1], **LIMITS)
    ids, real = text(24)
    with pytest.raises(NotImplementedError, match="heads apart, and it has sinks, or a position bias, by head"):
        fed(model, DynamicCache(config=model.config), ids, real, [12, 12])


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_a_first_call_may_see_everything(sparsity: float) -> None:
    ids, real = text(24)
    expected = dense([seen_by_loops(real, heads, full_rows=12) for heads in STREAMING[sparsity]], ids, real)
    for sizes in ([12, *[1] * 12], [12, 5, 7]):
        found = fed(model_of(sparsity=sparsity, prefill="full"), DynamicCache(), ids, real, sizes)
        torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_a_prompt_may_see_more_recent_keys(sparsity: float) -> None:
    """As LServe has it, however the prompt is cut; what it saw more of leaves storage behind it."""
    ids, real = text(24)
    expected = dense([seen_by_loops(real, heads, recent_of_prompt=7) for heads in STREAMING[sparsity]], ids, real)
    for sizes in ([12, *[1] * 12], [5, 4, 3, *[1] * 12]):
        cache = DynamicCache()
        found = fed(model_of(sparsity=sparsity, prefill_recent=7, slack=0), cache, ids, real, sizes)
        torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)
        assert cache.layers[0].apart[1].keys.shape[2] <= LIMITS["sinks"] + LIMITS["recent"] + 1
    with pytest.raises(NotImplementedError, match=r"duo.* no assisted decoding, .* with prefill_recent"):
        model_of(prefill_recent=7).generate(ids[:1], prompt_lookup_num_tokens=3, max_new_tokens=9, **HOW)


def test_tokens_behind_a_prompt_that_saw_more_are_taken_back() -> None:
    ids, real = text(24)
    model, cache = model_of(prefill_recent=7), DynamicCache()
    fed(model, cache, ids, real, [12, *[1] * 3])
    expected = fed(model, cache, ids, real, [1] * 6)
    cache.crop(-LIMITS["slack"])
    torch.testing.assert_close(fed(model, cache, ids, real, [1] * 3), expected[:, 3:6], rtol=1e-9, atol=1e-9)


def test_lserve_is_a_preset() -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "duo", preset="lserve", gates=GATES)
    settings = patchattn.patch_info(model)["patches"][0]["config"]
    wanted = {"sparsity": 0.5, "sinks": 128, "recent": 256, "prefill_recent": 8192, "prefill": "streaming"}
    assert {name: settings[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefill_recent": 3}, "must be at least recent, 4, got 3"),
        ({"prefill_recent": 9, "prefill": "full"}, "leave out prefill_recent, got 9"),
    ],
)
def test_prompts_that_see_less_or_everything_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(**settings)


def test_heads_that_forget_are_stored_apart_and_take_up_what_they_keep() -> None:
    model, cache = model_of(), DynamicCache()
    ids = torch.randint(3, 60, (1, 400), generator=torch.Generator().manual_seed(0))
    kept = LIMITS["sinks"] + LIMITS["recent"]
    for size in (396, 1, 1, 1, 1):
        start = cache.get_seq_length()
        with torch.no_grad():
            model(ids[:, start : start + size], **cache_argument(model, cache))
    report = patchattn.cache_report(cache)
    for layer, heads, memory in zip(cache.layers, STREAMING[0.5], report.layers, strict=True):
        chosen, other = layer.apart
        assert list(chosen) == heads
        assert (layer.keys.shape[1], layer.keys.shape[2], layer.get_seq_length()) == (1, 400, 400)
        # each new one is told by who attends to it, and drops wait until one in sixteen can go, at most
        assert other.keys.shape[1] == 1
        assert kept <= other.keys.shape[2] <= kept + 2 * LIMITS["slack"] + 1
        token = 2 * layer.keys.shape[3] * layer.keys.element_size()  # of one head
        assert memory.dense_bytes == 2 * 400 * token
        spare = sum(allocated(part) // token - part.keys.shape[2] for part in (layer, other))
        columns = sum(tensor.nbytes for tensor in other.kept.tensors())
        assert memory.stored_bytes == (400 + other.keys.shape[2] + spare) * token + columns
    assert cache.layers[0].apart[1].keys.untyped_storage().nbytes() < cache.layers[0].keys.untyped_storage().nbytes()


def test_assistants_are_exact_or_refused_by_name() -> None:
    ids = padded()[0][:1]
    how = {**HOW, "max_new_tokens": 25}
    model = model_of()
    plain = model.generate(ids, **how).sequences
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **how).sequences, plain)
    with pytest.raises(NotImplementedError, match=r'duo.* no assisted decoding, .* under prefill="full"'):
        model_of(prefill="full").generate(ids, prompt_lookup_num_tokens=3, **how)


def test_other_variants_are_refused_where_keys_are_apart() -> None:
    model = patchattn.patch_model(model_of(), "ssmax")
    with pytest.raises(NotImplementedError, match="keeps keys of some heads apart, and the variants 'duo', 'ssmax'"):
        model.generate(padded()[0], max_new_tokens=4, **HOW)


# --- gates ------------------------------------------------------------------------------------------------------------


def test_heads_below_the_quantile_of_all_gates_forget() -> None:
    draw = np.random.default_rng(0)
    for _ in range(60):
        layers, heads, share = (
            draw.integers(1, 7),
            draw.integers(1, 6),
            float(draw.choice([0, 0.1, 0.25, 0.5, 0.7, 0.9])),
        )
        gates = draw.permutation(layers * heads).reshape(layers, heads) / (layers * heads)
        below = gates < np.quantile(gates, share)
        found = HeadGates.parse(gates.tolist()).lowest(share)
        assert found == [tuple(np.flatnonzero(row)) for row in below]
        assert HeadGates.parse(gates.tolist()).lowest(1.0) == [tuple(range(heads))] * layers


def test_of_equal_gates_as_many_forget_the_first_ones_first() -> None:
    gates = HeadGates.parse([[1.0, 0.5], [0.5, 0.5], [0.5, 1.0]])
    count = math.ceil(0.5 * 5)
    assert gates.lowest(0.5) == [(1,), (0, 1), ()]
    assert sum(map(len, gates.lowest(0.5))) == count


def test_files_of_gates(tmp_path: Path) -> None:
    released = tmp_path / "full_attention_heads.tsv"
    released.write_text("0.9\t0.1\n2.0e-1\t0.3\n")
    own = tmp_path / "gates.json"
    base = {"model_type": "llama", "layers": 2, "heads": 4, "name": None}
    own.write_text(json.dumps({"gates": GATES, "base": base, "calibration": {"seed": 0}}))
    for given in (released, str(own), GATES):
        model = patchattn.patch_model(FAMILIES["llama"].make(), "duo", gates=given)
        assert patchattn.patch_info(model)["patches"][0]["config"]["gates"]["gates"] == GATES


@pytest.mark.parametrize(
    ("gates", "error", "message"),
    [
        (None, ValueError, r"duo needs gates=\.\.\.: the file that `patchattn calibrate duo` writes"),
        ([[0.5, 0.5]], ValueError, "given for 1 layers, .* one of 2 with 2 kv heads"),
        ([[0.5, 0.5], [0.5]], ValueError, "given for 2 layers, 1 in the one of model.layers.1.self_attn"),
        ([[0.5, 1.5], [0.5, 0.5]], ValueError, "from 0 to 1, got 1.5"),
        ([[0.5, "a"], [0.5, 0.5]], TypeError, "per layer a number for each kv head"),
        ([], ValueError, "Every layer must have a gate"),
        ({"heads": [[0.5]]}, ValueError, "Gates have the fields gates, base, calibration"),
        ("missing.json", ValueError, "There is no file of gates 'missing.json'"),
        (
            {"gates": GATES, "base": {"model_type": "qwen3", "layers": 2, "heads": 4, "name": None}},
            ValueError,
            "This file of gates is for qwen3 of 2 layers with 4 heads, but model.layers.0.self_attn belongs to llama",
        ),
    ],
)
def test_gates_that_are_not_those_of_the_model_are_refused(gates: Any, error: Any, message: str) -> None:
    model = FAMILIES["llama"].make()
    with pytest.raises(error, match=message):
        patchattn.patch_model(model, "duo", gates=gates)
    assert not patchattn.patch_info(model)["patches"]


def test_a_damaged_tsv_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gates.tsv"
    path.write_text("0.5\tx\n")
    with pytest.raises(ValueError, match=r"gates\.tsv: A gate is a number from 0 to 1, got 'x'"):
        patchattn.patch_model(FAMILIES["llama"].make(), "duo", gates=str(path))


def test_a_position_bias_is_refused() -> None:
    model: Any = FAMILIES["t5"].make()
    config = model.config
    gates = [[0.9, *[0.1] * (config.num_heads - 1)]] * config.num_decoder_layers
    with pytest.raises(NotImplementedError, match="'duo' does not support position_bias"):
        outputs(patchattn.patch_model(model, "duo", gates=gates), **FAMILIES["t5"].inputs())
