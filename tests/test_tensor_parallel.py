"""Tensor parallelism on two CPU processes: transformers shares out a model's heads, and variants follow."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import patchattn
from patchattn.core.sites import HeadShard
from patchattn.core.variant import Variant
from patchattn.training import balance_loss

from .behaviour import Case
from .families import FAMILIES
from .tensor_parallel import EXACT, MAKE, all_cases, answers, compared, run_in_two, shared, written

# What needs more of other heads than a process has; every other variant that a Llama takes must be equal.
REFUSED = {
    "adakv": "heads of a layer share a budget",
    "attention_transition": "tokens are chosen by all heads",
    "differential": "a head reads another kv head",
    "dma": "scores are of the values of all heads",
    "flap": "surgery",
    "gqa_convert": "surgery",
    "hyper": "numbers are drawn for each head",
    "longlora": "which heads are shifted is told by their number",
    "mta": "heads are mixed",
    "nosa": "scores are of the values of all heads",
    "prune": "surgery",
    "squeezed": "clusters are those of all kv heads",
    "subsampled": "keys are drawn anew in every call",
    "talking_heads": "heads are mixed",
}
# Of these some settings are.
SOME = {"dex": "heads", "ssa": "features", "recycled": "similarity"}
QUICK = (
    "logn",
    "ssmax",
    "fox",
    "act",
    "heads",
    "snapkv",
    "knorm",
    "duo",
    "quest",
    "mswa",
    "decore",
    "moh",
    "tova",
    "mta",
)
PATCHES = ["ssa", "ssmax", "moh", "fox"]
OWN = [  # for four kv heads, of which each process has two
    Case("knorm", (("budget", [5, [4, 7, 2, 3]]),)),
    Case("duo", (("gates", [[0.9, 0.1, 0.8, 0.2], [0.3, 0.2, 0.1, 0.9]]), ("sinks", 1), ("recent", 3), ("slack", 3))),
    Case("heads", (("gain", 0.5), ("heads", [[0, 5], [1, 2]]), ("vectors", None))),
    Case("act", (("sink_rule", "fixed"), ("threshold", 0.03), ("heads", [[0, 6], [0, 7], [1, 1]]))),
]


def check(found: dict[str, str], case: Case) -> None:
    """AssertionError unless a case is as one process computes it, or refused by name and said above to be."""
    if case.variant in REFUSED or dict(case.settings).get(SOME.get(case.variant, "")) is not None:
        assert "does not support tensor parallelism" in found[str(case)], (str(case), found[str(case)])
        assert f"'{case.variant}'" in found[str(case)]
    else:
        assert found[str(case)] == "equal", (str(case), found[str(case)])


def quick(folder: Path) -> dict[str, Any]:
    chosen = [case for case in all_cases() if case.variant in QUICK and case.example == 0]
    return {
        "llama": compared(folder, "llama", chosen),
        "wide": compared(folder, "wide", [*OWN, *(case for case in chosen if case.variant in ("ssmax", "fox"))]),
        "lora": with_lora(folder),
        "norms": trained(folder, ["moh"], {}),
        "trained": trained(folder, PATCHES, {"moh": {"router": "learned", "shared_ratio": 0.25}}),
        "alone": in_one_alone(folder),
        "closed": closed_in_one(folder),
    }


def trained(folder: Path, patches: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Three steps of training of everything, patched anew in each process, saved, and loaded again."""
    tokens, path = FAMILIES["llama"].inputs()["input_ids"], written(folder, "llama")
    model, alone = shared(path), MAKE["llama"]().double()
    torch.manual_seed(5 + dist.get_rank())  # what processes draw differs
    for each in (model, alone):
        patchattn.patch_model(each, patches, settings if len(patches) > 1 else None).train()
    begun = {name: whole(tensor) for name, tensor in model.state_dict().items() if name.endswith(("weight", "bias"))}
    alone.load_state_dict(begun, strict=False)
    for each in (model, alone):
        train(each, tokens, 0.5)
    expected = dict(alone.named_parameters())
    steps = {name: float((expected[name] - begun[name]).abs().max()) for name in begun if name in expected}
    apart = {name: float((whole(p) - expected[name]).abs().max()) for name, p in model.named_parameters()}
    patchattn.save_patch(model, folder / "patch")
    patchattn.save_pretrained(model, folder / "whole")
    again = patchattn.from_pretrained(folder / "whole", tp_plan="auto", dtype=torch.float64).eval()
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    texts = [each.eval().generate(tokens, **asked).tolist() for each in (model, alone, again)]
    refused = {}
    for name, tried in {
        "probed": lambda: patchattn.probed(model, print),
        "observed": lambda: patchattn.observe(model, print).__enter__(),
        "pushed": lambda: patchattn.push_to_hub(model, "nobody/nothing"),
    }.items():
        with pytest.raises((NotImplementedError, ValueError)) as error:
            tried()
        refused[name] = str(error.value)
    patchattn.unpatch_model(again)
    left = [name for name in again.state_dict() if "patchattn" in name]
    return {"apart": apart, "steps": steps, "texts": texts, "refused": refused, "left": left}


