"""Files that would have something unpickled or fetched: refused before anything of it happens."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers.integrations import hub_kernels

import patchattn

from .families import FAMILIES
from .saving import equal, patch, run


@pytest.fixture(autouse=True)
def never_unpickled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was unpickled or fetched, which is to stay empty unless a test asks for it."""
    happened: list[str] = []
    load = torch.load

    def seen(*args: object, **kwargs: object) -> object:
        happened.append("torch.load")
        return load(*args, **kwargs)

    def fetched(name: str, *args: object, **kwargs: object) -> object:
        happened.append(name)
        raise RuntimeError(f"fetched {name}")

    monkeypatch.setattr(torch, "load", seen)
    for module in (hub_kernels, tf.modeling_utils, tf.modeling_flash_attention_utils):
        for function in ("load_and_register_attn_kernel", "lazy_import_flash_attention"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, fetched)
    return happened


def _pickled(folder: Path, name: str, old: str) -> None:
    torch.save(load_file(folder / old), folder / name)
    (folder / old).unlink()


def _base_and_patch(folder: Path) -> tuple[Path, Path]:
    FAMILIES["llama"].make().save_pretrained(folder / "base")
    model = patch(tf.LlamaForCausalLM.from_pretrained(folder / "base"))
    patchattn.save_patch(model, folder / "patch")
    return folder / "base", folder / "patch"


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_pickled_base_model_is_loaded_only_if_asked_for(tmp_path: Path, never_unpickled: list[str]) -> None:
    base, folder = _base_and_patch(tmp_path)
    expected = run(patchattn.from_pretrained(folder))
    _pickled(base, "pytorch_model.bin", "model.safetensors")
    with pytest.raises(ValueError, match=r"no weights as safetensors .*use_safetensors=False"):
        patchattn.from_pretrained(folder)
    assert never_unpickled == []
    assert equal(run(patchattn.from_pretrained(folder, use_safetensors=False)), expected)
    assert never_unpickled == ["torch.load"]


@pytest.mark.parametrize("where", ["patch", "base", "whole"])
def test_a_pickled_adapter_is_refused(where: str, tmp_path: Path, never_unpickled: list[str]) -> None:
    base, folder = _base_and_patch(tmp_path)
    model = patchattn.from_pretrained(folder)
    model.save_pretrained(tmp_path / "whole")
    adapted = get_peft_model(FAMILIES["llama"].make(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    place = tmp_path / where
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", place, dirs_exist_ok=True)
    _edit(place / "adapter_config.json", base_model_name_or_path=str(base))
    source = folder if where == "base" else place
    assert any("lora" in name for name in patchattn.from_pretrained(source).state_dict())
    _pickled(place, "adapter_model.bin", "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors beside .*unpickled"):
        patchattn.from_pretrained(source)
    assert never_unpickled == []


@pytest.mark.parametrize("where", ["base", "whole"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_kernel_named_by_a_file_is_refused(
    where: str, nested: bool, tmp_path: Path, never_unpickled: list[str]
) -> None:
    family = "llava" if nested else "llama"
    FAMILIES[family].make().save_pretrained(tmp_path / "base")
    kind = type(FAMILIES[family].make())
    model = patchattn.patch_model(kind.from_pretrained(tmp_path / "base"), "ssmax")
    patchattn.save_patch(model, tmp_path / "patch")
    model.save_pretrained(tmp_path / "whole")
    config = tmp_path / where / "config.json"
    _edit(config, attn_implementation={"text_config": "someone/kernel"} if nested else "someone/kernel")
    source = tmp_path / ("patch" if where == "base" else "whole")
    with pytest.raises(ValueError, match=r"asks for the kernel 'someone/kernel'.*code from the Hub"):
        patchattn.from_pretrained(source)
    assert never_unpickled == []
    loaded = patchattn.from_pretrained(source, attn_implementation="eager")
    assert equal(run(loaded, family), run(model, family))
    with pytest.raises((RuntimeError, ValueError, ImportError)):  # asked for, and then not there
        patchattn.from_pretrained(source, attn_implementation="someone/kernel")
    assert never_unpickled == ["someone/kernel"]


def test_no_pickle_is_read_even_of_a_patch(tmp_path: Path) -> None:
    _, folder = _base_and_patch(tmp_path)
    (folder / "patchattn_model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"patchattn_model\.safetensors"):
        patchattn.from_pretrained(folder)
