"""FLAP saved, reloaded and undone; masks and files of statistics; what is refused; `patchattn calibrate flap`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.calibration.data import TextExample, make_batches
from patchattn.cli import main as cli
from patchattn.core.patching import applied_patches, apply_patches
from patchattn.core.plan import Patch
from patchattn.surgery.channels import channel_mask, masked_channels
from patchattn.variants.pruning.flap import FlapStatistics, flap_statistics

from .families import FAMILIES, outputs
from .saving import sign
from .test_flap import CHANNELS, LAYER, config_of
from .test_importance_cli import tokenizer


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "phi3", "t5", "whisper", "llava"])
def test_it_is_saved_whole_and_alone_and_undone(family: str, tmp_path: Path) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
    parameters, before = dict(model.named_parameters()), outputs(model, **inputs)
    flap_statistics(model, [inputs]).save(tmp_path / "flap.safetensors")
    patchattn.patch_model(model, "flap", statistics=str(tmp_path / "flap.safetensors"), sparsity=0.5, structure="ul-um")
    (tmp_path / "flap.safetensors").unlink()
    expected = outputs(model, **inputs)
    patchattn.save_pretrained(model, tmp_path / "whole")
    patchattn.save_patch(model, tmp_path / "patch")
    whole = patchattn.from_pretrained(tmp_path / "whole")
    alone = patchattn.load_patch(FAMILIES[family].make(), tmp_path / "patch")
    for loaded in (whole, alone):
        assert config_of(loaded) == config_of(model)
        assert all(bool(p.isfinite().all()) for p in loaded.parameters())
        for left, right in zip(expected, outputs(loaded, **inputs), strict=True):
            assert torch.equal(left, right)
    with pytest.raises(ValueError, match="was loaded without what Flap took out"):
        patchattn.unpatch_model(whole)
    patchattn.save_pretrained(whole, tmp_path / "again")
    assert torch.equal(outputs(patchattn.from_pretrained(tmp_path / "again"), **inputs)[0], expected[0])
    patchattn.unpatch_model(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    for undone in (model, patchattn.unpatch_model(alone)):
        for left, right in zip(before, outputs(undone, **inputs), strict=True):
            assert torch.equal(left, right)


def test_what_is_loaded_before_its_biases_is_nan() -> None:
    model, inputs = FAMILIES["llama"].make(), FAMILIES["llama"].inputs()
    patchattn.patch_model(model, "flap", statistics=flap_statistics(model, [inputs]), sparsity=0.3)
    empty = FAMILIES["llama"].make()
    apply_patches(empty, [Patch.from_dict(patch.to_dict()) for patch in applied_patches(model)])
    assert bool(outputs(empty, **inputs)[0].isnan().all())


def test_files_without_a_bias_are_refused(tmp_path: Path) -> None:
    model, inputs = FAMILIES["llama"].make(), FAMILIES["llama"].inputs()
    patchattn.patch_model(model, "flap", statistics=flap_statistics(model, [inputs]), sparsity=0.3)
    patchattn.save_pretrained(model, tmp_path)
    for name in ("model.safetensors", "patchattn_model.safetensors"):
        tensors = load_file(tmp_path / name)
        assert bool(tensors.pop("model.layers.1.mlp.down_proj.bias").isfinite().all())
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    sign(tmp_path)
    with pytest.raises(ValueError, match=r"1 tensor missing \(model\.layers\.1\.mlp\.down_proj\.bias\)"):
        patchattn.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 tensor missing \(model\.layers\.1\.mlp\.down_proj\.bias\)"):
        patchattn.load_patch(FAMILIES["llama"].make(), tmp_path)


# --- masks


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_masks_are_packed_bits(given_: tuple[int, set[int]]) -> None:
    count, kept = given_
    bits = np.zeros(-(-count // 8) * 8, dtype=np.uint8)
    bits[sorted(kept)] = 1
    mask = channel_mask(sorted(kept), count)
    assert mask == np.packbits(bits).tobytes().hex()[: -(-count // 4)]
    assert masked_channels(mask, count) == sorted(kept)


@pytest.mark.parametrize("mask", ["", "ff", "fffff", "001", "FFC", "0x1", "ff9", "000", "f_f", "ffé"])
def test_masks_of_another_kind(mask: str) -> None:
    with pytest.raises(ValueError, match="of 10 are given by 3 hexadecimal digits"):
        masked_channels(mask, 10)


# --- refusals


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Statistics of several models, and broken ones."""
    folder = tmp_path_factory.mktemp("statistics")

    def make(name: str, family: str, **how: Any) -> None:
        flap_statistics(FAMILIES[family].make(), [FAMILIES[family].inputs()], **how).save(folder / name)

    make("good", "llama")
    make("other", "gpt2")
    make("heads", "llama", mlp=False)
    (folder / "cut").write_bytes((folder / "good").read_bytes()[:-9])
    (folder / "text").write_text("no statistics")
    save_file({"a": torch.zeros(2)}, folder / "plain")
    tensors, about = load_file(folder / "good"), {"format": "patchattn channel statistics 2"}
    base = '{"model_type": "llama", "layers": 2, "heads": 4, "name": null}'
    save_file(tensors, folder / "baseless", metadata=about)
    key = "model.layers.0.mlp.down_proj.mean"
    for name, change in {
        "nan": {key: torch.full((CHANNELS,), torch.nan)},
        "short": {key: torch.zeros(3)},
        "unknown": {"model.layers.0.mlp.down_proj.median": torch.zeros(CHANNELS)},
    }.items():
        save_file({**tensors, **change}, folder / name, metadata={**about, "base": base})
    narrow = {
        key: value[:40].clone() if "down_proj" in key and value.dim() else value for key, value in tensors.items()
    }
    save_file(narrow, folder / "narrow", metadata={**about, "base": base})
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({}, ValueError, r"needs sparsity=\.\.\. and statistics"),
        ({"sparsity": 0.2}, ValueError, r"needs sparsity=\.\.\. and statistics"),
        ({"statistics": "good"}, ValueError, r"needs sparsity=\.\.\. and statistics"),
        ({"statistics": "good", "sparsity": 1.0}, ValueError, "must keep one head and one channel"),
        ({"statistics": "good", "sparsity": 0.99}, ValueError, "more than there is to take"),
        ({"statistics": "good", "sparsity": 1e-4}, ValueError, "less than a single head or channel"),
        ({"statistics": "good", "sparsity": -0.1}, ValueError, "between"),
        ({"statistics": "good", "sparsity": "much"}, TypeError, "sparsity"),
        ({"statistics": "good", "sparsity": 0.2, "metric": "wifw"}, TypeError, "metric"),
        ({"statistics": "good", "sparsity": 0.2, "metric": "amp"}, ValueError, "structure='amp'"),
        ({"statistics": "good", "sparsity": 0.2, "preset": "amp"}, ValueError, "--amp"),
        ({"statistics": "good", "sparsity": 0.2, "heads": {1: [0]}}, ValueError, "leave out sparsity"),
        (
            {"statistics": 3, "sparsity": 0.2},
            TypeError,
            r"str \| Path \| FlapStatistics \| None, got 3",
        ),
        ({"statistics": "nowhere", "sparsity": 0.2}, ValueError, "There is no file 'nowhere'"),
        ({"statistics": "other", "sparsity": 0.2}, ValueError, "are of gpt2 of 2 layers .* the model is llama"),
        ({"statistics": "other", "heads": {1: [0]}}, ValueError, "are of gpt2 of 2 layers .* the model is llama"),
        ({"statistics": "heads", "sparsity": 0.2}, ValueError, r"know nothing of model\.layers\.0\.mlp\.down_proj"),
        ({"statistics": "narrow", "sparsity": 0.2}, ValueError, "reads 40 channels; in the model given it reads 48"),
        ({"statistics": "cut", "sparsity": 0.2}, ValueError, "cut is damaged"),
        ({"statistics": "text", "sparsity": 0.2}, ValueError, "text is damaged"),
        ({"statistics": "plain", "sparsity": 0.2}, ValueError, "holds no statistics"),
        ({"statistics": "baseless", "sparsity": 0.2}, ValueError, "baseless is damaged"),
        ({"statistics": "nan", "sparsity": 0.2}, ValueError, "mean is not finite"),
        ({"statistics": "short", "sparsity": 0.2}, ValueError, "do not fit together"),
        ({"statistics": "unknown", "sparsity": 0.2}, ValueError, "median"),
        ({"heads": {1: [0]}}, ValueError, "compensate=False"),
        ({"heads": {1: [4]}, "compensate": False}, ValueError, "counted from 0"),
        ({"heads": {1: [0, 1, 2, 3]}, "compensate": False}, ValueError, "All 4"),
        ({"kept_channels": {}, "compensate": False}, ValueError, "empty"),
        ({"kept_channels": {1: "ff"}, "compensate": False}, TypeError, "hexadecimal text"),
        ({"kept_channels": "ff", "compensate": False}, TypeError, "mapping"),
        ({"kept_channels": {"model.layers.1.self_attn": "ff"}, "compensate": False}, ValueError, "12 hexadecimal"),
        ({"kept_channels": {"model.layers.1.mlp": "f" * 12}, "compensate": False}, ValueError, "no self-attention"),
    ],
    ids=str,
)
def test_mistakes(wrong: dict[str, Any], error: type[Exception], message: str, files: dict[str, str]) -> None:
    model = FAMILIES["llama"].make()
    parameters = dict(model.named_parameters())
    given_ = {**wrong, "statistics": files.get(wrong.get("statistics"), wrong.get("statistics"))}
    with pytest.raises(error, match=message):
        patchattn.patch_model(model, "flap", **given_)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not hasattr(model.config, "patchattn")


