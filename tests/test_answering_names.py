"""Modules whose code asks for the attention implementation by name: ours answers as the base's does."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.hosts.transformers.compatibility import AnsweringName

from .behaviour import randomise
from .families import shortened

TOKENS = torch.tensor([[5, 9, 3, 7, 4, 8, 6, 11, 10, 12], [6, 3, 8, 5, 9, 4, 7, 10, 12, 11]])
_SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 16,
}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_INDEX = {"index_topk": 3, "index_n_heads": 2, "index_head_dim": 16}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}


@pytest.fixture(params=["eager", "sdpa"])
def base(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(base: str, **changed: int) -> nn.Module:
    """DeepSeek's sparse attention: which keys a query sees is put into the mask under these two names alone."""
    torch.manual_seed(0)
    sizes = {**_SIZES, **_HEADS, **_LATENT, **_INDEX, **_EXPERTS, **changed}
    config = tf.DeepseekV32Config(**sizes, attn_implementation=base)
    return tf.DeepseekV32ForCausalLM(config).eval()


@torch.no_grad()
def run(model: nn.Module, **given: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, **given).logits  # type: ignore[no-any-return]


def test_a_name_answers_as_the_base_and_is_looked_up_as_ours() -> None:
    name = AnsweringName("sdpa")
    for each in (name, copy.deepcopy(name), pickle.loads(pickle.dumps(name))):
        asked = (each == "sdpa", each in ("eager", "sdpa"), each != "eager", each not in ("eager",), each == str(each))
        assert all(asked)
        assert not each != "sdpa"  # noqa: SIM202, which is another question than whether it is equal
        assert {"sdpa": 1, "patchattn_sdpa": 2}[each] == 2
        assert str(each) == "patchattn_sdpa"


@pytest.mark.usefixtures("toys")
def test_neutral_is_the_model_and_unpatching_restores_it(base: str) -> None:
    model = make(base)
    expected = run(model)
    for toy in ("toy_mask", "toy_gate"):
        patchattn.patch_model(model, toy, strength=0.0)
        assert torch.equal(run(model), expected)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(twin), expected)
        patchattn.unpatch_model(model)
        assert torch.equal(run(model), expected)
        assert all(
            type(module.config._attn_implementation) is str for module in model.modules() if hasattr(module, "config")
        )
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_variants_see_the_keys_that_the_module_has_chosen(base: str) -> None:
    """Three of the keys up to the query's own, as `index_topk` says."""
    model = make(base)
    calls: list[Any] = []
    with patchattn.probed(model, lambda call, output: calls.append(call)):
        run(model)
    assert len(calls) == 2
    for call in calls:
        seen = call.mask.seen().expand(2, -1, -1, -1)
        assert torch.equal(seen.sum(-1)[:, 0], torch.arange(1, 11).clamp(max=3).expand(2, -1))
        assert not bool((seen & torch.ones(10, 10).triu(1).bool()).any())


def steps(model: nn.Module) -> torch.Tensor:
    cache, mask = tf.DynamicCache(config=model.config), torch.ones_like(TOKENS)
    sizes = [(slice(0, 5), 5), *((slice(place, place + 1), place + 1) for place in range(5, 10))]
    with torch.no_grad():
        parts = [
            model(
                input_ids=TOKENS[:, chunk],
                attention_mask=mask[:, :done],
                use_cache=True,
                **cache_argument(model, cache),
            ).logits
            for chunk, done in sizes
        ]
    return torch.cat(parts, dim=1)


@pytest.mark.usefixtures("toys")
def test_decoding_is_one_forward(base: str) -> None:
    model = make(base)
    expected = steps(model)
    patchattn.patch_model(model, "toy_mask", strength=0.0)
    assert torch.equal(steps(model), expected)
    model = patchattn.patch_model(make(base, index_topk=16), "toy_gate")  # all keys, of which none ties with another
    randomise(model)
    whole = run(model)
    assert float((whole - run(make(base, index_topk=16))).abs().max()) > 1e-4
    torch.testing.assert_close(steps(model), whole, rtol=1e-4, atol=1e-5)


def test_padding_changes_no_real_token(base: str) -> None:
    model = patchattn.patch_model(make(base, index_topk=16), "moh", active_ratio=0.5)
    mask = torch.ones_like(TOKENS)
    mask[1, 6:] = 0
    with torch.no_grad():
        alone = model(input_ids=TOKENS[1:, :6]).logits
    torch.testing.assert_close(run(model, attention_mask=mask)[1:, :6], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["streaming_llm", "tova"])
def test_no_key_is_dropped_whose_index_would_stay(name: str, base: str) -> None:
    settings = {"streaming_llm": {"sinks": 1, "recent": 3}, "tova": {"budget": 4}}[name]
    model = patchattn.patch_model(make(base), name, settings)
    with pytest.raises(NotImplementedError, match="holds more of every token than its key and value"):
        steps(model)


@pytest.mark.slow
def test_it_compiles_whole(base: str) -> None:
    model = shortened(patchattn.patch_model(make(base), "moh", active_ratio=0.5))
    expected = run(model, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, use_cache=False), expected, rtol=1e-4, atol=1e-5)
