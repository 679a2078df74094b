"""Probes: what they see is right, outputs stay what they are, and nothing is left behind."""

import copy
import gc

import pytest
import torch
from transformers import AttentionInterface

import patchattn
from patchattn.core.host import host

from .families import FAMILIES, outputs

SETTINGS = {
    "ssa": {},
    "act": {"alpha": 1.0, "keep_first": False, "heads": [[0, 1], [1, 3]]},
    "moh": {"active_ratio": 0.5},
}


def state(model):
    """All that a probe could leave behind."""
    gc.collect()  # patched models of other tests hold names in the registry
    host().release()
    keys = [sorted(key for key in vars(module) if key != "config") for module in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    configs = [id(vars(module).get("config")) for module in model.modules()]
    names = sorted(AttentionInterface._global_mapping)
    return keys, hooks, configs, list(model.state_dict()), names


def causal_attention(query, key, value):
    """`(B, Tq, H, D)` by loops, of one call without padding or cache."""
    batch, heads, rows, dim = query.shape
    found = torch.zeros(batch, rows, heads, dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h * key.shape[1] // heads
            for t in range(rows):
                logits = torch.stack([query[b, h, t] @ key[b, group, s] / dim**0.5 for s in range(t + 1)])
                found[b, t, h] = logits.softmax(0) @ value[b, group, : t + 1]
    return found


@pytest.mark.parametrize("at", ["model", "base"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5", "whisper", "llava"])
def test_outputs_are_equal_to_the_last_bit_and_nothing_is_left(family, at):
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
    plain, before, seen = outputs(model, **inputs), state(model), []  # LLaVA keeps something of its first forward
    with patchattn.probed(model, lambda call, output: seen.append(call.site.name), at=at):
        keys = list(model.state_dict())
        looked = outputs(model, **inputs)
    assert all(torch.equal(left, right) for left, right in zip(looked, plain, strict=True))
    assert keys == before[3]
    assert {site.name for site in patchattn.find_sites(model)} == set(seen)
    assert state(model) == before
    count = len(seen)
    outputs(model, **inputs)
    assert len(seen) == count


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_unpatched_model_is_seen_as_loops_compute_it(implementation):
    model = FAMILIES["llama"].make(implementation=implementation).double()
    calls, projected = [], []
    name = "model.layers.1.self_attn"
    handle = model.get_submodule(f"{name}.o_proj").register_forward_pre_hook(lambda m, args: projected.append(args[0]))
    with patchattn.probed(model, lambda call, output: calls.append((call, output)), layers=1), torch.no_grad():
        model(FAMILIES["llama"].inputs()["input_ids"])
    handle.remove()
    ((call, output),) = calls
    assert call.site.name == name
    assert call.context.layer_input().shape == (2, 9, 32)
    torch.testing.assert_close(output, causal_attention(call.query, call.key, call.value))
    assert torch.equal(output.flatten(2), projected[0])


@pytest.mark.parametrize("variant", SETTINGS)
def test_outside_of_variants_is_the_model_and_inside_is_the_base(variant):
    model = FAMILIES["llama"].make(implementation="eager").double()
    ids = FAMILIES["llama"].inputs()["input_ids"]
    plain, found, projected = [], {"model": [], "base": []}, []
    with patchattn.probed(model, lambda call, output: plain.append(call), layers=0), torch.no_grad():
        model(ids)
    patchattn.patch_model(model, variant, SETTINGS[variant])
    before, wanted = state(model), model(ids).logits
    projection = model.get_submodule("model.layers.0.self_attn.o_proj")
    handle = projection.register_forward_pre_hook(lambda module, args: projected.append(args[0]))
    with torch.no_grad():
        probes = [patchattn.probed(model, lambda *seen, at=at: found[at].append(seen), layers=0, at=at) for at in found]
        assert torch.equal(model(ids).logits, wanted)
        for probe in probes:
            probe.close()
            probe.close()
    handle.remove()
    assert state(model) == before
    ((outer, whole),), ((inner, attended),) = found["model"], found["base"]
    assert torch.equal(outer.query, plain[0].query)
    assert torch.equal(whole.flatten(2), projected[0])
    torch.testing.assert_close(attended, causal_attention(inner.query, inner.key, inner.value))
    assert not torch.allclose(whole, causal_attention(plain[0].query, plain[0].key, plain[0].value))


def test_nothing_is_left_after_an_exception():
    model, inputs = FAMILIES["llama"].make(), FAMILIES["llama"].inputs()
    before = state(model)

    def fail(call, output):
        raise KeyError("seen")

    with pytest.raises(KeyError, match="seen"), patchattn.probed(model, fail):
        model(**inputs)
    assert state(model) == before


def test_a_base_that_is_left_out_is_refused():
    model, inputs = FAMILIES["llama"].make(implementation="sdpa"), FAMILIES["llama"].inputs()
    patchattn.patch_model(model.bfloat16(), "act", alpha=1.0)  # which computes this by itself
    with (
        patchattn.probed(model, lambda call, output: None, at="base"),
        pytest.raises(NotImplementedError, match="'act'"),
    ):
        model(**inputs)


def test_patches_are_not_exchanged_under_a_probe_and_copies_are_not_looked_at():
    model, inputs = FAMILIES["llama"].make(), FAMILIES["llama"].inputs()
    wanted, seen = outputs(model, **inputs), []
    with patchattn.probed(model, lambda call, output: seen.append(call), layers=1):
        copied = copy.deepcopy(model)
        with pytest.raises(ValueError, match="close it"):
            patchattn.patch_model(model, "ssa")
    assert all(torch.equal(a, b) for a, b in zip(outputs(copied, **inputs), wanted, strict=True))
    assert not seen
    patchattn.patch_model(model, "ssa")
    with patchattn.probed(model, seen.append), pytest.raises(ValueError, match="close it"):
        patchattn.unpatch_model(model)
    patchattn.unpatch_model(model)


def test_checkpointing_shows_calls_again():
    model, inputs = FAMILIES["llama"].make(), FAMILIES["llama"].inputs()
    model.train().gradient_checkpointing_enable()
    gradients, seen = [], []
    for looks in (False, True):
        model.zero_grad()
        probe = patchattn.probed(model, lambda call, output: seen.append(output)) if looks else None
        model(**inputs, use_cache=False).logits.square().sum().backward()
        if probe is not None:
            probe.close()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))
    assert len(seen) == 4
    assert all(any(torch.equal(one, other) for other in seen[2:]) for one in seen[:2])


@pytest.mark.parametrize(
    ("given", "error"),
    [({"at": "middle"}, ValueError), ({"layers": 7}, ValueError), ({"modules": "nowhere"}, ValueError)],
)
def test_what_is_not_there_is_refused(given, error):
    model = FAMILIES["llama"].make()
    before = state(model)
    with pytest.raises(error):
        patchattn.probed(model, print, **given)
    with pytest.raises(TypeError, match="see must be"):
        patchattn.probed(model, "print")
    assert state(model) == before
