"""FLAP against the equations in float64 numpy on what hooks see; removed equals masked; saved and reloaded."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.variants.pruning.flap import flap_statistics
from patchattn.variants.pruning.flap.structures import Units, lowest_units

from .families import FAMILIES, outputs
from .test_importance import examples, inputs_of, padded
from .test_prune import ATTENTION, OUTPUTS

HEADS, WIDTH, LAYER, CHANNELS = 4, 8, 32, 48  # of every family
READERS = re.compile(r".*(?:down_proj|fc2|mlp\.c_proj|(?<!attention\.)output\.dense|lin2|mlp\.Wo|4h_to_h|Dense\.wo)")
# kv heads of the families with MLPs of every kind, and how many projections an MLP has
RANKED = {"llama": (2, 3), "gpt2": (4, 2), "bert": (4, 2), "phi3": (2, 3)}


def layer_of(name: str) -> str:
    """`model.layers.1`, with T5's three parts of a layer together; empty outside layers."""
    found = re.match(r"(.*?(?:layers?|h|blocks?)\.\d+)\.", name)
    return found[1] if found else ""


def projections(model: nn.Module) -> dict[str, tuple[str, str | None]]:
    """Attention module to its output projection and its MLP's last one, by the names of the model code."""
    linear = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    found = {}
    for site in patchattn.find_sites(model):
        owner = re.sub(r"attention\.(?:self|attention)$", "attention", site.name) + "."
        (output,) = [n for n in linear if n.startswith(owner) and n.endswith(OUTPUTS) and ATTENTION.search(n)]
        readers = [n for n in linear if layer_of(n) == layer_of(owner) and READERS.fullmatch(n)]
        found[site.name] = (output, readers[0] if readers and not site.is_cross else None)
    return found


def matrix(model: nn.Module, path: str) -> np.ndarray:
    module = model.get_submodule(path)
    weight = module.weight.detach().double().numpy()
    return weight.T if hasattr(module, "nf") else weight


def bias_of(model: nn.Module, path: str) -> np.ndarray:
    bias = model.get_submodule(path).bias
    return np.zeros(LAYER) if bias is None else bias.detach().double().numpy()


def config_of(model: nn.Module) -> dict[str, Any]:
    (patch,) = patchattn.patch_info(model)["patches"]
    return patch["config"]


