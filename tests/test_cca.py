"""Core Context Aware attention against loops in float64, in chunks, with padding, taken back; exact start; refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument

from .behaviour import close
from .families import FAMILIES, outputs
from .pieces import in_chunks
from .reference import DIM, HEADS, KV_HEADS, tiny_llama

TOKENS = torch.randint(1, 50, (2, 13), generator=torch.Generator().manual_seed(0))
WINDOW, GROUP = 3, 3


def live(**settings: Any) -> Any:
    return patchattn.patch_model(tiny_llama(), "cca", window=WINDOW, group=GROUP, **settings)


def turned(vector: np.ndarray, by: int) -> np.ndarray:
    """A key as if it stood `by` positions further on."""
    half = DIM // 2
    angles = by * 10000.0 ** (-np.arange(half) / half)
    left, right = vector[:half], vector[half:]
    return np.concatenate(
        [left * np.cos(angles) - right * np.sin(angles), right * np.cos(angles) + left * np.sin(angles)]
    )


def expected(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """`(T, H, D)` of queries `(H, T, D)`, keys and values `(Hkv, T, D)`."""
    found, share = np.zeros((query.shape[1], HEADS, DIM)), HEADS // KV_HEADS
    for head in range(HEADS):
        kv = head // share
        for i in range(query.shape[1]):
            keys, values, at = [], [], 0
            while at <= i:
                last = at + GROUP - 1
                if last <= i - WINDOW:  # the whole group lies before the window
                    weights = np.zeros(GROUP)
                    for other in range(kv * share, (kv + 1) * share):
                        raised = np.exp([query[other, last] @ key[kv, j] / np.sqrt(DIM) for j in range(at, last + 1)])
                        weights += raised / raised.sum() / share
                    keys.append(sum(w * turned(key[kv, at + n], GROUP - 1 - n) for n, w in enumerate(weights)))
                    values.append(weights @ value[kv, at : last + 1])
                    at += GROUP
                else:
                    keys.append(key[kv, at])
                    values.append(value[kv, at])
                    at += 1
            raised = np.exp([query[head, i] @ k / np.sqrt(DIM) for k in keys])
            found[i, head] = raised / raised.sum() @ np.array(values)
    return found


@torch.no_grad()
def test_by_loops() -> None:
    model, seen = live(), {}
    with patchattn.probed(model, lambda call, output: seen.update(call=call, output=output), layers=0):
        model(TOKENS)
    call = seen["call"]
    for text in range(2):
        want = expected(*(each[text].numpy() for each in (call.query, call.key, call.value)))
        np.testing.assert_allclose(
            seen["output"][text].numpy(), want, rtol=0, atol=1e-6
        )  # tables of rotary embedding are float32


@torch.no_grad()
def test_it_is_the_model_up_to_a_window_and_a_group() -> None:
    model, plain = live(), tiny_llama()
    size = WINDOW + GROUP - 1
    assert torch.equal(model(TOKENS[:, :size]).logits, plain(TOKENS[:, :size]).logits)
    assert not torch.allclose(model(TOKENS).logits[:, size:], plain(TOKENS).logits[:, size:])


@torch.no_grad()
def test_weights_are_those_of_the_keys_that_cores_are_made_of() -> None:
    model = tiny_llama()
    model.set_attn_implementation("eager")
    patchattn.patch_model(model, "cca", window=WINDOW, group=GROUP)
    seen = {}
    with patchattn.probed(model, lambda call, output: seen.update(call=call, output=output), layers=0):
        weights = model(TOKENS, output_attentions=True).attentions[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 13, dtype=weights.dtype))  # eager: float32
    value = seen["call"].value.repeat_interleave(HEADS // KV_HEADS, dim=1)
    torch.testing.assert_close((weights @ value).transpose(1, 2), seen["output"])


@pytest.mark.parametrize("chunks", [[15], [6, 5, 1, 1, 1, 1]], ids=str)
@torch.no_grad()
def test_padding_in_one_call_or_in_chunks(chunks: list[int]) -> None:
    model = live()
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, :2] = 0
    tokens = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(1))
    found = in_chunks(model, tokens, mask, chunks)
    for text, real, got in zip(tokens, mask.bool(), found, strict=True):
        close(got[real], model(text[real][None]).logits[0])


@torch.no_grad()
def test_groups_that_are_opened_again_are_closed_by_what_comes_then() -> None:
    model, cache = live(), DynamicCache()
    other = TOKENS.roll(1, dims=0)
    model(TOKENS[:, :9], **cache_argument(model, cache))
    cache.crop(-2)
    again = torch.cat([TOKENS[:, :7], other[:, 7:]], dim=1)
    close(model(again[:, 7:], **cache_argument(model, cache)).logits, model(again).logits[:, 7:])


def test_gradients_pass_cores() -> None:
    model = live()
    model(TOKENS).logits[:, -1].square().sum().backward()
    assert all(p.grad is not None and bool((p.grad.abs() > 0).any()) for p in model.model.layers[0].parameters())


def test_what_it_refuses() -> None:
    for family, reason in (("gpt2", "are learned"), ("bert", "bidirectional"), ("t5", "must know how")):
        with pytest.raises(NotImplementedError, match=reason):
            patchattn.patch_model(FAMILIES[family].make(), "cca", window=3, group=3)
    with pytest.raises(ValueError, match="group must lie between 1"):
        patchattn.patch_model(tiny_llama(), "cca", group=0)
    model = FAMILIES["llama"].make()
    cache = DynamicCache()
    outputs(model, input_ids=TOKENS[:, :8], **cache_argument(model, cache))
    patchattn.patch_model(model, "cca", window=3, group=3)
    with pytest.raises(ValueError, match="filled without"):
        outputs(model, input_ids=TOKENS[:, 8:9], **cache_argument(model, cache))
