"""DMA (arXiv 2508.02124) against loops in float64: scores of values, the keys they choose, and their biases."""

from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.core.places import Places
from patchattn.variants.selection.dma import DMA

from .behaviour import close, decoded, positions, text
from .families import FAMILIES, outputs
from .reference import DIM, HEADS, KV_HEADS, layer_in_and_out, tiny_llama
from .selecting import Recorded, attended, projected, recorded

TOKENS = torch.arange(3, 20)[None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return recorded(monkeypatch)


def patched(**settings: Any) -> torch.nn.Module:
    model = patchattn.patch_model(tiny_llama(), "dma", **settings)
    dma = model.model.layers[0].self_attn.patchattn.dma
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        dma.weight.copy_(torch.randn(dma.weight.shape, generator=generator, dtype=torch.float64))
        dma.scale.copy_(torch.tensor([0.4, -0.7]))
    return model


def scores(model: torch.nn.Module, value: np.ndarray) -> np.ndarray:
    """`(Hkv, T)` of values `(T, Hkv, D)`: A log(1 + e^(w v)), v the values of all kv heads of a token."""
    dma = model.model.layers[0].self_attn.patchattn.dma
    weight, scale = dma.weight.detach().numpy(), dma.scale.detach().numpy()
    return np.array([[scale[g] * np.log1p(np.exp(weight[g] @ v.reshape(-1))) for v in value] for g in range(KV_HEADS)])


def best(score: np.ndarray, i: int, window: int) -> list[int]:
    """The keys up to i with the highest scores, of equal ones the later."""
    return sorted(range(i + 1), key=lambda j: (-score[j], -j))[:window]


@pytest.mark.parametrize(("window", "bias"), [(4, "exp"), (3, "plain"), (1, "exp"), (None, "exp")])
def test_a_token_reads_the_best_visible_values_with_their_scores_on_the_logits(window: int | None, bias: str) -> None:
    model = patched(window=window, bias=bias)
    inputs, got = layer_in_and_out(model, TOKENS)
    module = model.model.layers[0].self_attn
    query, key, value = projected(module, inputs[0])
    score = scores(model, value)
    want = []
    for i in range(len(query)):
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            read = best(score[group], i, window or len(query))
            added = np.exp(score[group, read]) if bias == "exp" else score[group, read]
            logits = key[read, group] @ query[i, head] / np.sqrt(DIM) + added
            shares = np.exp(logits - logits.max())
            heads.append(shares @ value[read, group] / shares.sum())
        want.append(module.o_proj.weight.detach().numpy() @ np.concatenate(heads))
    np.testing.assert_allclose(got[0], np.array(want), rtol=1e-6, atol=1e-8)


def by_majority(chosen: list[int], i: int, block: int) -> set[int]:
    """The keys up to i of blocks of which more than half of those up to i are chosen, and i."""
    found = {i}
    for start in range(0, i + 1, block):
        seen = range(start, min(start + block, i + 1))
        found |= set(seen) if 2 * len(set(seen) & set(chosen)) > len(seen) else set()
    return found


@pytest.mark.parametrize(("choice", "block"), [("top", 3), ("top", 2), ("relu", 1), ("relu", 4)])
def test_blocks_by_majority_and_scores_above_zero(choice: str, block: int, calls: Recorded) -> None:
    model = patched(window=5, choice=choice, block=block)
    sizes = [11, 1, 4, 1]
    decoded(model, TOKENS, sizes)
    value = calls[-1][0].value[0].transpose(0, 1).numpy()
    score, i = scores(model, value), 0
    for call, seen, output in calls:
        for row in range(seen.shape[2]):
            for head in range(HEADS):
                of_head = score[head // 2]
                some = best(of_head, i, 5) if choice == "top" else [j for j in range(i + 1) if of_head[j] > 0]
                want = by_majority(some, i, block) if block > 1 else {i, *some}
                assert set(seen[0, head, row].nonzero().flatten().tolist()) == want
            i += 1
        np.testing.assert_allclose(output.numpy(), attended(call, seen.numpy()), rtol=1e-9, atol=1e-12)


def test_calls_of_any_size_and_a_static_cache_choose_alike(calls: Recorded) -> None:
    model = patched(window=4)
    whole = outputs(model, input_ids=TOKENS[:, :14])[0]
    for kind in ("dynamic", "static"):
        close(decoded(model, TOKENS[:, :14], [5, 1, 1, 4, 1, 1, 1], kind=kind), whole)
    assert all(int(seen.sum(-1).max()) <= 4 for _, seen, _ in calls)


@pytest.mark.parametrize("block", [2, 3])
def test_blocks_on_layers_that_forget_keys(block: int) -> None:
    """Behind a sliding window keys stand further on in their text than as many keys as there are."""
    model, tokens = FAMILIES["mistral"].make_exact(), text(16)
    patchattn.patch_model(model, "dma", window=3, block=block)
    close(decoded(model, tokens, [6, 1, 3, 1, 1, 4]), outputs(model, input_ids=tokens)[0])


def test_single_tokens_read_places(monkeypatch: pytest.MonkeyPatch) -> None:
    found, original = [], DMA.select

    def watched(self: DMA, call: Any) -> Any:
        found.append(original(self, call))
        return found[-1]

    monkeypatch.setattr(DMA, "select", watched)
    model = patched(window=4)
    decoded(model, TOKENS, [15, 1, 1])
    assert [isinstance(keep, Places) for keep in found] == [False, True, True]
    assert found[-1].index.shape == (1, KV_HEADS, 4)


def test_texts_of_a_padded_batch_come_out_as_alone() -> None:
    model = patched(window=3)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[1, :6] = 0
    tokens = TOKENS.repeat(2, 1)
    together = outputs(model, input_ids=tokens, attention_mask=mask, position_ids=positions(mask))[0]
    close(together[:1], outputs(model, input_ids=TOKENS)[0])
    close(together[1:, 6:], outputs(model, input_ids=TOKENS[:, 6:])[0])


def test_an_untrained_one_is_a_window_and_the_base_where_everything_fits() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected, cached = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 2])
    for settings in ({"window": 12}, {"window": None}, {"window": 12, "bias": "plain"}):
        with patchattn.patched(model, "dma", **settings):
            assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
            assert torch.equal(decoded(model, tokens, [9, 1, 2]), cached)
    with patchattn.patched(model, "dma", window=5):
        untrained = outputs(model, input_ids=tokens)[0]
    with patchattn.patched(model, "streaming", sinks=0, recent=5):
        close(untrained, outputs(model, input_ids=tokens)[0])


