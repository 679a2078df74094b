"""Landmark Attention against loops in float64; padding, cache, chunks; texts with landmarks; start and refusals."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.positions.landmarks import IGNORED, LandmarkProcessor, insert_landmarks
from patchattn.softmax import rows
from patchattn.variants.normalisers.landmark import grouped_softmax

from .behaviour import close
from .families import FAMILIES, outputs
from .reference import DIM, HEADS, KV_HEADS, tiny_llama

MARK = 9  # in the texts: three sections and an open one; one that starts with a landmark, and an empty section
TOKENS = torch.tensor([[3, 7, 1, 9, 22, 9, 13, 5, 8, 9, 4, 2], [9, 8, 8, 9, 9, 4, 6, 1, 9, 3, 3, 1]])


def live(**settings: Any) -> Any:
    return patchattn.patch_model(tiny_llama(), "landmark", token=MARK, **{"blend": None, **settings})


def softmax(logits: Sequence[float]) -> np.ndarray:
    raised = np.exp(np.array(logits) - max(logits, default=0.0))
    return raised / raised.sum()


def expected(logits: np.ndarray, tokens: list[int], top: int | None = None) -> np.ndarray:
    """`(n,)` weights of the row of the last of these tokens, whose logits of them all are given."""
    sections: list[list[int]] = [[]]
    marks = []
    for place, token in enumerate(tokens):
        if token == MARK:
            marks.append(place)
            sections.append([])
        else:
            sections[-1].append(place)
    own = len(marks) - (tokens[-1] == MARK)  # a landmark's row is of the section that it ends
    earlier = [n for n in range(own) if sections[n]]
    if top is not None:
        earlier = sorted(earlier, key=lambda n: -logits[marks[n]])[:top]
    weights, near = np.zeros(len(tokens)), sections[own]
    if not near and not earlier:  # landmarks before any token
        return softmax(list(logits))
    shared = softmax([*(logits[j] for j in near), *(logits[marks[n]] for n in earlier)])
    for j, share in zip(near, shared, strict=False):
        weights[j] = share
    for n, share in zip(earlier, shared[len(near) :], strict=True):
        weights[sections[n]] = share * softmax([logits[j] for j in sections[n]])
    return weights


def test_the_example_of_two_sections() -> None:
    """Tokens t0 t1 L t2 t3 with equal logits: a third for each of t2, t3 and the landmark, whose third is halved."""
    is_mark = torch.tensor([False, False, True, False, False])
    got = grouped_softmax(torch.zeros(1, 1, 1, 5), torch.ones(1, 1, 1, 5, dtype=torch.bool), is_mark, None)
    torch.testing.assert_close(got.flatten(), torch.tensor([1 / 6, 1 / 6, 0, 1 / 3, 1 / 3]))


@pytest.mark.parametrize("top", [None, 1], ids=str)
@torch.no_grad()
def test_by_loops(top: int | None) -> None:
    model, seen = live(top=top), {}
    with patchattn.probed(model, lambda call, output: seen.update(call=call, output=output)):
        model(TOKENS)
    query, key, value = (getattr(seen["call"], name).numpy() for name in ("query", "key", "value"))
    for text, head in itertools.product(range(2), range(HEADS)):
        group = head // (HEADS // KV_HEADS)
        for i in range(TOKENS.shape[1]):
            logits = key[text, group, : i + 1] @ query[text, head, i] / np.sqrt(DIM)
            want = expected(logits, TOKENS[text, : i + 1].tolist(), top) @ value[text, group, : i + 1]
            np.testing.assert_allclose(seen["output"][text, i, head].numpy(), want, rtol=0, atol=1e-12)


def test_logits_far_apart_leave_every_section_its_own_softmax() -> None:
    logits = torch.tensor([500.0, 501.0, 0.0, -900.0, -900.0, 1.0, 0.0])
    is_mark = torch.tensor([False, False, True, False, False, True, False])
    got = grouped_softmax(logits[None, None, None], torch.ones(1, 1, 1, 7, dtype=torch.bool), is_mark, None).flatten()
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got[3], got[4])
    torch.testing.assert_close(got[3], torch.tensor(float(np.e / (2 + np.e) / 2)))


@torch.no_grad()
def test_the_start_is_the_model_and_without_landmarks_it_stays() -> None:
    plain, model = tiny_llama(), live(blend=0.0)
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=0, atol=1e-10)
    without = TOKENS.where(TOKENS != MARK, 10)
    model = live()
    torch.testing.assert_close(model(without).logits, plain(without).logits, rtol=0, atol=1e-10)
    assert not torch.allclose(model(TOKENS).logits, plain(TOKENS).logits)
    logits = torch.randn(1, 2, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), rows.HIDDEN)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    weights = grouped_softmax(logits, seen, torch.zeros(1, 1, 1, 5, dtype=torch.bool), None)
    assert torch.equal(weights, logits.softmax(-1) * seen)


@pytest.mark.parametrize("chunks", [[14], [6, 5, 1, 1, 1]], ids=str)
@torch.no_grad()
def test_padding_in_one_call_or_in_chunks(chunks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, mask = live(top=2), torch.ones(2, 14, dtype=torch.long)
    mask[0, :2] = 0
    tokens = torch.cat([torch.tensor([[17, MARK], [5, 6]]), TOKENS], dim=1)  # padding may be of any token
    places, cache, parts = (mask.cumsum(-1) - 1).clamp(min=0), None, []
    for end, size in zip(np.cumsum(chunks), chunks, strict=True):
        of = slice(end - size, end)
        given = {"input_ids": tokens[:, of], "attention_mask": mask[:, :end], "position_ids": places[:, of]}
        found = model(**given, use_cache=True, **cache_argument(model, cache))
        cache = found.past_key_values
        parts.append(found.logits)
    monkeypatch.setattr(rows, "_ENTRIES", 200)  # rows in chunks, too
    for text, real, got in zip(tokens, mask.bool(), torch.cat(parts, dim=1), strict=True):
        close(got[real], model(text[real][None]).logits[0])


def test_gradients_reach_the_share_and_pass_landmarks() -> None:
    model = live(blend=0.25)
    embedded: dict[str, torch.Tensor] = {}

    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded["of"] = output

    model.get_input_embeddings().register_forward_hook(keep)
    model(TOKENS).logits[0, -1].square().sum().backward()
    assert bool((model.model.layers[0].self_attn.patchattn.landmark.blend.grad.abs() > 0).all())
    assert bool((embedded["of"].grad[0].abs().amax(-1) > 0).all())


@torch.no_grad()
def test_images_and_texts_are_told_apart_by_their_ids() -> None:
    model, plain = FAMILIES["llava"].make().double(), FAMILIES["llava"].make().double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in FAMILIES["llava"].inputs().items()}
    patchattn.patch_model(model, "landmark", token=24, blend=None, modules="language_model")
    got, base = outputs(model, **inputs)[0], outputs(plain, **inputs)[0]
    close(got[0], base[0])  # the first text has no landmark
    assert not torch.allclose(got[1, -1], base[1, -1])


def test_landmarks_are_put_into_texts() -> None:
    found = insert_landmarks([1, 2, 3, 4, 5], token=0, every=2)
    assert found == ([1, 2, 0, 3, 4, 0, 5], [1, 2, IGNORED, 3, 4, IGNORED, 5])
    assert insert_landmarks(torch.tensor([1, 2]), token=0, every=2).input_ids == [1, 2]  # none ends a text
    with pytest.raises(ValueError, match="has the landmark token 2 already, at 1"):
        insert_landmarks([1, 2], token=2)
    with pytest.raises(ValueError, match="every must be 1 or more tokens, got 0"):
        insert_landmarks([1], token=2, every=0)


@torch.no_grad()
def test_generated_texts_have_landmarks_where_prompts_would() -> None:
    model = live()
    model.generation_config.eos_token_id = None
    whole = [3, 7, 1, 4]
    prompts = [insert_landmarks(whole, token=MARK, every=3).input_ids, insert_landmarks([2], token=MARK, every=3)[0]]
    padded = torch.tensor([prompts[0], [49] * 4 + prompts[1]])
    processor = LandmarkProcessor(token=MARK, every=3, padding=49)
    given = {"attention_mask": (padded != 49).long(), "max_new_tokens": 9, "do_sample": False, "pad_token_id": 49}
    got = model.generate(padded, logits_processor=[processor], **given)
    for text, prompt in zip(got.tolist(), prompts, strict=True):
        text = text[len(padded[0]) - len(prompt) :]
        assert 49 not in text
        assert text == insert_landmarks([each for each in text if each != MARK], token=MARK, every=3).input_ids
        alone = model.generate(
            torch.tensor([prompt]), logits_processor=[processor], **{**given, "attention_mask": None}
        )
        assert alone[0].tolist() == text
    with pytest.raises(ValueError, match="Padding and the landmark are the same token, 9"):
        LandmarkProcessor(token=MARK, padding=MARK)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"landmark needs token=\.\.\.: the id of the landmark token"):
        patchattn.patch_model(tiny_llama(), "landmark")
    with pytest.raises(ValueError, match=r"token=50 is no id of LlamaForCausalLM, which embeds 50: add the landmark"):
        patchattn.patch_model(tiny_llama(), "landmark", token=50)
    with pytest.raises(NotImplementedError, match="does not support bidirectional or cross"):
        patchattn.patch_model(FAMILIES["bert"].make(), "landmark", token=9)
    with pytest.raises(NotImplementedError, match="leaves out layers with a sliding window"):
        patchattn.patch_model(FAMILIES["mistral"].make(), "landmark", token=9)
    model = live()
    with pytest.raises(NotImplementedError, match="landmark needs input_ids to know what its tokens are"):
        model(inputs_embeds=model.get_input_embeddings()(TOKENS))
    model = patchattn.patch_model(
        tiny_llama(), ["knorm", "landmark"], {"knorm": {"budget": 4}, "landmark": {"token": 9}}
    )
    with pytest.raises(NotImplementedError, match=r"landmark .* remembers something of every key and cannot go on"):
        model(TOKENS, use_cache=True)
