"""MoBA (arXiv 2502.13189) against loops over blocks, in prompts, while decoding, beside padding and in training."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.reading import scores
from patchattn.variants.selection import moba

from .behaviour import close, decoded, positions, text
from .families import FAMILIES, outputs
from .reference import layer_in_and_out, tiny_llama
from .selecting import Recorded, assert_reads, projected, recorded

TOKENS = torch.arange(3, 26)[None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return recorded(monkeypatch)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many keys means are made, call by call."""
    found, original = [], moba.block_means

    def watched(keys: torch.Tensor, block: int, real: torch.Tensor) -> torch.Tensor:
        found.append(keys.shape[2])
        return original(keys, block, real)

    monkeypatch.setattr(moba, "block_means", watched)
    return found


def by_means(query: np.ndarray, key: np.ndarray, block: int, top_k: int, heads: str, first: int = 0) -> list[list[set]]:
    """Blocks that each head of each token reads, of queries `(T, H, D)` and keys `(T, Hkv, D)`.

    Args:
        query: of all tokens.
        key: likewise.
        block: keys of a block.
        top_k: how many are read.
        heads: "query" or "kv".
        first: tokens before this one are padding.
    """
    group, found = query.shape[1] // key.shape[1], []
    for i in range(len(query)):
        own, rows = i // block, []
        for head in range(query.shape[1]):
            kv = head // group
            asking = range(kv * group, (kv + 1) * group) if heads == "kv" else [head]
            others = [b for b in range(own) if (b + 1) * block > first]
            means = [key[max(b * block, first) : (b + 1) * block, kv].mean(axis=0) for b in others]
            scores = np.array([max(query[i, one] @ mean for one in asking) for mean in means])
            best = np.argsort(-scores, kind="stable")[: top_k - 1] if others else []
            rows.append({own, *(others[n] for n in best)})
        found.append(rows)
    return found


@pytest.mark.parametrize(
    ("block", "top_k", "heads"), [(2, 3, "query"), (3, 2, "kv"), (4, 2, "query"), (1, 4, "kv"), (5, 1, "query")]
)
def test_a_token_reads_its_own_block_and_those_with_the_best_means(block: int, top_k: int, heads: str) -> None:
    model = patchattn.patch_model(tiny_llama(), "moba", block=block, top_k=top_k, heads=heads)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    read = by_means(query, key, block, top_k, heads)
    assert_reads(model, TOKENS, lambda head, i, j: j // block in read[i][head])


@pytest.mark.parametrize("heads", ["query", "kv"])
def test_single_tokens_choose_as_those_of_a_prompt_or_are_dense(heads: str, calls: Recorded) -> None:
    model = tiny_llama()
    settings = {"block": 3, "top_k": 2, "heads": heads}
    with patchattn.patched(model, "moba", **settings, decode="selected"):
        whole = outputs(model, input_ids=TOKENS)[0]
        close(decoded(model, TOKENS, [7, 1, 1, 8, *[1] * 6]), whole)
        calls.clear()
        decoded(model, TOKENS[:, :15], [14, 1])
        assert int(calls[-1][1][0, 0].sum()) == 3 + 3
    with patchattn.patched(model, "moba", **settings):
        chunks = decoded(model, TOKENS, [10, 8, 1, 1, 3])
        assert [int(seen[0, 0, -1].sum()) for _, seen, _ in calls[-5:]] == [3 + 1, 3 + 3, 19, 20, 3 + 2]
    close(chunks[:, :18], whole[:, :18])  # chunks of a prompt choose


def test_padding_inside_a_block_is_in_no_mean(calls: Recorded) -> None:
    """Five tokens of padding before the text, in blocks of three: they count from the first column on."""
    model = patchattn.patch_model(tiny_llama(), "moba", block=3, top_k=2)
    mask = torch.ones_like(TOKENS)
    mask[:, :5] = 0
    with torch.no_grad():
        model(TOKENS, attention_mask=mask, position_ids=positions(mask))
    call, seen, _ = calls[0]
    query, key = (tensor[0].transpose(0, 1).numpy() for tensor in (call.query, call.key))
    read = by_means(query, key, 3, 2, "query", first=5)
    for head, i in np.ndindex(4, 23):
        if i >= 5:
            want = {j for j in range(5, i + 1) if j // 3 in read[i][head]}
            assert set(seen[0, head, i].nonzero().flatten().tolist()) == want


def test_blocks_that_hold_the_text_are_the_base_bit_for_bit() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected, cached = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 2])
    for settings in ({"block": 4, "top_k": 3}, {"block": 1, "top_k": None}, {"block": 5, "top_k": 3}):
        with patchattn.patched(model, "moba", **settings, decode="selected"):
            assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
            assert torch.equal(decoded(model, tokens, [9, 1, 2]), cached)
    with patchattn.patched(model, "moba", block=4, top_k=2):
        assert not torch.equal(outputs(model, input_ids=tokens)[0][:, -1], expected[:, -1])


