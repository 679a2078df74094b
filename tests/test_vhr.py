"""VHR against an unpatched model whose output projections are hooked, and a run of the text alone."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.core.kv_caches import cache_argument, find_cache
from patchattn.decoding.answering import prompt_goes_on
from patchattn.variants.gating.vhr import vision_divergence

from . import vlms
from .test_decoding import decode, extended
from .test_pai import two_images

F64 = torch.float64
HEADS = 4


def chosen(with_image: np.ndarray, text: np.ndarray) -> set[int]:
    """Of one sequence's heads `(H, D)`, head by head."""
    distance = [float(np.sqrt(((a - b) ** 2).sum())) for a, b in zip(with_image, text, strict=True)]
    size = [float((b**2).sum()) for b in text]

    def far(values: list[float], i: int) -> bool:
        return values[i] > statistics.mean(values) + statistics.stdev(values)

    kept = [0.0 if far(distance, i) and far(size, i) else one for i, one in enumerate(distance)]
    return {i for i, one in enumerate(kept) if one > sorted(kept)[(len(kept) - 1) // 2]}


@contextmanager
def hooked(model: Any, layers: list[int], hook: Any) -> Iterator[None]:
    """`hook(layer, heads (B, T, H, D))` on what enters output projections, which it may change in place."""

    def of(layer: int) -> Any:
        def before(module: Any, args: Any) -> Any:
            heads = args[0].clone().unflatten(-1, (HEADS, -1))
            hook(layer, heads)
            return (heads.flatten(-2),)

        return before

    decoder = model.get_decoder().layers
    handles = [decoder[number].self_attn.o_proj.register_forward_pre_hook(of(number)) for number in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def expected(
    model: Any, given: dict[str, torch.Tensor], new: torch.Tensor, alpha: float, layers: list[int]
) -> tuple[torch.Tensor, dict[tuple[int, int], set[int]]]:
    """`(B, V)` logits behind prompts and new tokens `(B, n)`, and the heads of every layer and sequence."""
    ids, real = given["input_ids"], given["attention_mask"].bool()
    of_text: dict[tuple[int, int], np.ndarray] = {}
    for row in range(len(ids)):
        text = ids[row, real[row] & (ids[row] != vlms.IMAGE)][None]
        with hooked(model, layers, lambda n, h, row=row: of_text.update({(n, row): h[0, -1].numpy().copy()})):
            model(input_ids=text)
    found: dict[tuple[int, int], set[int]] = {}

    def scale(layer: int, heads: torch.Tensor) -> None:
        for row in range(len(ids)):
            found[layer, row] = chosen(heads[row, ids.shape[1] - 1].numpy(), of_text[layer, row])
            for head in found[layer, row]:
                heads[row, ids.shape[1] - 1 :, head] *= alpha

    with hooked(model, layers, scale):
        return model(**extended(given, new), use_cache=False).logits[:, -1], found


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def llava() -> Any:
    return vlms.make("llava", dtype=F64)


@pytest.mark.parametrize(
    ("name", "settings", "alpha", "layers"),
    [
        ("llava", {"last_layers": 2}, 2.0, [0, 1]),
        ("llava", {"last_layers": 0, "alpha": 3.0}, 3.0, [1]),
        ("qwen2_5_vl", {"last_layers": 2}, 2.0, [0, 1]),
    ],
)
def test_every_step_of_a_padded_batch(name: str, settings: dict[str, Any], alpha: float, layers: list[int]) -> None:
    """From the prompt's last token on, by heads that are chosen there and stay."""
    model, given = vlms.make(name, dtype=F64), vlms.inputs(name, dtype=F64)
    with patchattn.patched(model, "vhr", **settings):
        tokens, steps = decode(model, given, max_new_tokens=4)
        assert torch.equal(decode(model, given, max_new_tokens=4)[1], steps)
    for count in (0, 1, 3) if name == "llava" else (0,):
        want, heads = expected(model, given, tokens[:, :count], alpha, layers)
        assert 0 < sum(map(len, heads.values())) < HEADS * len(heads)
        same(steps[:, count], want)
        with torch.no_grad():
            assert float((model(**extended(given, tokens[:, :count])).logits[:, -1] - want).abs().max()) > 1e-3


def test_two_images_and_beams(llava: Any) -> None:
    given = two_images()
    want, _ = expected(llava, given, torch.zeros(1, 0, dtype=torch.long), 2.0, [0, 1])
    with patchattn.patched(llava, "vhr", last_layers=2), torch.no_grad():
        same(llava(**given).logits[:, -1], want)
    given = vlms.single(vlms.inputs("llava", dtype=F64), 0)  # 5.17 repeats two images of a row for beams in disorder
    with patchattn.patched(llava, "vhr", last_layers=2):
        tokens = llava.generate(**given, num_beams=3, max_new_tokens=3, do_sample=False)[:, -3:]
        greedy = llava.generate(**given, max_new_tokens=6, do_sample=False)
        assert torch.equal(
            greedy, llava.generate(**given, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)
        )
    with patchattn.patched(llava, "vhr", last_layers=2), torch.no_grad():
        score = 0.0
        for count in range(3):
            steps, _ = _unpatched(llava, given, tokens[:, :count])
            score += float(steps.log_softmax(-1)[0, tokens[0, count]])
        result = llava.generate(
            **given,
            num_beams=3,
            max_new_tokens=3,
            do_sample=False,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    assert float(result.sequences_scores[0]) == pytest.approx(score, abs=1e-4)


def _unpatched(model: Any, given: dict[str, torch.Tensor], new: torch.Tensor) -> Any:
    with patchattn.unpatched(model):
        return expected(model, given, new, 2.0, [0, 1])


def test_the_choice_of_heads() -> None:
    rng = np.random.default_rng(0)
    for heads in (2, 4, 7, 32):
        text = rng.normal(size=(3, heads, 5))
        text[:, 0] *= 9.0
        image = text + rng.normal(size=text.shape) * 0.1
        image[:, 0] += 20.0  # an outlier in both
        divergence = vision_divergence(torch.from_numpy(image), torch.from_numpy(text))
        found = divergence > divergence.median(-1, keepdim=True).values
        for row in range(3):
            assert set(found[row].nonzero().flatten().tolist()) == chosen(image[row], text[row])
    assert not bool(divergence[:, 0].any())  # of 32 heads it stands out


def test_an_image_without_effect_selects_no_head() -> None:
    same_heads = torch.randn(2, 8, 5, dtype=F64)
    divergence = vision_divergence(same_heads, same_heads)
    assert not bool((divergence > divergence.median(-1, keepdim=True).values).any())


def test_text_alone_is_as_it_was(llava: Any) -> None:
    given = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    want = decode(llava, given)
    with patchattn.patched(llava, "vhr", last_layers=2):
        for got, wanted in zip(decode(llava, given), want, strict=True):
            assert torch.equal(got, wanted)


def test_prompts_in_pieces_and_late_images_are_refused(llava: Any) -> None:
    given = vlms.single(vlms.inputs("llava", dtype=F64), 1)
    ids, image = given["input_ids"], {"pixel_values": given["pixel_values"]}
    with patchattn.patched(llava, "vhr", last_layers=2), torch.no_grad():
        with prompt_goes_on(), pytest.raises(NotImplementedError, match="the prompt must come in one call"):
            llava(input_ids=ids[:, :19], use_cache=True, **image)
        cache = cache_argument(llava, find_cache(llava(input_ids=ids[:, :19], use_cache=True, **image).values()))
        with pytest.raises(ValueError, match="now more than one token follows"):
            llava(input_ids=ids[:, 19:22], **cache)
        cache = cache_argument(llava, find_cache(llava(input_ids=ids[:, :2], use_cache=True).values()))
        with pytest.raises(NotImplementedError, match="images came behind cached tokens"):
            llava(input_ids=ids[:, 2:], **cache, **image)
    with pytest.raises(ValueError, match="leaves all of the chosen layers alone"):
        patchattn.patch_model(llava, "vhr", last_layers=0, second_layer=False)
