"""FastV against its masking form: an unpatched model that hides the dropped tokens' keys from a layer on."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

import patchattn
from patchattn.core.kv_caches import cache_argument, find_cache
from patchattn.decoding.answering import prompt_goes_on

from . import vlms
from .test_decoding import decode, extended
from .test_pai import two_images

F64 = torch.float64


@contextmanager
def hiding(model: Any, columns: Sequence[Sequence[int]], first: int, seen: dict[int, torch.Tensor]) -> Iterator[Any]:
    """The unpatched model, without these columns of each sequence from a layer on; its weights by layer in `seen`."""

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        visible = torch.ones(len(query), 1, query.shape[2], key.shape[2], dtype=torch.bool)
        if attention_mask is not None:
            visible = visible & (attention_mask > -1e30)
        if getattr(module, "hides", False):
            for row, hidden in enumerate(columns):
                visible[row, :, :, list(hidden)] = False
        logits = (query @ key.mT * kwargs["scaling"]).masked_fill(~visible, -1e300)
        weights = logits.softmax(-1) * visible
        if hasattr(module, "number"):
            seen[module.number] = weights
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register("hiding", attend)
    AttentionMaskInterface.register("hiding", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    twin: Any = copy.deepcopy(model)
    twin.set_attn_implementation("hiding")
    for number, layer in enumerate(twin.get_decoder().layers):
        layer.self_attn.number, layer.self_attn.hides = number, number >= first
    try:
        yield twin
    finally:
        AttentionInterface._global_mapping.pop("hiding")
        AttentionMaskInterface._global_mapping.pop("hiding")


@torch.no_grad()
def dropped(model: Any, given: dict[str, torch.Tensor], layer: int, ratio: float) -> list[list[int]]:
    """Which columns of each sequence are dropped, ranked one by one."""
    seen: dict[int, torch.Tensor] = {}
    with hiding(model, [], 99, seen) as twin:
        twin(**given, use_cache=False)
    last, found = seen[layer - 1][:, :, -1].mean(1), []
    for row, ids in enumerate(given["input_ids"].tolist()):
        image = [place for place, token in enumerate(ids) if token == vlms.IMAGE]
        ranked = sorted(image, key=lambda place: -float(last[row, place]))
        found.append(ranked[round((1 - ratio) * len(image)) :])
    return found


@torch.no_grad()
def expected(model: Any, given: dict[str, torch.Tensor], columns: list[list[int]], first: int) -> torch.Tensor:
    with hiding(model, columns, first, {}) as twin:
        return twin(**given, use_cache=False).logits[:, -1]


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def deep(name: str) -> Any:
    """A model of four layers: two more of the same kind."""
    model: Any = vlms.make(name, dtype=F64)
    decoder = model.get_decoder()
    for number in (2, 3):
        layer = copy.deepcopy(decoder.layers[number - 2])
        layer.self_attn.layer_idx, layer.self_attn.config = number, decoder.layers[0].self_attn.config
        decoder.layers.append(layer)
    text = model.config.get_text_config()
    text.num_hidden_layers = 4
    if getattr(text, "layer_types", None):
        text.layer_types = [*text.layer_types, *text.layer_types]
    return model


@pytest.fixture(scope="module")
def llava() -> Any:
    return deep("llava")


@pytest.mark.parametrize(
    ("name", "layer", "ratio"), [("llava", 2, 0.5), ("llava", 1, 0.75), ("qwen2_5_vl", 2, 0.5), ("llava_next", 3, 1.0)]
)
def test_every_step_of_a_padded_batch(name: str, layer: int, ratio: float) -> None:
    """Images of different sizes, so that rows keep other numbers of tokens."""
    model, given = deep(name), vlms.inputs(name, dtype=F64)
    columns = dropped(model, given, layer, ratio)
    sizes: list[list[int]] = [[] for _ in range(4)]
    with patchattn.patched(model, "fastv", layer=layer, ratio=ratio):
        tokens, steps = decode(model, given, max_new_tokens=4)
        assert torch.equal(decode(model, given, max_new_tokens=4)[1], steps)
        handles = [
            block.mlp.register_forward_hook(lambda _m, args, _o, of=sizes[number]: of.append(args[0].shape[1]))
            for number, block in enumerate(model.get_decoder().layers)
        ]
        with torch.no_grad():
            assert model(**given).logits.shape[1] == given["input_ids"].shape[1]
        for handle in handles:
            handle.remove()
    length = given["input_ids"].shape[1]
    left = length - min(map(len, columns))
    assert sizes == [[length]] * layer + [[left]] * (4 - layer)  # what is dropped is not computed
    for count in (0, 1, 3):
        whole = extended(given, tokens[:, :count])
        want = expected(model, whole, columns, layer)
        same(steps[:, count], want)
        with torch.no_grad():
            assert float((model(**whole).logits[:, -1] - want).abs().max()) > 1e-4


def test_two_images_caches_and_a_second_turn(llava: Any) -> None:
    given = two_images()
    columns, length = dropped(llava, given, 2, 0.5), given["input_ids"].shape[1]
    assert len(columns[0]) == 16
    with patchattn.patched(llava, "fastv"), torch.no_grad():
        first = llava.generate(**given, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        cache = find_cache(first.values())
        assert [layer.get_seq_length() for layer in cache.layers] == [length + 1] * 4
        assert [layer.keys.shape[2] for layer in cache.layers] == [length + 1] * 2 + [length - 15] * 2
        more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
        asked = {"input_ids": more, "attention_mask": torch.ones_like(more)}
        second = llava.generate(
            **asked,
            **cache_argument(llava, cache),
            max_new_tokens=2,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    new = second.sequences[:, length:]
    for count in range(2):
        same(second.logits[count], expected(llava, extended(given, new[:, : 5 + count]), columns, 2))


def test_without_a_cache_tokens_are_ranked_anew(llava: Any) -> None:
    given = vlms.single(vlms.inputs("llava", dtype=F64), 0)
    with patchattn.patched(llava, "fastv"):
        tokens, steps = decode(llava, given, max_new_tokens=4, use_cache=False)
    for count in range(4):
        whole = extended(given, tokens[:, :count])
        same(steps[:, count], expected(llava, whole, dropped(llava, whole, 2, 0.5), 2))


def test_beams_follow_their_caches(llava: Any) -> None:
    given = vlms.inputs("llava", dtype=F64)
    how = {"num_beams": 3, "max_new_tokens": 3, "do_sample": False, "length_penalty": 0.0}
    with patchattn.patched(llava, "fastv"):
        found = llava.generate(**given, **how, return_dict_in_generate=True, output_scores=True)
    tokens, columns, score = found.sequences[:, -3:], dropped(llava, given, 2, 0.5), torch.zeros(2, dtype=F64)
    for count in range(3):
        step = expected(llava, extended(given, tokens[:, :count]), columns, 2).log_softmax(-1)
        score += step.gather(-1, tokens[:, count : count + 1])[:, 0]
    torch.testing.assert_close(found.sequences_scores.double(), score, rtol=1e-4, atol=1e-4)


def test_everything_kept_is_the_model_bit_for_bit(llava: Any) -> None:
    given = vlms.inputs("llava", dtype=F64)
    want = decode(llava, given)[1]
    with patchattn.patched(llava, "fastv", ratio=0.01):
        assert torch.equal(decode(llava, given)[1], want)


def test_eager_and_sdpa_and_another_variant_behind_it(llava: Any) -> None:
    given = vlms.single(vlms.inputs("llava", dtype=F64), 1)
    eager = copy.deepcopy(llava)
    eager.set_attn_implementation("eager")
    found = []
    for model in (llava, eager):
        with (
            patchattn.patched(model, ["fastv", "sink"], {"sink": {"initial_logit": 2.0}}, modules="language"),
            torch.no_grad(),
        ):
            found.append(model(**given).logits[:, -1])
        with patchattn.patched(model, "fastv"), torch.no_grad():
            found.append(model(**given).logits[:, -1])
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-6, atol=1e-6)
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_rows_of_other_numbers_of_images_without_padding(llava: Any) -> None:
    """sdpa is then given no mask, which could hide empty slots."""
    both = two_images()
    ids = both["input_ids"].repeat(2, 1)
    ids[1, 20:36] = torch.arange(3, 19)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": both["pixel_values"][[0, 1, 0]]}
    eager = copy.deepcopy(llava)
    eager.set_attn_implementation("eager")
    with patchattn.patched(eager, "fastv"), torch.no_grad():
        got = eager(**given).logits[:, -1]
    same(got, expected(llava, given, dropped(llava, given, 2, 0.5), 2))
    with (
        patchattn.patched(llava, "fastv"),
        torch.no_grad(),
        pytest.raises(NotImplementedError, match="leaves other numbers of tokens in different rows"),
    ):
        llava(**given)


def test_what_is_refused(llava: Any) -> None:
    given = vlms.single(vlms.inputs("llava", dtype=F64), 1)
    ids, image = given["input_ids"], {"pixel_values": given["pixel_values"]}
    with pytest.raises(ValueError, match=r"from layer 4 on, and model.language_model has 4"):
        patchattn.patch_model(llava, "fastv", layer=4)
    with patchattn.patched(llava, "fastv"), torch.no_grad():
        with prompt_goes_on(), pytest.raises(NotImplementedError, match="the prompt must come in one call"):
            llava(input_ids=ids[:, :19], **image)
        cache = cache_argument(llava, find_cache(llava(input_ids=ids[:, :19], use_cache=True, **image).values()))
        with pytest.raises(ValueError, match="now more than one token follows"):
            llava(input_ids=ids[:, 19:22], **cache)
        cache = cache_argument(llava, find_cache(llava(input_ids=ids[:, :2], use_cache=True).values()))
        with pytest.raises(NotImplementedError, match="images came behind cached tokens"):
            llava(input_ids=ids[:, 2:], **cache, **image)