def with_lora(folder: Path) -> dict[str, Any] | None:
    """Three steps of LoRA and of the variant's own parameters, saved for one process."""
    tokens, path = FAMILIES["llama"].inputs()["input_ids"], written(folder, "llama")
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["patchattn"]}
    models: list[Any] = [shared(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)]
    models = [get_peft_model(patchattn.patch_model(model, "ssmax"), LoraConfig(**lora)) for model in models]
    begun = {name: whole(p) for name, p in models[0].named_parameters()}
    if any(p.shape != begun[name].shape for name, p in models[1].named_parameters()):
        return None  # PEFT 0.19 holds a part of LoRA's weights that nobody puts together
    models[1].load_state_dict(begun, strict=False)
    for model in models:
        train(model, tokens)
    expected = dict(models[1].named_parameters())
    patchattn.save_pretrained(models[0], folder / "lora")
    return {
        "apart": {name: float((whole(p) - expected[name]).abs().max()) for name, p in models[0].named_parameters()},
        "steps": {name: float((p - begun[name]).abs().max()) for name, p in expected.items() if p.requires_grad},
        "logits": models[1](tokens).logits.tolist(),
    }


def in_one_alone(folder: Path) -> dict[str, Any]:
    """What every process is told where one alone fails, or comes with something else; and what it leaves behind."""
    rank, model = dist.get_rank(), shared(written(folder, "llama"))
    before = answers(model)
    patchattn.save_patch(patchattn.patch_model(model, "ssmax"), folder / "whole patch")
    (folder / "file").touch()
    tries = {
        "on a file": lambda: patchattn.save_patch(model, folder / "file"),
        "whole on a file": lambda: patchattn.save_pretrained(model, folder / "file"),
        "another layer": lambda: patchattn.patch_model(model, "logn", layers=[0, 9][rank]),
        "another setting": lambda: patchattn.patch_model(model, "logn", train_length=4 + rank),
        "a wrong setting": lambda: patchattn.patch_model(model, "logn", train_length="long" if rank else 4),
        "no folder": lambda: patchattn.load_patch(model, folder / ["whole patch", "nowhere"][rank]),
        "not made": lambda: broken(patchattn.patch_model, model, "logn", in_process=1),
    }
    found = {}
    for name, tried in tries.items():
        if name == "no folder":
            patchattn.unpatch_model(model)
        with pytest.raises((ValueError, TypeError, RuntimeError, ZeroDivisionError)) as error:
            tried()
        told: list[Any] = [None, None]
        dist.all_gather_object(told, f"{type(error.value).__name__}: {error.value}")
        found[name] = told
    assert not patchattn.patch_info(model)["patches"]
    assert all(map(torch.equal, answers(model), before))
    return found


