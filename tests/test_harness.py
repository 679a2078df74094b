"""The lm-evaluation-harness's model `patchattn`: against likelihoods computed one row at a time in float64."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import patchattn
from patchattn.cli.main import main

pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness: pip install patchattn[eval]")
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers

from patchattn.evaluation.run.harness import PatchattnLM

WORDS = [f"w{i}" for i in range(60)]
DOCS = [
    {
        "question": " ".join(WORDS[3 + i : 6 + 2 * i]),
        "choices": [WORDS[i], f"{WORDS[2 * i]} {WORDS[i + 1]}"],
        "answer": 0,
    }
    for i in range(5)
]
CHOICE = {
    "task": "tiny_choice",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
WRITE = {
    **{key: CHOICE[key] for key in ("dataset_path", "test_split", "doc_to_text")},
    "task": "tiny_write",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["never"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 3 layers with its tokenizer, tasks, and their data."""
    folder = tmp_path_factory.mktemp("harness")
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder / "model")
    (folder / "tasks").mkdir()
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for task in (CHOICE, WRITE):
        task = {**task, "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}}
        (folder / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(autouse=True)
def surroundings(folder, monkeypatch):
    """A cache of our own; not lm-eval's thousands of tasks, which take 10 s to list, nor its report on the machine."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def evaluate(folder, task="tiny_choice", batch_size=4, **arguments):
    """What lm-eval answered to every request, in the order of the documents, and its results."""
    given = {"pretrained": str(folder / "model"), "device": "cpu", "dtype": "float64", **arguments}
    done = simple_evaluate(
        "patchattn",
        model_args=given,
        tasks=[task],
        batch_size=batch_size,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = sorted(done["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples], done


def ids(text):
    return [4 + WORDS.index(word) for word in text.split()]


def exact(folder):
    """The model in float64."""
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()


@torch.no_grad()
def likelihoods(model):
    """Log-likelihood of every choice, each in a forward of its own."""
    found = []
    for doc in DOCS:
        for choice in doc["choices"]:
            question, answer = ids(doc["question"]), ids(choice)
            logits = model(torch.tensor([[*question, *answer[:-1]]])).logits[0, len(question) - 1 :]
            found.append(float(logits.log_softmax(-1)[range(len(answer)), answer].sum()))
    return found


def answered(responses):
    return [response[0][0] for sample in responses for response in sample]


PATCHES = {
    "moh": ({"variant": "moh", "active_ratio": 0.5}, ["moh"], {"active_ratio": 0.5}, {}),
    "some layers": (
        {"variant": "ssa", "layers": [1, 2], "preset": "released", "initial_alpha": "-2.0"},
        ["ssa"],
        {"preset": "released", "initial_alpha": -2.0},
        {"layers": [1, 2]},
    ),
    "two": (
        {"variant": "ssmax+moh", "active_heads": "2", "ssmax.initial_scale": 0.7, "modules": "layers.0"},
        ["ssmax", "moh"],
        {"ssmax": {"initial_scale": 0.7}, "moh": {"active_heads": 2}},
        {"modules": "layers.0"},
    ),
    # its rows depend on later rows, so that lm-eval's padding on the right would change them
    "looks ahead": (
        {"variant": "act", "alpha": 1.0, "keep_first": "no"},
        ["act"],
        {"alpha": 1.0, "keep_first": False},
        {},
    ),
}


@pytest.mark.parametrize("case", PATCHES)
def test_likelihoods_are_those_of_the_patched_model(folder, case):
    arguments, names, settings, where = PATCHES[case]
    model = exact(folder)
    plain = likelihoods(model)
    wanted = likelihoods(patchattn.patch_model(model, names, settings, **where))
    responses, done = evaluate(folder, **arguments)
    assert answered(responses) == pytest.approx(wanted, rel=1e-6)
    assert max(abs(a - b) for a, b in zip(plain, wanted, strict=True)) > 0.01
    right = [wanted[2 * i] > wanted[2 * i + 1] for i in range(len(DOCS))]
    assert done["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / len(DOCS))
    assert done["config"]["patches"] == patchattn.patch_info(model)["patches"]
    assert done["config"]["patchattn_version"] == patchattn.__version__


def test_without_a_variant_it_is_hf(folder):
    responses, done = evaluate(folder)
    assert answered(responses) == pytest.approx(likelihoods(exact(folder)), rel=1e-6)
    assert done["config"]["patches"] == []


def test_generation_in_a_batch_padded_on_the_left(folder):
    model = patchattn.patch_model(exact(folder), "moh", active_ratio=0.5)
    responses, _ = evaluate(folder, "tiny_write", batch_size=5, variant="moh", active_ratio=0.5)
    for doc, (response,) in zip(DOCS, responses, strict=True):
        prompt = torch.tensor([ids(doc["question"])])
        for _ in range(6):
            prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], dim=-1)
            if prompt[0, -1] == 2:
                break
        new = prompt[0, len(ids(doc["question"])) :].tolist()
        assert ids(response[0]) == [token for token in new if token > 3]


def trained(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".patchattn." in name or "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("how", ["patch", "patch as the model", "model", "adapter"])
def test_what_was_saved_comes_with_its_patch(folder, tmp_path, how):
    model = patchattn.patch_model(exact(folder), "ssa", {"key": True})
    if how == "adapter":
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["patchattn"])
        model = trained(get_peft_model(model, lora))
        model.save_pretrained(tmp_path / "saved")
        patchattn.save_patch(model, tmp_path / "saved")
    else:
        save = patchattn.save_pretrained if how == "model" else patchattn.save_patch
        save(trained(model), tmp_path / "saved")
    wanted = likelihoods(model.eval())
    arguments = {"patch": str(tmp_path / "saved")} if how == "patch" else {"pretrained": str(tmp_path / "saved")}
    if how == "model":
        arguments["tokenizer"] = str(folder / "model")
    responses, done = evaluate(folder, **arguments)
    assert answered(responses) == pytest.approx(wanted, rel=1e-6)
    assert done["config"]["patches"][0]["variant"] == "ssa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "mohh"}, "did you mean 'moh'"),
        ({"variant": "moh", "active_ration": 0.5}, "did you mean 'active_ratio'"),
        ({"variant": "moh", "active_ratio": 2}, "between 0.0 and 1.0, got 2"),
        ({"variant": "moh", "preset": "llama"}, "has no preset 'llama'"),
        ({"variant": "ssa+moh", "ssa.active_ratio": 0.5}, "no argument 'ssa.active_ratio'"),
        ({"variant": "moh+shrp", "router": "learned"}, "write moh.router or shrp.router"),
        ({"active_ratio": 0.5}, "'active_ratio' is a setting of moh: it needs variant=moh"),
        ({"patch": "moh", "active_ratio": 0.5}, "'moh' is a variant: write variant=moh"),
        ({"layers": [0]}, "needs variant=NAME"),
        ({"delta": "somewhere"}, "no argument 'delta'"),
        ({"dtyp": "float32"}, "did you mean 'dtype'"),
        ({"variant": "moh", "patch": "here"}, "not both"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchattnLM(pretrained="no/such/model", **arguments)


def test_a_loaded_model_is_for_hflm(folder):
    with pytest.raises(TypeError, match="HFLM"):
        PatchattnLM(pretrained=exact(folder))


def test_the_command_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    options = {
        "--model": "patchattn",
        "--model_args": f"pretrained={folder / 'model'},variant=moh,active_ratio=0.5,layers=[0,1],dtype=float64",
        "--tasks": "tiny_choice",
        "--include_path": str(folder / "tasks"),
        "--device": "cpu",
        "--output_path": str(tmp_path),
    }
    with pytest.raises(SystemExit) as left:
        main(["lm-eval", *(part for pair in options.items() for part in pair)])
    assert not left.value.code
    assert sys.argv == ["pytest"]
    (results,) = tmp_path.rglob("results_*.json")
    (patch,) = json.loads(results.read_text())["config"]["patches"]
    assert patch["config"]["active_ratio"] == 0.5
    assert patch["sites"] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    with pytest.raises(SystemExit) as left:
        main(
            [
                "lm-eval",
                *(part for pair in options.items() for part in pair),
                "--model_args",
                "pretrained=x,variant=moo",
            ]
        )
    assert left.value.code == 2
    assert "did you mean 'moh'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_work_and_give_the_same(folder, tmp_path):
    arguments = ["lm-eval", "--model", "patchattn", "--tasks", "tiny_choice", "--include_path", str(folder / "tasks")]
    arguments += ["--model_args", f"pretrained={folder / 'model'},variant=moh,active_ratio=0.5,dtype=float64"]
    arguments += ["--device", "cpu", "--output_path", str(tmp_path), "--log_samples"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "patchattn"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *launch, *arguments], check=True, env=environment)
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["doc_id"] for row in rows] == list(range(len(DOCS)))
    wanted = likelihoods(patchattn.patch_model(exact(folder), "moh", active_ratio=0.5))
    got = [float(response[0][0]) for row in rows for response in row["resps"]]
    assert got == pytest.approx(wanted, rel=1e-6)
