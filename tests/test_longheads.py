"""LongHeads (arXiv 2402.10685) against all its logits written out in float64, from unrotated queries and keys."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.core.kv_caches import cache_argument

from .behaviour import close, decoded, positions
from .families import FAMILIES, outputs
from .reference import DIM, HEADS, KV_HEADS, layer_in_and_out, rotate, tiny_llama

TOKENS = torch.arange(3, 33)[None]
SETTINGS = {"window": 12, "chunk": 3}


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def stand_in(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`(D,)` of a chunk's unrotated queries and keys and its values `(w, D)`: section 3.1, at places in the chunk."""
    turned = [np.stack([rotate(x, place) for place, x in enumerate(each)]) for each in (queries, keys)]
    mean = (softmax(turned[0] @ turned[1].T / np.sqrt(DIM)) @ values).mean(axis=0)
    return softmax(turned[1] @ mean / np.sqrt(DIM)) @ turned[1]


def chosen(scores: list[float], own: int, count: int) -> list[int]:
    """The chunks that are read of those from 0 to the own one."""
    forced = {0, max(0, own - 1), own}
    others = sorted((c for c in range(own) if c not in forced), key=lambda c: -scores[c])
    return sorted([*forced, *others[: max(0, count - len(forced))]])


def by_loops(module: Any, inputs: np.ndarray, window: int, chunk: int) -> tuple[np.ndarray, list[list[list[int]]]]:
    """Output `(T, E)` of a layer for one sequence `(T, E)`, and the chunks that each head of each token reads."""
    weights = {name: getattr(module, f"{name}_proj").weight.detach().numpy() for name in "qkvo"}
    queries, keys, values = ((inputs @ weights[name].T).reshape(len(inputs), -1, DIM) for name in "qkv")
    size, rows, read = window // chunk, [], []
    parts = [slice(c * chunk, (c + 1) * chunk) for c in range(len(inputs) // chunk)]
    for row in range(len(inputs)):
        heads, of_heads = [], []
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            scores = [
                float(queries[row, head] @ stand_in(queries[p, head], keys[p, kv], values[p, kv]))
                for p in parts[: row // chunk]
            ]
            some = chosen(scores, row // chunk, size)
            of_heads.append(some)
            columns = [j for c in some for j in range(c * chunk, min((c + 1) * chunk, row + 1))]
            # the keys that are read stand one behind the other, the token's own being the last of them
            turned = np.stack([rotate(keys[j, kv], place) for place, j in enumerate(columns)])
            query = rotate(queries[row, head], len(columns) - 1)
            heads.append(softmax(turned @ query / np.sqrt(DIM)) @ values[columns, kv])
        rows.append(weights["o"] @ np.concatenate(heads))
        read.append(of_heads)
    return np.stack(rows), read


def test_the_example_of_positions() -> None:
    """Chunks of 2, three are read, token 7: tokens 0, 1, 4, 5, 6, 7 at 0 to 5."""
    assert chosen([0.1, 0.9, 0.5], 3, 3) == [0, 2, 3]


@pytest.mark.parametrize(("window", "chunk"), [(12, 3), (18, 4), (6, 2), (4, 1)])
def test_all_logits_written_out(window: int, chunk: int) -> None:
    model = patchattn.patch_model(tiny_llama(), "longheads", window=window, chunk=chunk)
    inputs, found = layer_in_and_out(model, TOKENS)
    module = model.model.layers[0].self_attn
    expected, read = by_loops(module, inputs[0], window, chunk)
    np.testing.assert_allclose(found[0], expected, atol=2e-6)  # the model's angles are float32
    assert max(len(one) for heads in read for one in heads) == window // chunk
    is_free = window // chunk > 3  # else what is always read is all
    assert any(len({tuple(one) for one in heads}) > 1 for heads in read) == is_free


def test_of_chunks_that_are_alike_the_first_is_read() -> None:
    model, told = tiny_llama(), []
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()  # every chunk scores 0
    patchattn.patch_model(model, "longheads", window=12, chunk=3)
    layer = model.model.layers[0].self_attn.patchattn.longheads
    original = layer._kept
    layer._kept = lambda *given: told.append(original(*given)) or told[-1]
    outputs(model, input_ids=TOKENS)
    for row in range(12, TOKENS.shape[1]):
        own = row // 3
        want = chosen([0.0] * own, own, 4)
        assert all(told[0][0, head, row].nonzero().flatten().tolist() == want for head in range(HEADS))


def test_density_is_keys_read_over_keys_seen() -> None:
    model, told = patchattn.patch_model(tiny_llama(), "longheads", **SETTINGS), []
    with patchattn.observe(model, lambda observation: told.append(observation.values["density"])):
        inputs, _ = layer_in_and_out(model, TOKENS)
    _, read = by_loops(model.model.layers[0].self_attn, inputs[0], **SETTINGS)
    for row in range(TOKENS.shape[1]):
        for head in range(HEADS):
            count = sum(min(3, row + 1 - 3 * c) for c in read[row][head])
            assert float(told[0][0, row, head]) == pytest.approx(count / (row + 1))


def test_a_text_within_the_window_is_the_model_itself() -> None:
    model = FAMILIES["llama"].make()
    with torch.no_grad():
        plain = model(TOKENS).logits
        for settings in ({"window": 30, "chunk": 3}, {"window": None}, {}):
            with patchattn.patched(model, "longheads", settings):
                assert torch.equal(model(TOKENS).logits, plain)
        with patchattn.patched(model, "longheads", SETTINGS):
            found = model(TOKENS).logits
    close(found[:, :12], plain[:, :12])
    assert float((found - plain)[:, 12:].abs().max()) > 1e-3


@pytest.fixture(scope="module")
def model() -> Any:
    return patchattn.patch_model(FAMILIES["llama"].make_exact(), "longheads", slack=2, **SETTINGS)


def texts() -> torch.Tensor:
    return torch.randint(3, 60, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sizes", [[16, 4, *[1] * 10], [1] * 30, [20, 10]])
def test_any_calls_are_one_forward(model: Any, sizes: list[int]) -> None:
    close(decoded(model, texts(), sizes), outputs(model, input_ids=texts(), use_cache=False)[0])


@pytest.mark.parametrize("given", [True, False], ids=["position_ids", "by_column"])
def test_padding_of_whole_chunks_changes_nothing(model: Any, given: bool) -> None:
    ids, mask = texts(), torch.ones(2, 30, dtype=torch.long)
    ids[1, :6], mask[1, :6] = 0, 0
    words = {"position_ids": positions(mask)} if given else {}
    found = outputs(model, input_ids=ids, attention_mask=mask, **words)[0]
    for row, start in enumerate((0, 6)):
        alone = outputs(model, input_ids=ids[row : row + 1, start:])[0]
        torch.testing.assert_close(found[row : row + 1, start:], alone, rtol=1e-5, atol=1e-5)  # angles are float32


def test_padding_inside_a_chunk_has_no_say(model: Any) -> None:
    """Five tokens of it, or of another text, which differ between two rows of one text, in chunks of three."""
    ids, mask, cache = texts(), torch.ones(2, 30, dtype=torch.long), DynamicCache(config=model.config)
    ids[:, 5:], mask[:, :5] = ids[0, 5:].clone(), 0
    for first, last in ((0, 20), (20, 21), (21, 30)):
        given = {"attention_mask": mask[:, :last], "position_ids": positions(mask)[:, first:last]}
        found = outputs(model, input_ids=ids[:, first:last], **given, **cache_argument(model, cache))[0]
        close(*found[:, max(0, 5 - first) :].split(1))
    numbers = torch.cat([torch.arange(5), torch.arange(25)])[None]
    close(*outputs(model, input_ids=ids, position_ids=numbers, use_cache=False)[0][:, 5:].split(1))


def test_tokens_that_are_taken_back_leave_nothing_behind_within_the_slack(model: Any) -> None:
    ids = texts()[:1]
    for size, taken in ((10, 2), (7, 1), (9, 2)):  # within a chunk, up to its border, and across it
        cache = DynamicCache(config=model.config)
        outputs(
            model, input_ids=torch.cat([ids[:, :size], ids[:, 20 : 20 + taken]], dim=1), **cache_argument(model, cache)
        )
        cache.crop(-taken)
        cache.reorder_cache(torch.tensor([0]))
        rest = outputs(model, input_ids=ids[:, size:], **cache_argument(model, cache))[0]
        close(rest, outputs(model, input_ids=ids, use_cache=False)[0][:, size:])
    cache = DynamicCache(config=model.config)
    outputs(model, input_ids=ids[:, :21], **cache_argument(model, cache))
    cache.crop(-8)
    with pytest.raises(NotImplementedError, match="more than slack=2 tokens were taken back"):
        outputs(model, input_ids=ids[:, 13:], **cache_argument(model, cache))


def test_a_second_turn_and_assisted_decoding() -> None:
    model, ids = patchattn.patch_model(FAMILIES["llama"].make_exact(), "longheads", **SETTINGS), texts()[:1]
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = DynamicCache()
    first = model.generate(ids[:, :15], **how, past_key_values=cache)
    turn = torch.cat([first, ids[:, 20:24]], dim=1)
    expected = model.generate(turn, **how, use_cache=False)
    assert torch.equal(model.generate(turn, **how, past_key_values=cache), expected)
    assert torch.equal(model.generate(turn, **how, prompt_lookup_num_tokens=3), expected)
    beams = {**how, "num_beams": 3}
    assert torch.equal(model.generate(turn, **beams), model.generate(turn, use_cache=False, **beams))


def test_weights_are_those_of_what_is_read() -> None:
    eager = patchattn.patch_model(FAMILIES["llama"].make(implementation="eager"), "longheads", **SETTINGS)
    fused = patchattn.patch_model(FAMILIES["llama"].make(), "longheads", **SETTINGS)
    with torch.no_grad():
        found = eager(texts(), output_attentions=True)
        torch.testing.assert_close(found.logits, fused(texts()).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.attentions[1].sum(-1), torch.ones(2, HEADS, 30))
    assert int((found.attentions[0][0, 0, 29] > 0).sum()) == 12


def test_the_trained_length_is_what_a_token_reads() -> None:
    """Beyond it the model knows no positions; far keys count all the same."""
    model, ids = tiny_llama(max_position_embeddings=64), torch.arange(100)[None] % 47
    with torch.no_grad():
        plain, told = model(ids).logits, []
        patchattn.patch_model(model, "longheads", chunk=16)
        with patchattn.observe(model, lambda observation: told.append(observation.values["density"])):
            found = model(ids).logits
        near = model(ids[:, -64:]).logits
    close(found[:, :64], plain[:, :64])
    assert float((found - plain)[:, -1].abs().max()) > 1e-3
    assert float((found[:, -1] - near[:, -1]).abs().max()) > 1e-3
    assert float((told[0][0] * torch.arange(1, 101)[:, None]).max()) <= 64 + 1e-3


def test_what_cannot_be_is_refused() -> None:
    for settings, says in (
        ({"window": 5, "chunk": 2}, "window=5 holds 2 chunks of 2 keys, and a token always reads three"),
        ({"window": "all"}, "window must be"),
        ({"chunk": 1024}, "window=2048 holds 2 chunks of 1024"),
        ({"chunk": 0}, "chunk must lie between 1"),
    ):
        with pytest.raises((ValueError, TypeError), match=says):
            patchattn.patch_model(FAMILIES["llama"].make(), "longheads", settings)
    for family, reason in (("gpt2", "are learned"), ("bert", "bidirectional"), ("qwen2_5_vl", "M-RoPE")):
        with pytest.raises(NotImplementedError, match=reason):
            patchattn.patch_model(FAMILIES[family].make(), "longheads", modules=r"^(?!.*visual)")
    model = FAMILIES["llama"].make()
    plain = DynamicCache(config=model.config)
    outputs(model, input_ids=TOKENS[:, :8], **cache_argument(model, plain))
    patchattn.patch_model(model, "longheads", **SETTINGS)
    with pytest.raises(ValueError, match="filled without"):
        outputs(model, input_ids=TOKENS[:, 8:9], **cache_argument(model, plain))
    static = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(NotImplementedError, match="static"):
        outputs(model, input_ids=TOKENS[:, :8], **cache_argument(model, static))
    forgetful = FAMILIES["llama"].make()
    both = {"longheads": SETTINGS, "streaming_llm": {"sinks": 1, "recent": 3, "slack": 0}}
    patchattn.patch_model(forgetful, ["streaming_llm", "longheads"], both)
    with pytest.raises(NotImplementedError, match=r"where streaming_llm.* drops keys"):
        decoded(forgetful, TOKENS[:, :12], [8, 1, 1, 1, 1])
