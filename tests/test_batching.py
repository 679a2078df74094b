"""Continuous batching of patched models: each request as `generate` answers it, or refused before the first token."""

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, FalconConfig, FalconForCausalLM, GenerationConfig
from transformers.generation.continuous_batching import PagedAttentionCache

import patchattn
from patchattn.hosts.transformers.batching import refuse_batching
from patchattn.hosts.transformers.paged import places_of_texts, tells_paged_calls

from .behaviour import Case, accepted, assert_same, randomise, snapshot
from .families import FAMILIES

# What needs the call alone, and is not to be refused; others may be batched too, and then answer as under `generate`.
BATCHED = {
    *(
        "attention_bias",
        "cope",
        "differential",
        "entmax",
        "gated",
        "logn",
        "massive",
        "meta_tokens",
        "moh",
        "mswa",
        "prune",
        "sigmoid",
    ),
    *("sink", "softpick", "ssmax", "talking_heads", "urpe"),
}
# Read in pieces of 8 tokens, so that one request decodes while another is not read to its end.
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]]
NEW = 4
ENTRIES = ("init_continuous_batching", "continuous_batching_context_manager", "generate_batch")

pytestmark = pytest.mark.skipif(not tells_paged_calls(), reason="attention functions of this release store keys")


@pytest.fixture(autouse=True, scope="module")
def nothing_to_collect() -> Iterator[None]:
    """Continuous batching collects garbage when it ends, for seconds among the objects of a test run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def batched(model: Any, **settings: Any) -> list[tuple[list[int], list[float]]]:
    """Of each prompt, new tokens and their log probabilities."""
    how = {"page_size": 4, "num_blocks": 32, "max_batch_tokens": 8, "return_logprobs": True}
    greedy = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0)
    config = ContinuousBatchingConfig(**how)
    found = model.generate_batch(PROMPTS, greedy, continuous_batching_config=config, warmup=False, **settings)
    return [(result.generated_tokens, result.logprobs) for result in found.values()]


def alone(model: Any) -> list[tuple[list[int], list[float]]]:
    """The same by `generate`, a prompt at a time."""
    found = []
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt in PROMPTS:
        output = model.generate(torch.tensor([prompt]), **how, return_dict_in_generate=True, output_logits=True)
        tokens = output.sequences[0, len(prompt) :].tolist()
        sums = [logits[0].float().log_softmax(-1) for logits in output.logits]
        found.append((tokens, [float(one[token]) for one, token in zip(sums, tokens, strict=True)]))
    return found


def assert_alike(found: Any, expected: Any) -> None:
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    torch.testing.assert_close(*(torch.tensor([sums for _, sums in one]) for one in (found, expected)))


@pytest.mark.parametrize("case", accepted("llama"), ids=str)
def test_requests_are_answered_as_by_generate_or_refused_at_once(case: Case) -> None:
    model: Any = FAMILIES["llama"].make().float()
    before = snapshot(model)
    case.patch(model).float()
    try:
        refuse_batching(model)
    except NotImplementedError:
        assert case.variant not in BATCHED
        for name in ENTRIES:
            with pytest.raises(NotImplementedError, match=r"cannot be batched continuously"):
                getattr(model, name)([PROMPTS]) if name != ENTRIES[1] else getattr(model, name)().__enter__()
    else:
        assert_alike(batched(model), alone(model))
    patchattn.unpatch_model(model)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("family", "implementation", "variant", "settings"),
    [
        ("mistral", "sdpa", "ssa", {"value": False}),  # sliding layers
        ("gemma3_text", "sdpa", "streaming", {"sinks": 0, "recent": 3}),  # sliding and full ones
        ("gpt_oss", "eager", "logn", {"train_length": 3}),  # with sinks of its own
        ("qwen3", "eager", "urpe", {"span": 4}),
    ],
)
def test_other_families_and_eager_attention(
    family: str, implementation: str, variant: str, settings: dict[str, Any]
) -> None:
    model: Any = FAMILIES[family].make(implementation=implementation).float()
    patchattn.patch_model(model, variant, **settings)
    randomise(model)
    assert_alike(batched(model), expected := alone(model))
    assert model.config._attn_implementation == implementation
    patchattn.unpatch_model(model)
    assert [sums for _, sums in alone(model)] != [sums for _, sums in expected]
    assert_alike(batched(model), alone(model))


def test_keys_from_before_a_patch_are_not_read() -> None:
    model: Any = FAMILIES["llama"].make().float()
    batched(model, persistent_manager=True)
    patchattn.patch_model(model, "logn", train_length=3)
    assert_alike(batched(model, persistent_manager=True), alone(model))
    patchattn.unpatch_model(model)
    assert_alike(batched(model), alone(model))


def test_what_is_refused_in_a_call_is_no_answer() -> None:
    """Ranks of keys that a sliding layer let go of are not known, which shows in the call."""
    model = patchattn.patch_model(FAMILIES["mistral"].make(), "urpe", span=4)
    with pytest.raises(RuntimeError, match=r"Continuous batching of a patched model failed: It is not known how many"):
        batched(model)


def test_a_copy_is_watched_as_well() -> None:
    model = copy.deepcopy(patchattn.patch_model(FAMILIES["llama"].make(), "logn", train_length=3).float())
    assert_alike(batched(model), alone(model))
    patchattn.patch_model(model, "tova", budget=2)
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(NotImplementedError, match=r"'tova' in model.layers.0.self_attn cannot be batched"):
            one.generate_batch(PROMPTS)


def test_other_numbers_of_kv_heads_and_flash_attention_are_refused() -> None:
    pruned: Any = patchattn.patch_model(FAMILIES["llama"].make(), "prune", heads={0: [0, 1]})
    with pytest.raises(NotImplementedError, match=r"has 1 kv heads, and the configuration, .* says 2"):
        pruned.generate_batch(PROMPTS)
    model: Any = patchattn.patch_model(FAMILIES["llama"].make(), "moh")
    for layer in model.model.layers:
        layer.self_attn.patchattn.base = "flash_attention_2"
    with pytest.raises(NotImplementedError, match=r"has 'flash_attention_2': load the model with attn_implementation"):
        model.generate_batch(PROMPTS)


def test_attention_in_a_module_s_own_code_is_refused() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model: Any = patchattn.patch_model(FalconForCausalLM(FalconConfig(**sizes)), "moh")
    with pytest.raises(NotImplementedError, match=r"FalconAttention .* computes attention in its own code"):
        model.generate_batch(PROMPTS)


def test_a_paged_cache_is_known_by_its_type_whatever_it_is_called() -> None:
    """Below the model, where no method of it is called: in the loop that serves requests."""
    paged: Any = object.__new__(PagedAttentionCache)
    layer: Any = patchattn.patch_model(FAMILIES["llama"].make(), "ssa").model.layers[0].self_attn
    with pytest.raises(NotImplementedError, match="cannot be batched continuously"):
        layer(torch.randn(1, 4, 32), None, None, paged)
    with pytest.raises(NotImplementedError, match="cannot be batched continuously"):
        layer(hidden_states=torch.randn(1, 4, 32), position_embeddings=None, attention_mask=None, cache=paged)


def test_which_key_is_whose() -> None:
    """Three texts: two new tokens of five, one of one, three of three; then two rows and a key of padding."""
    tells = {"cu_seq_lens_q": torch.tensor([0, 2, 3, 6]), "cu_seq_lens_k": torch.tensor([0, 5, 6, 9])}
    found = places_of_texts(tells, queries=8, keys=10)
    assert found["own"][0, :6].tolist() == [3, 4, 5, 6, 7, 8]
    assert found["own"].max() < 10
    assert found["starts"][0].nonzero().flatten().tolist() == [0, 5, 6]