def broken(function: Any, *given: Any, in_process: int) -> Any:
    """A call in which no variant can be made in one process."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == in_process:
            patch.setattr(Variant, "__init__", lambda *_: 1 / 0)
        return function(*given)


def closed_in_one(folder: Path) -> dict[str, float]:
    """Gradients under nsa whose gates do not learn, and are zero for the heads of the first process alone."""
    tokens, path = FAMILIES["llama"].inputs()["input_ids"], written(folder, "llama")
    sizes = {"block": 1, "top_k": 3, "local": 1, "length": 1, "stride": 1, "window": 2, "compression": "mlp"}
    alone = patchattn.patch_model(MAKE["llama"]().double(), "nsa", **sizes)
    torch.manual_seed(0)
    for name, parameter in alone.named_parameters():
        if ".patchattn." in name:
            torch.nn.init.normal_(parameter.data[2:] if name.endswith("_gate") else parameter, std=0.1)
    if dist.get_rank() == 0:
        patchattn.save_patch(alone, folder / "closed")
    dist.barrier()
    model = patchattn.load_patch(shared(path), folder / "closed")
    for each in (model, alone):
        each.train()
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(not name.endswith("_gate"))
        each(tokens).logits.pow(2).mean().backward()
    expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    return {
        name: float((whole(p.grad) - expected[name]).abs().max())
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def train(model: Any, tokens: torch.Tensor, router_weight: float | None = None) -> None:
    """Three steps on everything that is to be trained."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        with nullcontext() if router_weight is None else balance_loss(model, router_weight) as balance:
            loss = model(tokens).logits.pow(2).mean()
        (loss if balance is None else loss + balance()).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()).clone()


def test_some_variants_compute_train_and_save_as_in_one_process(tmp_path: Path) -> None:
    """One start of two processes for all."""
    found = run_in_two(quick, tmp_path)
    for case in [case for case in all_cases() if case.variant in QUICK and case.example == 0]:
        check(found["llama"], case)
    for case in OWN:
        assert found["wide"][str(case)] == "equal"
    assert all(part["unpatched"] == "equal" for part in (found["llama"], found["wide"]))
    for trained in (found["norms"], found["trained"]):
        assert max(trained["apart"].values()) < EXACT
        assert min(trained["steps"].values()) > 1e-6  # which is to say something of the line before
        assert trained["texts"][0] == trained["texts"][1] == trained["texts"][2]
        assert not trained["left"]
    assert "To look at calls of attention" in trained["refused"]["probed"]
    assert "To look at what variants report" in trained["refused"]["observed"]
    assert "upload the folder" in trained["refused"]["pushed"]
    for name, (first, second) in found["alone"].items():
        kind = {"a wrong setting": "TypeError", "not made": ""}.get(name, "ValueError")
        assert first.startswith(kind or "RuntimeError"), (name, first)
        assert second.startswith(kind or "ZeroDivisionError"), (name, second)
        if name == "another setting":
            assert "must all do the same" in first
            assert first == second
        else:
            assert "Process " in (second if name.endswith("file") else first)
    assert max(found["closed"].values()) < EXACT
    assert any(name.endswith("values_out") for name in found["closed"])
    tokens = FAMILIES["llama"].inputs()["input_ids"]
    if (lora := found["lora"]) is not None:
        assert max(lora["apart"].values()) < EXACT
        assert min(lora["steps"].values()) > 1e-7
        adapted = patchattn.from_pretrained(tmp_path / "lora", dtype=torch.float64)
        torch.testing.assert_close(adapted(tokens).logits, torch.tensor(lora["logits"]).double(), rtol=0, atol=1e-6)
    loaded = [patchattn.from_pretrained(tmp_path / "whole", dtype=torch.float64).eval()]
    loaded.append(patchattn.load_patch(patchattn.unpatch_model(loaded[0]), tmp_path / "patch"))
    for model in loaded:
        text = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert text.tolist() == trained["texts"][1]


def everything(folder: Path) -> dict[str, Any]:
    return {name: compared(folder, name, all_cases()) for name in MAKE}


@pytest.mark.slow
def test_every_variant_is_as_in_one_process_or_refused_by_name(tmp_path: Path) -> None:
    found = run_in_two(everything, tmp_path)
    for case in all_cases():
        check(found["llama"], case)
        if "not for this model" not in found["wide"][str(case)]:
            check(found["wide"], case)


def test_heads_are_numbered_in_the_part_that_has_them() -> None:
    shard = HeadShard(rank=1, ranks=3, query_heads=12, kv_heads=6)
    assert shard.own([0, 4, 7, 8, 11]) == (0, 3)
    assert shard.own([0, 2, 3, 5], kv=True) == (0, 1)
