"""Patched models inside sentence-transformers: saved by that library, loaded with their patch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

import patchattn

library = pytest.importorskip("sentence_transformers")

TEXTS = ["a b c", "d d", "c a"]
VARIANTS: dict[str, dict[str, Any]] = {
    "moh": {"active_ratio": 0.5, "router": "learned"},
    "logn": {"train_length": 2},
    "prune": {"heads": {0: [0, 1], 1: [3]}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "a", "b", "c", "d"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 6, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 40}
    model = tf.BertModel(tf.BertConfig(num_hidden_layers=2, num_attention_heads=4, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_loaded_with_its_patch(variant: str, part: bool, base: Path, tmp_path: Path) -> None:
    model = library.SentenceTransformer(str(base), device="cpu")
    plain = model.encode(TEXTS)
    inner = next(module for module in model.modules() if isinstance(module, tf.PreTrainedModel))
    patchattn.patch_model(inner if part else model, variant, VARIANTS[variant])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".patchattn." in name:
                parameter.normal_()
    expected = model.encode(TEXTS)
    assert np.abs(expected - plain).max() > 1e-4
    model.save(str(tmp_path / "saved"))
    again = patchattn.load_sentence_transformer(tmp_path / "saved", device="cpu")
    assert type(again) is type(model)
    np.testing.assert_allclose(again.encode(TEXTS), expected, atol=1e-6)
    assert patchattn.patch_info(again)["patches"] == patchattn.patch_info(model)["patches"]
    again.save(str(tmp_path / "again"))
    third = patchattn.load_sentence_transformer(tmp_path / "again", device="cpu")
    np.testing.assert_allclose(third.encode(TEXTS), expected, atol=1e-6)


def test_its_folders_and_settings(base: Path, tmp_path: Path) -> None:
    """A module in a folder of its own, as older releases wrote it, and settings for the inner model."""
    model = patchattn.patch_model(library.SentenceTransformer(str(base), device="cpu"), "prune", VARIANTS["prune"])
    expected = model.encode(TEXTS)
    model.save(str(tmp_path))
    (tmp_path / "0_Transformer").mkdir()
    apart = {"modules.json", "config_sentence_transformers.json", "README.md"}
    for path in tmp_path.iterdir():
        if path.is_file() and path.name not in apart:
            path.rename(tmp_path / "0_Transformer" / path.name)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    settings = {"dtype": torch.float64, "attn_implementation": "eager"}
    again = patchattn.load_sentence_transformer(tmp_path, device="cpu", model_kwargs=settings)
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    assert patchattn.patch_info(again)["base_implementations"] == ["eager"]
    np.testing.assert_allclose(again.encode(TEXTS), expected, atol=1e-5)


def test_a_cross_encoder(base: Path, tmp_path: Path) -> None:
    tf.BertForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path / "base")
    tf.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    model = library.CrossEncoder(str(tmp_path / "base"), device="cpu")
    pairs = [("a b", "c"), ("d", "a a")]
    patchattn.patch_model(model, "prune", VARIANTS["prune"])
    expected = model.predict(pairs)
    model.save_pretrained(str(tmp_path / "saved"))
    again = patchattn.load_sentence_transformer(tmp_path / "saved", library.CrossEncoder, device="cpu")
    np.testing.assert_allclose(again.predict(pairs), expected, atol=1e-6)


def test_other_folders_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no patched model that sentence-transformers saved"):
        patchattn.load_sentence_transformer(base)
    library.SentenceTransformer(str(base), device="cpu").save(str(tmp_path))
    with pytest.raises(ValueError, match="holds no patched model"):
        patchattn.load_sentence_transformer(tmp_path)
    (tmp_path / "modules.json").write_text('[{"name": 3}]')
    with pytest.raises(ValueError, match=r"modules\.json: expected a list of modules"):
        patchattn.load_sentence_transformer(tmp_path)
