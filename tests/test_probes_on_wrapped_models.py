"""Probes on models that are compiled, offloaded, wrapped, copied or saved, and on other base implementations."""

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn

import patchattn
from patchattn.core import context
from patchattn.core.host import host

from .families import FAMILIES, outputs, shortened
from .test_probes import causal_attention, state

IDS = FAMILIES["llama"].inputs()["input_ids"]
LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
PATCHES = [None, "ssa", "moh"]


def made(patch: str | None, **how: Any) -> nn.Module:
    model = FAMILIES["llama"].make(**how)
    return model if patch is None else patchattn.patch_model(model, patch)


def run(model: Any) -> torch.Tensor:
    return outputs(model, input_ids=IDS)[0]


def noting(model: nn.Module, seen: list[str], **how: Any) -> patchattn.PlacedProbe:
    return patchattn.probed(model, lambda call, output: seen.append(call.site.name), **how)


@pytest.mark.parametrize(
    ("patch", "at", "backend"),
    [(None, "model", "eager"), pytest.param("ssa", "base", "aot_eager", marks=pytest.mark.slow)],
)
def test_compiled_code_follows_probes(patch: str | None, at: str, backend: str) -> None:
    torch.compiler.reset()
    model = shortened(made(patch))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    plain = run(compiled)
    for _ in range(2):  # another list each time, which the code of the first probe must not write to
        seen: list[tuple[str, torch.Tensor]] = []
        with patchattn.probed(model, lambda call, output, to=seen: to.append((call.site.name, output)), at=at):
            torch.testing.assert_close(run(compiled), plain)
            run(compiled)
        assert [name for name, _ in seen] == LAYERS[:1] * 2
        wanted: list[torch.Tensor] = []
        with patchattn.probed(model, lambda call, output, to=wanted: to.append(output), at=at):
            run(model)
        for (_, output), expected in zip(seen[:1], wanted, strict=True):
            torch.testing.assert_close(output, expected)
        run(compiled)
        assert len(seen) == 2


@pytest.mark.slow
def test_what_a_compiled_probe_raises_arrives() -> None:
    torch.compiler.reset()
    model = made("act", implementation="sdpa").bfloat16()
    compiled = torch.compile(model, backend="aot_eager")
    with noting(model, [], at="base"), pytest.raises(NotImplementedError, match="'act' computed a call"):
        run(compiled)


@pytest.mark.parametrize("at", ["model", "base"])
def test_flex_attention(at: str) -> None:
    model = FAMILIES["llama"].make(implementation="flex_attention")
    plain, seen = run(model), []
    with patchattn.probed(model, lambda *call: seen.append(call), at=at):
        assert torch.equal(run(model), plain)
    assert [call.site.name for call, _ in seen] == LAYERS
    for call, output in seen:
        wanted = causal_attention(call.query.double(), call.key.double(), call.value.double())
        torch.testing.assert_close(output.double(), wanted, atol=1e-6, rtol=1e-5)


def test_another_implementation_set_meanwhile() -> None:
    model, bases = FAMILIES["llama"].make(implementation="sdpa"), []
    before = state(model)
    with patchattn.probed(model, lambda call, output: bases.append(call.base)):
        run(model)
        model.set_attn_implementation("eager")
        run(model)
    assert bases == ["sdpa"] * 2 + ["eager"] * 2
    assert state(model) == before
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"


@pytest.mark.parametrize("patch", PATCHES)
def test_offloaded_models(patch: str | None) -> None:
    inputs, found = FAMILIES["qwen3"].inputs(), []
    model = FAMILIES["qwen3"].make()
    if patch is not None:
        patchattn.patch_model(model, patch)
    plain = outputs(model, **inputs)[0]

    def see(call: Any, output: torch.Tensor) -> None:
        found[-1] += [call.query, output, call.context.layer_input(), call.context.raw_query()]

    for offload in (False, True):
        if offload:
            cpu_offload(model, execution_device=torch.device("cpu"))
            assert all(parameter.is_meta for parameter in model.model.layers.parameters())
        before = state(model)
        found.append([])
        with patchattn.probed(model, see):
            assert torch.equal(outputs(model, **inputs)[0], plain)
        assert state(model) == before
    assert len(found[0]) == 8
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_the_adapter_that_computes_is_seen_whenever_it_was_added() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["patchattn"])
    model: Any = made("ssa")
    seen: list[str] = []
    with noting(model, seen):
        model = get_peft_model(model, lora)
        plain = run(model)
        model.add_adapter("second", lora)
        model.set_adapter("second")
        for parameter in model.model.model.layers[0].self_attn.patchattn.modules_to_save["second"].parameters():
            parameter.data += 0.5
        assert not torch.equal(run(model), plain)
        with model.disable_adapter():
            run(model)
    assert seen == LAYERS * 3
    run(model)
    with noting(model, seen):
        run(model)
    assert seen == LAYERS * 4
    patchattn.unpatch_model(model)


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_models_that_nothing_looks_at(copied: Any, patch: str | None) -> None:
    model = made(patch)
    plain, seen = run(model), []
    attributes = set(vars(model.model.layers[0].self_attn))
    with noting(model, seen):
        other: Any = copied(model)
    assert torch.equal(run(model), plain)
    del model
    gc.collect()
    host().release()  # the copy alone holds the names that it needs
    assert torch.equal(run(other), plain)
    assert not seen
    with noting(other, seen):
        assert torch.equal(run(other), plain)
    assert seen == LAYERS
    assert set(vars(other.model.layers[0].self_attn)) == attributes


