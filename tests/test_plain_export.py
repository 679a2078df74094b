"""Plain checkpoints of patched models: they load where patchattn cannot be imported, are equal, or are refused."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import patchattn
from patchattn.checking.forwards import first_output
from patchattn.cli.main import main
from patchattn.variants.pruning.flap import flap_statistics

from .families import FAMILIES
from .reference import tiny_llama

UNIFORM = {"sparsity": 0.5, "importance": "magnitude", "uniform": True}
# In a process that cannot import patchattn: load every folder by its Auto class, and write what comes out.
ELSEWHERE = """
import json, sys
sys.modules["patchattn"] = sys.modules["patchattn_kernels"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
outputs = {}
for name, (folder, auto, inputs) in json.load(open(sys.argv[1])).items():
    model = getattr(transformers, auto).from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        outputs[name] = model(**load_file(inputs)).logits.contiguous()
save_file(outputs, sys.argv[2])
"""


@dataclass(frozen=True)
class Case:
    """A patched model, and the Auto class that is to load its plain form."""

    make: Callable[[], Any]
    auto: str
    inputs: Callable[[], dict[str, torch.Tensor]]
    max_shard_size: str = "50GB"


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))}


def tied_in_half() -> Any:
    model = tiny_llama(num_hidden_layers=2, tie_word_embeddings=True).to(torch.bfloat16)
    return patchattn.patch_model(model, "gqa_convert", kv_heads=1)


def with_biases() -> Any:
    model = tiny_llama(num_hidden_layers=2)
    statistics = flap_statistics(model, [text()])
    settings = {"statistics": statistics, "sparsity": 0.5, "structure": "ul-um"}
    return patchattn.patch_model(model, "flap", settings)


def encoder() -> Any:
    return patchattn.patch_model(FAMILIES["bert"].make(), "prune", {**UNIFORM, "physical": False})


def encoder_decoder() -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    part = tf.T5GemmaModuleConfig(
        **sizes, num_attention_heads=8, num_key_value_heads=4, head_dim=8, query_pre_attn_scalar=8
    )
    torch.manual_seed(0)
    model = tf.T5GemmaForConditionalGeneration(tf.T5GemmaConfig(encoder=part, decoder=part, vocab_size=64)).eval()
    return patchattn.patch_model(model, "prune", UNIFORM)


def several() -> Any:
    """Surgery, a factor of queries and one of outputs at once."""
    model = tiny_llama(num_hidden_layers=2, num_attention_heads=8)
    patchattn.patch_model(model, ["prune", "ssmax", "gated"], {"prune": UNIFORM, "gated": {"factor": 1.0}})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("ssmax.bias"):
                parameter.copy_(torch.linspace(0.4, 1.8, len(parameter)))
    return model


CASES = {
    "several": Case(several, "AutoModelForCausalLM", text, max_shard_size="20KB"),
    "tied, bfloat16": Case(tied_in_half, "AutoModelForCausalLM", text),
    "biases": Case(with_biases, "AutoModelForCausalLM", text),
    "encoder": Case(encoder, "AutoModelForMaskedLM", FAMILIES["bert"].inputs),
    "vision": Case(
        lambda: patchattn.patch_model(FAMILIES["vit"].make(), "prune", UNIFORM),
        "AutoModelForImageClassification",
        FAMILIES["vit"].inputs,
    ),
    "encoder-decoder": Case(encoder_decoder, "AutoModelForSeq2SeqLM", FAMILIES["t5"].inputs),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path, torch.Tensor, torch.Tensor]]:
    """By case: the patched model, its plain folder, its own outputs, and those of the plain model elsewhere."""
    root = tmp_path_factory.mktemp("plain")
    models, places, expected = {}, {}, {}
    for number, (name, case) in enumerate(CASES.items()):
        folder, inputs = root / str(number), root / f"{number}.safetensors"
        model = case.make()
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        patchattn.export(model, folder, max_shard_size=case.max_shard_size)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), name
        save_file(case.inputs(), inputs)
        expected[name] = first_output(model, case.inputs())
        models[name], places[name] = model, (str(folder), case.auto, str(inputs))
    (root / "places.json").write_text(json.dumps(places))
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(root / "places.json"), str(root / "outputs.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    got = load_file(root / "outputs.safetensors")
    return {name: (models[name], Path(places[name][0]), expected[name], got[name]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_plain_model_is_equal_where_patchattn_cannot_be_imported(name: str, written: Any) -> None:
    model, folder, expected, got = written[name]
    assert got.dtype == expected.dtype == model.dtype
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[got.dtype]
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    for weights in folder.glob("*.safetensors"):
        assert not any("patchattn" in key for key in load_file(weights))
    assert not list(folder.glob("*patchattn*"))


def test_what_a_plain_folder_says_and_holds(written: Any) -> None:
    def config(name: str) -> dict[str, Any]:
        return json.loads((written[name][1] / "config.json").read_text())

    assert {key: config("several")[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")} == {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    assert config("tied, bfloat16")["num_key_value_heads"] == 1
    assert config("biases")["attention_bias"]
    assert config("biases")["mlp_bias"]
    assert config("biases")["intermediate_size"] == 16
    assert config("vision")["num_attention_heads"] == 2
    assert config("vision")["head_dim"] == 8
    assert config("encoder-decoder")["encoder"]["num_attention_heads"] == 4
    assert len(list(written["several"][1].glob("model-*.safetensors"))) > 1
    tied = load_file(written["tied, bfloat16"][1] / "model.safetensors")
    assert "lm_head.weight" not in tied
    assert tied["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert (written["several"][1] / "generation_config.json").is_file()


def test_factors_are_where_the_formulas_put_them(tmp_path: Path) -> None:
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patchattn.patch_model(model, ["heads", "ssmax"], {"heads": {"gain": 0.25, "heads": [[0, 2]]}})
    scales = torch.tensor([0.5, 1.5, 2.0, -1.0], dtype=torch.float64)
    with torch.no_grad():
        model.model.layers[0].self_attn.patchattn.ssmax.bias.copy_(scales)
    patchattn.export(model, tmp_path / "plain")
    got = load_file(tmp_path / "plain" / "model.safetensors")
    attention = "model.layers.0.self_attn"
    query = before[f"{attention}.q_proj.weight"].view(4, 8, -1) * scales[:, None, None]
    output = before[f"{attention}.o_proj.weight"].view(-1, 4, 8) * torch.tensor([1, 1, 0.25, 1.0])[:, None]
    torch.testing.assert_close(got[f"{attention}.q_proj.weight"], query.flatten(0, 1), rtol=1e-12, atol=0)
    torch.testing.assert_close(got[f"{attention}.o_proj.weight"], output.flatten(1), rtol=1e-12, atol=0)
    assert torch.equal(got[f"{attention}.k_proj.weight"], before[f"{attention}.k_proj.weight"])


def test_two_sinks_are_one(tmp_path: Path) -> None:
    model = FAMILIES["gpt_oss"].make().float()
    own = model.model.layers[0].self_attn.sinks.detach().clone()
    patchattn.patch_model(model, "sink", initial_logit=0.75)
    patchattn.export(model, tmp_path / "plain")
    got = load_file(tmp_path / "plain" / "model.safetensors")["model.layers.0.self_attn.sinks"]
    torch.testing.assert_close(got, (own.double().exp() + torch.tensor(0.75).double().exp()).log().float())


def refused() -> Iterator[tuple[str, Callable[[], Any], type[Exception], str]]:
    def llama(variant: Any, settings: Any = None, **extra: Any) -> Callable[[], Any]:
        return lambda: patchattn.patch_model(tiny_llama(num_hidden_layers=2, **extra), variant, settings)

    def moved(change: Callable[[Any], Any]) -> Callable[[], Any]:
        def make() -> Any:
            model = llama("ssmax")()
            return change(model) or model

        return make

    lora = LoraConfig(r=2, target_modules=["q_proj"])
    yield "not patched", tiny_llama, ValueError, "is not patched"
    yield "layers", llama("prune", {"heads": {0: [0, 2]}}), NotImplementedError, "2 query heads on 2.*uniform=True"
    yield "groups", llama("prune", {"heads": {0: [0], 1: [0]}}), NotImplementedError, "kv heads of .* uniform=True"
    yield (
        "validator",
        llama("prune", {"heads": {0: [0], 1: [0]}}, num_key_value_heads=4),
        NotImplementedError,
        "LlamaConfig does not allow these sizes .*hidden size.* physical=False",
    )
    yield (
        "no width of heads",
        lambda: patchattn.patch_model(FAMILIES["gpt2"].make(), "prune", UNIFORM),
        NotImplementedError,
        "No GPT2Config describes .* physical=False",
    )
    yield "ssmax", llama("ssmax", {"initial_scale": 0.1}), NotImplementedError, "'ssmax' on .*number of keys"
    yield "ssa", llama("ssa"), NotImplementedError, "'ssa' on .*temperature is not the same"
    yield "logn", llama("logn", {"train_length": 4}), NotImplementedError, "'logn' .*same up to 4 tokens"
    yield "sink", llama("sink"), NotImplementedError, "LlamaAttention has no sinks of its own"
    yield "moh", llama("moh", {"active_ratio": 0.5}), NotImplementedError, "'moh' .*save_pretrained"
    yield "a cache's", llama("knorm", {"compression_ratio": 0.5}), NotImplementedError, "'knorm' "
    yield "a mask of rows", llama("heads", {"rows": "last"}), NotImplementedError, "some tokens and not others"
    yield (
        "normalised queries",
        lambda: patchattn.patch_model(FAMILIES["qwen3"].make(), "ssmax"),
        NotImplementedError,
        "normalised by q_norm",
    )
    yield "adapter", lambda: get_peft_model(llama("ssmax")(), lora), ValueError, "merge_and_unload"
    yield "meta", moved(lambda model: model.to("meta")), ValueError, "on the meta device"
    yield "offloaded", moved(cpu_offload), ValueError, "offloaded or dispatched"


REFUSED = {name: rest for name, *rest in refused()}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    make, error, says = REFUSED[name]
    with pytest.raises(error, match=f"(?s){says}"):
        patchattn.export(make(), tmp_path / "new" / "plain")
    assert not list(tmp_path.iterdir())


def test_a_wrong_fold_is_found_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tied_in_half()
    kind = patchattn.variant_info("ssmax").variant
    patchattn.patch_model(model, "ssmax")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.patchattn.ssmax.bias.fill_(0.2)
    monkeypatch.setattr(kind, "fold", lambda self, plain: None)
    with pytest.raises(ValueError, match=r"differs from the patched one by .* of the largest output"):
        patchattn.export(model, tmp_path / "plain")
    assert not list(tmp_path.iterdir())


def test_only_an_empty_folder_is_written(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        patchattn.export(tied_in_half(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="must be a folder, got a file"):
        patchattn.export(tied_in_half(), tmp_path / "mine.txt")
    with pytest.raises(TypeError, match="processor must have save_pretrained"):
        patchattn.export(tied_in_half(), tmp_path / "new", processor=3)


def test_inputs_must_reach_what_is_patched(tmp_path: Path) -> None:
    model = patchattn.patch_model(FAMILIES["llava"].make(), "prune", **UNIFORM, physical=False)
    with pytest.raises(ValueError, match=r"was not run through .*vision_tower"):
        patchattn.export(model, tmp_path / "plain", inputs=text()["input_ids"])
    assert not list(tmp_path.iterdir())
    patchattn.export(model, tmp_path / "plain", inputs=FAMILIES["llava"].inputs())
    assert (tmp_path / "plain" / "config.json").is_file()


def test_why_no_guess_at_inputs_fits_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such input")

    monkeypatch.setattr("patchattn.exporting.export.first_output", fails)
    model = patchattn.patch_model(FAMILIES["llama"].make(), "prune", **UNIFORM)
    with pytest.raises(ValueError, match=r"was not run through .*give inputs") as told:
        patchattn.export(model, tmp_path / "plain")
    assert str(told.value.__cause__) == "no such input"


def saved_with_a_tokenizer(folder: Path) -> None:
    tiny_llama(num_hidden_layers=2, num_key_value_heads=4).float().save_pretrained(folder)
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_with_a_tokenizer(tmp_path / "base")
    settings = [f"--set={key}={value}" for key, value in UNIFORM.items()]
    with pytest.raises(SystemExit) as left:
        main(["export", str(tmp_path / "base"), str(tmp_path / "one"), "--variant", "prune", *settings])
    assert not left.value.code, capsys.readouterr().err
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert (plain.config.num_attention_heads, plain.config.num_key_value_heads, plain.config.head_dim) == (2, 2, 8)
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "one")("a")["input_ids"] == [1]
    # A folder that was saved patched, and a patch with an adapter beside it.
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = get_peft_model(
        patchattn.patch_model(base, "gqa_convert", kv_heads=2), LoraConfig(target_modules=["q_proj"])
    )
    with torch.no_grad():
        tuned.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight.normal_(std=0.2)
    patchattn.save_pretrained(tuned, tmp_path / "tuned")
    with pytest.raises(SystemExit) as left:
        main(["export", str(tmp_path / "tuned"), str(tmp_path / "two")])
    assert not left.value.code, capsys.readouterr().err
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert plain.config.num_key_value_heads == 2
    torch.testing.assert_close(first_output(plain, text()), first_output(tuned.eval(), text()), rtol=0, atol=1e-4)
    with pytest.raises(SystemExit) as left:
        main(["export", str(tmp_path / "base"), str(tmp_path / "three")])
    assert left.value.code == 2
    assert "holds no patch" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize("groups", ["heads", "kv"])
def test_uniform_takes_the_lowest_of_every_group(groups: str) -> None:
    """Against ranks worked out by hand: 8 query heads, pairs of which share one of 4 kv heads."""
    torch.manual_seed(3)
    model = tiny_llama(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)
    importance = patchattn.head_importance(model, [], method="magnitude")
    patchattn.patch_model(model, "prune", sparsity=0.5, importance=importance, uniform=True, groups=groups)
    taken = patchattn.patch_info(model)["patches"][0]["config"]["heads"]
    for name, each in importance.scores.items():
        pairs = [each[2 * kv : 2 * kv + 2] for kv in range(4)]
        if groups == "heads":
            want = [2 * kv + pair.index(min(pair)) for kv, pair in enumerate(pairs)]
        else:
            low = sorted(range(4), key=lambda kv: sum(pairs[kv]))[:2]
            want = sorted(2 * kv + i for kv in low for i in (0, 1))
        assert taken[name] == want, name
    assert {(site.query_heads, site.kv_heads) for site in patchattn.find_sites(model)} == {
        (4, 4) if groups == "heads" else (4, 2)
    }


def test_uniform_has_bounds() -> None:
    with pytest.raises(ValueError, match="less than a query head of every kv head"):
        patchattn.patch_model(tiny_llama(), "prune", sparsity=0.4, importance="magnitude", uniform=True)
    with pytest.raises(ValueError, match="uniform=True chooses heads by sparsity"):
        patchattn.patch_model(tiny_llama(), "prune", heads={0: [1]}, uniform=True)