def removed_by(mask: str) -> list[int]:
    """The channels that a mask takes out; they come in multiples of eight here."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(bytes.fromhex(mask), dtype=np.uint8)) == 0).tolist()


def removed_inputs(model: nn.Module, config: dict[str, Any]) -> dict[str, list[int]]:
    """Path of each projection to the inputs that a configuration takes from it."""
    found = {}
    for site, (output, reader) in projections(model).items():
        heads, mask = (config["heads"] or {}).get(site, []), (config["kept_channels"] or {}).get(site)
        if heads:
            found[output] = [head * WIDTH + i for head in heads for i in range(WIDTH)]
        if mask is not None:
            assert reader is not None
            found[reader] = removed_by(mask)
    return found


def masked(model: nn.Module, removed: dict[str, list[int]], means: dict[str, np.ndarray] | None) -> nn.Module:
    """The model with those inputs zeroed, and, with their means, with the biases of the paper."""
    for path, index in removed.items():
        module = model.get_submodule(path)
        if means is not None:
            bias = matrix(model, path)[:, index] @ means[path][index] + bias_of(model, path)
            module.bias = nn.Parameter(torch.from_numpy(bias).to(module.weight.dtype))
        weight = module.weight.data if hasattr(module, "nf") else module.weight.data.T
        weight[index] = 0.0
    return model


def exact_inputs(family: str) -> dict[str, torch.Tensor]:
    dtype = next(FAMILIES[family].make_exact().parameters()).dtype
    inputs = FAMILIES[family].inputs()
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


# --- what is taken out


def channel_scores(x: np.ndarray, weight: np.ndarray, metric: str) -> np.ndarray:
    """The metrics of the paper."""
    variance = ((x - x.mean(0)) ** 2).sum(0) / (len(x) - 1)
    if metric == "wifv":
        return variance * (weight**2).sum(0)
    if metric == "ifv":
        return variance
    return np.abs(weight).mean(0) * np.sqrt((x**2).sum(0) / len(x))


def ranking(family: str, model: nn.Module, data: list[Any], metric: str) -> list[tuple[float, int, str, str, int]]:
    """Every unit, lowest first: score, weights, attention module, heads or channels, number."""
    kv_heads, parts = RANKED[family]
    group = HEADS // kv_heads
    units = []
    for site, (output, reader) in projections(model).items():
        scores = channel_scores(inputs_of(model, output, data), matrix(model, output), metric)
        scores = (scores - scores.mean()) / scores.std(ddof=1)
        for number, score in enumerate(scores.reshape(kv_heads, -1).mean(1)):
            units.append((score, (2 * group + 2) * WIDTH * LAYER, site, "heads", number))
        scores = channel_scores(inputs_of(model, reader, data), matrix(model, reader), metric)
        scores = (scores - scores.mean()) / scores.std(ddof=1)
        units += [(score, parts * LAYER, site, "channels", number) for number, score in enumerate(scores)]
    return sorted(units)


def taken(units: list[tuple[float, int, str, str, int]], sparsity: float) -> set[tuple[str, str, int]]:
    """The lowest units, as many as come closest to the share of all weights; the best of each module stays."""
    best = {unit[2:4]: unit[4] for unit in units}
    candidates = [unit for unit in units if best[unit[2:4]] != unit[4]]
    wanted = sparsity * sum(unit[1] for unit in units)
    sums = np.cumsum([0, *(unit[1] for unit in candidates)])
    return {unit[2:] for unit in candidates[: int(np.abs(sums - wanted).argmin())]}


def units_of(config: dict[str, Any], kv_heads: int) -> set[tuple[str, str, int]]:
    group = HEADS // kv_heads
    heads = {(site, "heads", head // group) for site, numbers in (config["heads"] or {}).items() for head in numbers}
    masks = (config["kept_channels"] or {}).items()
    return heads | {(site, "channels", n) for site, mask in masks for n in removed_by(mask)}


@pytest.mark.parametrize("metric", ["wifv", "ifv", "wifn"])
@pytest.mark.parametrize("family", list(RANKED))
def test_the_lowest_units_by_the_equations_go(family: str, metric: Any) -> None:
    model, data = FAMILIES[family].make_exact(), [{"input_ids": e["input_ids"]} for e in examples("llama")]
    units = ranking(family, model, data, metric)
    statistics = flap_statistics(model, [padded(examples("llama")[:3]), padded(examples("llama")[3:])])
    for sparsity in (0.1, 0.35, 0.6):
        with patchattn.patched(model, "flap", statistics=statistics, sparsity=sparsity, metric=metric):
            assert units_of(config_of(model), RANKED[family][0]) == taken(units, sparsity)
    with patchattn.patched(model, "flap", statistics=statistics, sparsity=0.5, metric=metric, structure="ul-um"):
        found = units_of(config_of(model), RANKED[family][0])
    for site in projections(model):
        for kind in ("heads", "channels"):
            own = [unit[2:] for unit in units if unit[2:4] == (site, kind)]
            assert {unit for unit in found if unit[:2] == (site, kind)} == set(own[: len(own) // 2])


@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_sparsity_is_reached_within_one_unit(family: str, mlp: bool) -> None:
    kv_heads, parts = RANKED[family]
    model = FAMILIES[family].make_exact()
    statistics = flap_statistics(model, [FAMILIES[family].inputs()], mlp=mlp)
    attention = (2 * HEADS + 2 * kv_heads) * WIDTH * LAYER
    total = 2 * (attention + (parts * LAYER * CHANNELS if mlp else 0))
    largest = attention // kv_heads
    before = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    for sparsity in (0.05, 0.2, 0.4) if mlp else (0.25, 0.5):
        with patchattn.patched(model, "flap", statistics=statistics, sparsity=sparsity, mlp=mlp):
            saved = before - sum(p.numel() for p in model.parameters() if p.dim() > 1)
        assert abs(saved - sparsity * total) <= largest / 2


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=4),
    sparsity=st.floats(0.0, 0.99),
    seed=st.integers(0, 1000),
)
def test_lowest_units_of_any_modules(sizes: list[tuple[int, int]], sparsity: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    modules = [
        Units(str(i), True, torch.from_numpy(generator.permutation(n).astype(float) + i / 10), weight)
        for i, (n, weight) in enumerate(sizes)
    ]
    units = [(float(s), m.weight, m.site, "channels", n) for m in modules for n, s in enumerate(m.scores)]
    expected = sum(n * weight for n, weight in sizes) * sparsity > sum((n - 1) * weight for n, weight in sizes)
    if expected:
        with pytest.raises(ValueError, match="more than there is to take"):
            lowest_units(modules, sparsity, "al-am")
    else:
        found = lowest_units(modules, sparsity, "al-am")
        assert {(str(i), "channels", n) for i, own in enumerate(found) for n in own} == taken(sorted(units), sparsity)
    for (count, _), own in zip(sizes, lowest_units(modules, sparsity, "ul-um"), strict=True):
        assert len(own) == min(int(sparsity * count + 1e-9), count - 1)


def test_whole_kv_groups_go_and_the_cache_shrinks() -> None:
    model, inputs = FAMILIES["llama"].make(), FAMILIES["llama"].inputs()
    statistics = flap_statistics(model, [inputs], mlp=False)
    patchattn.patch_model(model, "flap", statistics=statistics, sparsity=0.5, mlp=False)
    heads = config_of(model)["heads"]
    assert sum(map(len, heads.values())) == 4
    assert all(set(own) in ({0, 1}, {2, 3}) for own in heads.values())
    cache = DynamicCache(config=model.config)
    outputs(model, **inputs, **cache_argument(model, cache))
    assert [layer.keys.shape[1] for layer in cache.layers] == [1, 1]


# --- what comes of it


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt_oss"])
def test_removed_equals_masked(family: str, compensate: bool) -> None:
    model, inputs = FAMILIES[family].make_exact(), exact_inputs(family)
    dtype = next(model.parameters()).dtype
    statistics = flap_statistics(model, [inputs])
    patchattn.patch_model(model, "flap", statistics=statistics, sparsity=0.5, structure="ul-um", compensate=compensate)
    config, reference = config_of(model), FAMILIES[family].make_exact()
    removed = removed_inputs(reference, config)
    modules = projections(reference)
    assert len(removed) == len(modules) + sum(reader is not None for _, reader in modules.values())
    means = {path: inputs_of(reference, path, [inputs]).mean(0) for path in removed} if compensate else None
    expected = outputs(masked(reference, removed, means), **inputs)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for left, right in zip(expected, outputs(model, **inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "phi3", "t5"])
def test_every_projection_keeps_the_mean_of_its_output(family: str) -> None:
    model, inputs = FAMILIES[family].make_exact(), FAMILIES[family].inputs()
    statistics = flap_statistics(model, [inputs])
    known = {
        path: (inputs_of(model, path, [inputs]), matrix(model, path), bias_of(model, path))
        for pair in projections(model).values()
        for path in pair
        if path is not None
    }
    patchattn.patch_model(model, "flap", statistics=statistics, sparsity=0.5, structure="ul-um")
    removed = removed_inputs(model, config_of(model))
    assert set(removed) == set(known)
    for path, (x, weight, bias) in known.items():
        kept = np.delete(x, removed[path], axis=1)
        after = (kept @ matrix(model, path).T + bias_of(model, path)).mean(0)
        np.testing.assert_allclose(after, (x @ weight.T + bias).mean(0), rtol=0, atol=1e-10)


def test_heads_and_channels_by_hand() -> None:
    inputs = FAMILIES["llama"].inputs()
    name = "model.layers.1.self_attn"
    config = {"heads": {name: [3]}, "kept_channels": {name: "fff0000fff00"}}
    expected = masked(FAMILIES["llama"].make_exact(), removed_inputs(FAMILIES["llama"].make_exact(), config), None)
    model = FAMILIES["llama"].make_exact()
    statistics = flap_statistics(model, [inputs])
    for heads in (config["heads"], {1: [3]}):
        with patchattn.patched(model, "flap", **{**config, "heads": heads}, compensate=False):
            torch.testing.assert_close(outputs(model, **inputs), outputs(expected, **inputs), rtol=1e-9, atol=1e-9)
            assert config_of(model)["heads"] == config["heads"]
    with patchattn.patched(model, "flap", **config, statistics=statistics):
        assert model.model.layers[1].self_attn.o_proj.bias is not None
        assert model.model.layers[0].self_attn.o_proj.bias is None
    other = patchattn.patch_model(model, "flap", kept_channels={name: "f" * 12}, compensate=False)
    assert other.model.layers[1].mlp.down_proj.in_features == CHANNELS


def test_a_pruned_model_generates_trains_and_composes() -> None:
    model, inputs = FAMILIES["llama"].make(), FAMILIES["llama"].inputs()
    statistics = flap_statistics(model, [inputs])
    patchattn.patch_model(
        model, ["flap", "moh"], {"flap": {"statistics": statistics, "sparsity": 0.5}, "moh": {"active_ratio": 0.5}}
    )
    tokens = model.generate(inputs["input_ids"], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj", "o_proj"]))
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters())


# --- real data


def test_compensation_helps_a_real_model(data_dir: Path) -> None:
    folder = data_dir / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    start = torch.full((16, 1), tokenizer.bos_token_id)
    texts = model.generate(start, do_sample=True, max_new_tokens=100, min_new_tokens=100, pad_token_id=0)
    statistics = flap_statistics(model, [{"input_ids": texts[:8]}])
    losses = {}
    for compensate in (True, False):
        with (
            patchattn.patched(model, "flap", statistics=statistics, sparsity=0.3, compensate=compensate),
            torch.no_grad(),
        ):
            losses[compensate] = float(model(input_ids=texts[8:], labels=texts[8:]).loss)
    assert losses[True] < losses[False]