def test_statistics_come_back_and_say_what_they_are_of(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    made = flap_statistics(model, [FAMILIES["llama"].inputs()], amp=True)
    made.save(tmp_path / "a")
    found = FlapStatistics.load(tmp_path / "a")
    assert found.base == made.base
    assert "llama" in repr(found)
    assert list(found.head_norms) == [site.name for site in patchattn.find_sites(model)]
    for path, known in made.channels.items():
        for name, value in vars(known).items():
            assert torch.equal(torch.as_tensor(vars(found.channels[path])[name]), torch.as_tensor(value))
    with pytest.raises(ValueError, match="0 batches"):
        flap_statistics(model, [])
    with pytest.raises(ValueError, match=r"model\.eval"):
        flap_statistics(model.train(), [FAMILIES["llama"].inputs()])


def test_a_mixture_of_experts_is_pruned_by_heads_alone() -> None:
    model, inputs = FAMILIES["gpt_oss"].make(), FAMILIES["gpt_oss"].inputs()
    with pytest.raises(NotImplementedError, match="as in a mixture of experts"):
        flap_statistics(model, [inputs])
    statistics = flap_statistics(model, [inputs], mlp=False)
    with pytest.raises(NotImplementedError, match="mlp=False"):
        patchattn.patch_model(model, "flap", statistics=statistics, sparsity=0.5)
    patchattn.patch_model(model, "flap", statistics=statistics, sparsity=0.5, mlp=False)
    assert bool(outputs(model, **inputs)[0].isfinite().all())


class Interleaved(nn.Module):
    """A gate and what it gates in turn: nothing says so but its code."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(LAYER, 2 * CHANNELS), nn.Linear(CHANNELS, LAYER)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up_proj(x)
        return self.down_proj(both[..., ::2].sigmoid() * both[..., 1::2])


def _with_norm(mlp: nn.Module) -> nn.Module:
    mlp.norm = nn.LayerNorm(CHANNELS)
    return mlp


def _with_third(mlp: nn.Module) -> nn.Module:
    mlp.third = nn.Linear(LAYER, CHANNELS)
    return mlp


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mlp: Interleaved(), "how mlp.gate_up_proj lays out two times 48 channels"),
        (_with_norm, r"nothing is known of mlp\.norm\.weight"),
        (_with_third, "not two or three projections"),
    ],
)
def test_mlps_that_are_not_recognised(change: Callable[[nn.Module], nn.Module], message: str) -> None:
    model = FAMILIES["llama"].make()
    model.model.layers[1].mlp = change(model.model.layers[1].mlp)
    with pytest.raises(NotImplementedError, match=message):
        patchattn.patch_model(
            model, "flap", kept_channels={"model.layers.1.self_attn": "0" * 11 + "1"}, compensate=False
        )


def test_adapters_come_after_it() -> None:
    model = get_peft_model(FAMILIES["llama"].make(), LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="before adding adapters"):
        patchattn.patch_model(
            model, "flap", kept_channels={"model.layers.1.self_attn": "0" * 11 + "1"}, compensate=False
        )


def test_as_many_channels_as_the_layer_is_wide() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    model = LlamaForCausalLM(config)
    patchattn.patch_model(model, "flap", kept_channels={"model.layers.0.self_attn": "ff000000"}, compensate=False)
    assert model.model.layers[0].mlp.down_proj.weight.shape == (32, 8)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (8, 32)


# --- the command


def command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["calibrate", "flap", *map(str, arguments)])
    return int(ended.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize("amp", [True, False])
def test_the_command_writes_what_the_function_returns(
    amp: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FAMILIES["llama"].make().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text('{"text": "a b c d e f g h"}\n{"text": "i j k"}\n')
    arguments = [tmp_path / "model", "--data", tmp_path / "a.jsonl", "--output", tmp_path / "b", "--batch-size", 1]
    code, out, _ = command(capsys, *arguments, *(["--amp"] if amp else []), "--device", "cpu")
    assert code == 0
    assert "4 projections of model, llama of 2 layers with 4 heads" in out
    found = FlapStatistics.load(tmp_path / "b")
    batches = make_batches(tokenizer(), [TextExample("a b c d e f g h"), TextExample("i j k")], "causal")
    expected = flap_statistics(FAMILIES["llama"].make(), batches, amp=amp)
    assert found.base.name == "model"
    assert list(found.head_norms) == list(expected.head_norms)
    for path, known in expected.channels.items():
        assert found.channels[path].tokens == known.tokens
        np.testing.assert_allclose(found.channels[path].variance, known.variance, rtol=1e-4, atol=1e-9)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    patchattn.patch_model(model, "flap", statistics=tmp_path / "b", sparsity=0.2)


def test_the_command_needs_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = command(capsys, "nowhere")
    assert code == 2
    assert "flap needs --data" in err