def test_a_copy_of_a_probed_model_is_patched_and_unpatched() -> None:
    model = made(None)
    attributes = set(vars(model.model.layers[0].self_attn))
    with noting(model, []):
        other = copy.deepcopy(model)
    patchattn.patch_model(other, "ssa")
    assert not torch.equal(run(other), run(model))
    patchattn.unpatch_model(other)
    assert torch.equal(run(other), run(model))
    assert set(vars(other.model.layers[0].self_attn)) == attributes
    assert state(other)[1] == state(model)[1]


def test_a_model_saved_meanwhile_is_an_ordinary_one(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    with noting(model, []):
        model.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path).eval()), run(model))
    assert "patchattn" not in (tmp_path / "config.json").read_text()


def test_generation_shows_every_step() -> None:
    model, rows = FAMILIES["llama"].make(), []
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    plain = model.generate(IDS, **options)
    with patchattn.probed(model, lambda call, output: rows.append(call.query.shape[2]), layers=1):
        assert torch.equal(model.generate(IDS, **options), plain)
    assert rows == [9, 1, 1, 1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("patch", PATCHES)
def test_both_kinds_of_checkpointing_show_calls_again(patch: str | None, reentrant: bool) -> None:
    model: Any = made(patch)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    gradients, seen = [], []
    for looks in (False, True):
        model.zero_grad()
        probe = noting(model, seen) if looks else None
        embeddings = model.get_input_embeddings()(IDS)
        model(inputs_embeds=embeddings, use_cache=False).logits.square().sum().backward()
        if probe is not None:
            probe.close()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))
    assert seen == LAYERS + LAYERS[::-1]


@pytest.mark.parametrize("patch", PATCHES)
def test_a_probe_closes_itself(patch: str | None) -> None:
    model = made(patch)
    plain, before, seen = run(model), state(model), []

    def once(call: Any, output: torch.Tensor) -> None:
        seen.append(call.site.name)
        probe.close()

    probe = patchattn.probed(model, once)
    assert torch.equal(run(model), plain)
    assert seen == LAYERS[:1]
    assert state(model) == before
    assert getattr(context._local, "context", None) is None  # which would keep the layer's tensors


@pytest.mark.parametrize("patch", PATCHES)
def test_probes_close_in_any_order_and_more_than_once(patch: str | None) -> None:
    model = made(patch)
    before, first, second = state(model), [], []
    one, other = noting(model, first), noting(model, second)
    run(model)
    one.close()
    one.close()
    run(model)
    other.close()
    other.close()
    one.close()
    assert (first, second) == (LAYERS, LAYERS * 2)
    assert state(model) == before


@pytest.mark.parametrize("patch", PATCHES)
def test_a_forward_after_one_that_a_probe_ended(patch: str | None) -> None:
    model = made(patch)
    plain, before, seen = run(model), state(model), []

    def fail_once(call: Any, output: torch.Tensor) -> None:
        seen.append(call.site.name)
        if len(seen) == 2:
            raise KeyError("seen")

    with patchattn.probed(model, fail_once):
        with pytest.raises(KeyError, match="seen"):
            run(model)
        assert getattr(context._local, "context", None) is None
        assert torch.equal(run(model), plain)
    assert seen == LAYERS * 2
    assert state(model) == before


def test_patches_stay_as_they_are_under_a_probe() -> None:
    model = made("ssa")
    plain, seen = run(model), []
    with noting(model, seen):
        with pytest.raises(ValueError, match="close it"), patchattn.unpatched(model):
            pass
        with pytest.raises(ValueError, match="close it"):
            patchattn.unpatch_model(model)
        with pytest.raises(ValueError, match="close it"):
            patchattn.patch_model(model, "moh")
        assert torch.equal(run(model), plain)
    assert seen == LAYERS
    with patchattn.unpatched(model), noting(model, seen):
        assert not torch.equal(run(model), plain)
    assert torch.equal(run(model), plain)
    assert seen == LAYERS * 2