def test_means_are_made_once_and_follow_what_is_taken_back(made: list[int]) -> None:
    model = patchattn.patch_model(tiny_llama(), "moba", block=3, top_k=2, decode="selected")
    decoded(model, TOKENS, [13, *[1] * 10])
    assert made == [12, 3, 3, 3]  # at 13 keys, 15, 18 and 21


def test_means_in_slots_are_made_anew_of_the_block_that_a_token_is_in(made: list[int]) -> None:
    """Of text alone, be padding before it."""
    model = patchattn.patch_model(tiny_llama(), "moba", block=3, top_k=2, decode="selected")
    mask, found = torch.ones_like(TOKENS), []
    mask[:, :4] = 0
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=25)):
        made.clear()
        for first, last in ((0, 13), *((n, n + 1) for n in range(13, 23))):
            given = {"attention_mask": mask[:, :last], "position_ids": positions(mask)[:, first:last]}
            step = outputs(model, input_ids=TOKENS[:, first:last], **given, **cache_argument(model, cache))[0]
            found.append(step[:, -1])
    assert made == [24, *[3] * 10]
    close(torch.cat(found[:11]), torch.cat(found[11:]))


def test_queries_and_keys_learn_through_attention_alone() -> None:
    """The choice has no gradient: that of attention under the chosen mask, computed by autograd, is all there is."""
    model = patchattn.patch_model(tiny_llama(), "moba", block=3, top_k=2)
    inputs, _ = layer_in_and_out(model, TOKENS)
    module: nn.Module = model.model.layers[0].self_attn
    query, key, _ = projected(module, inputs[0])
    read = by_means(query, key, 3, 2, "query")
    model.train()
    model(TOKENS).logits.square().sum().backward()
    got = module.q_proj.weight.grad.clone()
    patchattn.unpatch_model(model)
    model.zero_grad()
    rows = [[[j <= i and j // 3 in read[i][head] for j in range(23)] for i in range(23)] for head in range(4)]
    model(TOKENS, attention_mask=torch.tensor(rows)[None]).logits.square().sum().backward()
    torch.testing.assert_close(got, module.q_proj.weight.grad, rtol=1e-9, atol=1e-12)


def test_what_has_no_blocks_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="leaves out layers with a sliding window"):
        patchattn.patch_model(FAMILIES["mistral"].make(), "moba")
    with pytest.raises(ValueError, match="top_k must lie between 1"):
        patchattn.patch_model(tiny_llama(), "moba", top_k=0)
    forgetful = FAMILIES["llama"].make()
    patchattn.patch_model(
        forgetful, ["streaming_llm", "moba"], {"moba": {}, "streaming_llm": {"sinks": 1, "recent": 3, "slack": 0}}
    )
    with pytest.raises(NotImplementedError, match="lets go of some"):
        decoded(forgetful, text(12), [9, 1, 1, 1])
    assert patchattn.variant_info("moba").configure({"preset": "benchmark"}).top_k == 3


def test_products_are_those_of_every_query_head_with_its_kv_head() -> None:
    query, facts = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    found = scores.products(query, facts)
    for b, h, i, p in np.ndindex(*found.shape):
        assert float(found[b, h, i, p]) == pytest.approx(
            float(query[b, h, i] @ facts[b, h // 2, p]), rel=1e-4, abs=1e-5
        )