def test_scores_learn_from_the_first_step_by_their_biases() -> None:
    model = tiny_llama()
    patchattn.patch_model(model, "dma", window=4)
    dma = model.model.layers[0].self_attn.patchattn.dma
    assert dma.fast_parameters() == [dma.scale]
    assert patchattn.patch_info(model)["extra_parameters"] == KV_HEADS * KV_HEADS * DIM + KV_HEADS
    (model(TOKENS).logits * torch.linspace(-1, 1, 50)).sum().backward()
    assert bool((dma.scale.grad != 0).all())
    assert not bool(dma.weight.grad.any())  # its factor A is still 0
    with torch.no_grad():
        dma.scale.fill_(0.1)
    (model(TOKENS).logits * torch.linspace(-1, 1, 50)).sum().backward()
    assert bool((dma.weight.grad != 0).all())


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="window must lie between 1"):
        patchattn.patch_model(tiny_llama(), "dma", window=0)
    wide = tiny_llama()
    patchattn.patch_model(wide, "dma")
    with torch.no_grad():
        dma = wide.model.layers[0].self_attn.patchattn.dma
        dma.weight = torch.nn.Parameter(torch.zeros(KV_HEADS, 7))
    with pytest.raises(NotImplementedError, match="made for values of 7 channels"):
        outputs(wide, input_ids=TOKENS)
