"""A patched model on the Hub, with custom code, and in a fresh process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import patchattn
from patchattn.saving import checkpoint

from .families import FAMILIES
from .saving import base, equal, patch, run


def test_a_patch_from_the_hub(saved, monkeypatch):
    folder, expected = saved
    asked = []
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda name, **kwargs: asked.append((name, kwargs)) or folder)
    model = patchattn.load_patch(base(), "someone/patch", revision="v1", token="secret")
    assert equal(run(model), expected)
    [(name, kwargs)] = asked
    assert (name, kwargs["revision"], kwargs["token"]) == ("someone/patch", "v1", "secret")
    assert set(kwargs["allow_patterns"]) >= {"patchattn_config.json", "patchattn_model.safetensors"}


def test_a_place_that_is_not_there(monkeypatch):
    def offline(name, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(checkpoint, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"'someone/patch' is neither a folder nor a Hub repository .* no network"):
        patchattn.from_pretrained("someone/patch")


@pytest.fixture
def hub_calls(monkeypatch, tmp_path):
    """HfApi that keeps what is uploaded in `tmp_path / "hub"`."""
    calls = {}

    class Repository:
        repo_id = "someone/model"

    def create_repo(self, repo_id, **kwargs):
        calls["create"] = (repo_id, self.token, kwargs)
        return Repository()

    def upload_folder(self, *, folder_path, **kwargs):
        calls["upload"] = kwargs
        shutil.copytree(folder_path, tmp_path / "hub")
        return "https://huggingface.co/someone/model/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


class Tokenizer:
    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_push_to_hub_uploads_a_whole_folder(hub_calls, tmp_path):
    model = patch(base())
    model.config._name_or_path = "someone/base"
    address = patchattn.push_to_hub(
        model, "model", private=True, token="secret", commit_message="done", tokenizer=Tokenizer()
    )
    assert address.endswith("/commit/1")
    assert hub_calls["create"] == ("model", "secret", {"private": True, "exist_ok": True})
    assert hub_calls["upload"] == {"repo_id": "someone/model", "commit_message": "done"}
    files = set(os.listdir(tmp_path / "hub"))
    assert files >= {"README.md", "config.json", "model.safetensors", "patchattn_config.json", "tokenizer.json"}
    assert "modeling_patchattn.py" not in files
    assert equal(run(patchattn.from_pretrained(tmp_path / "hub")), run(model))
    assert equal(run(patchattn.load_patch(base(), tmp_path / "hub")), run(model))
    card = ModelCard.load(tmp_path / "hub/README.md")
    assert card.data.library_name == "patchattn"
    assert card.data.base_model == "someone/base"
    assert {"patchattn", "moh", "ssa"} <= set(card.data.tags)
    for text in ("arXiv:2410.11842", "arXiv:2411.12892", "| `active_ratio` | `0.5` |", "patchattn.from_pretrained("):
        assert text in card.text


def test_the_card_names_no_local_folder(tmp_path):
    model = patch(base())
    model.config._name_or_path = str(tmp_path)
    patchattn.save_pretrained(model, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model is None
    assert str(tmp_path) not in card.content


def test_push_to_hub_sends_nothing_of_an_unpatched_model_or_without_its_report(hub_calls, tmp_path):
    with pytest.raises(ValueError, match="not patched"):
        patchattn.push_to_hub(base(), "model")
    with pytest.raises(ValueError, match="There is no report"):
        patchattn.push_to_hub(patch(base()), "model", report=tmp_path)
    assert hub_calls == {}


# --- custom code, and a fresh process


def test_the_custom_code_entry(tmp_path):
    patchattn.save_pretrained(patch(base("bert")), tmp_path, custom_code=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForMaskedLM": "modeling_patchattn.BertForMaskedLM"}
    code = (tmp_path / "modeling_patchattn.py").read_text()
    assert 'BertForMaskedLM = patched_class("BertForMaskedLM")' in code
    model = patch(base("t5").encoder)
    with pytest.raises(ValueError, match="No Auto class of transformers stands for T5Stack"):
        patchattn.save_pretrained(model, tmp_path / "stack", custom_code=True)
    assert not (tmp_path / "stack").exists()


FRESH = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
tokens = load_file(folder + "/inputs.safetensors")
plain = AutoModelForCausalLM.from_pretrained(folder + "/whole")
if "patchattn" in sys.modules:
    raise SystemExit("plain loading imported patchattn")
models = {
    "plain": plain,
    "custom": AutoModelForCausalLM.from_pretrained(folder + "/whole", trust_remote_code=True),
    "plain after": AutoModelForCausalLM.from_pretrained(folder + "/base"),
}
import patchattn

models["whole"] = patchattn.from_pretrained(folder + "/whole")
models["patch"] = patchattn.from_pretrained(folder + "/patch")
with torch.no_grad():
    results = {name: model(**tokens).logits for name, model in models.items()}
save_file(results, folder + "/outputs.safetensors")
print(type(models["custom"]).__module__, patchattn.patch_info(models["custom"])["patches"][1]["variant"])
"""


def test_a_fresh_process_computes_the_same(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    unpatched = run(model)[0]
    patch(model)
    patchattn.save_pretrained(model, tmp_path / "whole", custom_code=True)
    patchattn.save_patch(model, tmp_path / "patch")
    save_file(FAMILIES["llama"].inputs(), tmp_path / "inputs.safetensors")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-2:] == ["transformers.models.llama.modeling_llama", "moh"]
    results = load_file(tmp_path / "outputs.safetensors")
    patched = run(model)[0]
    assert not equal([patched], [unpatched])
    for name in ("custom", "whole", "patch"):
        assert equal([results[name]], [patched]), name
    for name in ("plain", "plain after"):
        assert equal([results[name]], [unpatched]), name
