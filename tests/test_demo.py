"""The demo, a few steps of it: everything runs, is reported, and is undone."""

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

import patchattn
from patchattn.demo import make_task, measuring, run_demo
from patchattn.demo.tasks import RecallTask
from patchattn.demo.training import add_lora, fit, lora_targets
from patchattn.training import optimizer_groups

NAMES = ["LoRA alone", "MoH 75 % + LoRA", "SSA + LoRA"]
SENTENCES = ["a good film\t1", 'a "bad film\t0', "good\t1", "bad film , bad\t0"]


def check_report(report, folder, seeds):
    """What must hold of every report, whatever was learnt."""
    written = json.loads((folder / "results.json").read_text())
    assert written["seeds"] == seeds
    assert torch.__version__.startswith(written["versions"]["torch"])  # which has no "+cu132" of some builds
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows)[-3:] == NAMES
    for name in NAMES:
        assert len(rows[name]["accuracy"]) == len(seeds)
        assert rows[name]["restored"] is True
        assert rows[name]["tokens_per_second"] > 0
        assert rows[name]["lora_parameters"] == rows["LoRA alone"]["lora_parameters"] > 0
    assert rows["MoH 75 % + LoRA"]["active_heads"] == pytest.approx(0.75)
    assert rows["LoRA alone"]["active_heads"] == rows["SSA + LoRA"]["active_heads"] == 1
    assert rows["SSA + LoRA"]["variant_parameters"] > rows["MoH 75 % + LoRA"]["variant_parameters"] == 0
    table = (folder / "table.md").read_text().splitlines()
    assert len(table) == 2 + len(report.rows)
    assert all(line.count("|") == table[0].count("|") for line in table)
    assert (folder / "head_usage.png").read_bytes().startswith(b"\x89PNG")


def test_demo_of_its_own_task(tmp_path):
    report = run_demo(make_task(quick=True), [0], tmp_path / "new" / "folder")
    assert [row.name for row in report.rows] == ["base model", *NAMES]
    check_report(report, tmp_path / "new" / "folder", [0])


def test_demo_of_an_encoder_and_two_seeds(tmp_path):
    model, data = tmp_path / "bert", tmp_path / "data"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film"]
    model.mkdir()
    (model / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab_file=str(model / "vocab.txt")).save_pretrained(model)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=len(vocabulary)
    )
    BertForSequenceClassification(config).save_pretrained(model)
    data.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (data / name).write_text("\n".join(["sentence\tlabel", *SENTENCES]) + "\n")
    report = run_demo(make_task(model=str(model), data=data, quick=True), [3, 4], tmp_path / "out")
    check_report(report, tmp_path / "out", [3, 4])
    assert "±" in (tmp_path / "out" / "table.md").read_text()


def test_the_same_seed_gives_the_same_batches_and_answers_are_hidden():
    task = RecallTask()
    first, again, other = (next(task.train_batches(seed, 1))["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    batch = task.test_batches()[0]
    told = batch["input_ids"][:, : 2 * task.pairs].unflatten(1, (-1, 2)).tolist()
    asked = batch["input_ids"][:, 2 * task.pairs :].unflatten(1, (-1, 2)).tolist()
    for pairs, questions in zip(told, asked, strict=True):
        assert dict(pairs) == dict(questions)
    assert (batch["labels"] != -100).sum(-1).eq(task.pairs).all()


def test_score_counts_answers_only():
    task = RecallTask()
    batch = task.test_batches()[0]
    logits = torch.nn.functional.one_hot(batch["input_ids"].roll(-1, 1), task.keys + task.values).float()
    assert task.score(logits, batch["labels"]) == (task.batch_size * task.pairs,) * 2
    assert task.score(-logits, batch["labels"])[0] == 0


def test_usage_of_heads_leaves_padding_out():
    model = RecallTask(quick=True).new_model(0).eval()
    patchattn.patch_model(model, "moh", active_ratio=0.75)
    ids = torch.randint(0, 32, (2, 9))
    alone = measuring.head_usage(model, [{"input_ids": ids}])
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 5))
    padded = {"input_ids": torch.nn.functional.pad(ids, (0, 5)), "attention_mask": mask}
    assert measuring.head_usage(model, [padded]) == alone
    for layer in alone:
        assert layer[:4] == [1.0] * 4
        assert sum(layer) == pytest.approx(6)


def test_only_lora_variant_and_head_are_trained_and_scalars_have_their_own_rate():
    task = RecallTask(quick=True)
    model = task.new_model(0)
    patchattn.patch_model(model, "ssa")
    lora = add_lora(model, task, seed=0, is_patched=True)
    groups = optimizer_groups(lora, 1e-3, scale_learning_rate=0.5)
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 0.5]
    assert {p.numel() for p in groups[-1]["params"]} == {1}
    before = {name: p.detach().clone() for name, p in lora.named_parameters()}
    fit(lora, task.train_batches(0, 2), 2, groups, lambda loss: None)
    moved = {name for name, p in lora.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    assert any("alpha" in name for name in moved)
    assert any("token" in name for name in moved)


def test_lora_goes_to_fused_projections_too():
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=8))
    assert lora_targets(model) == ["h.0.attn.c_attn", "h.1.attn.c_attn"]
