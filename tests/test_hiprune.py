"""HiPrune against the unpatched language model on the shortened sequence, at the same positions."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.core.kv_caches import cache_argument, find_cache
from patchattn.decoding.answering import prompt_goes_on
from patchattn.variants.tokens.hiprune import chosen

from . import vlms
from .test_decoding import decode, extended
from .test_pai import two_images

F64 = torch.float64
SETTINGS = {"keep_ratio": 0.5, "alpha": 0.6, "middle_layer": 0}


def kept_of(middle: np.ndarray, deep: np.ndarray, columns: int, wanted: int, alpha: float) -> set[int]:
    """Of one picture, token by token."""
    ranked = sorted(range(len(middle)), key=lambda j: -middle[j])
    anchors = ranked[: round(wanted * alpha / 5)]
    near = set()
    for anchor in anchors:
        row, column = divmod(anchor, columns)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < len(middle) // columns and 0 <= c < columns:
                near.add(r * columns + c)
    found = anchors + sorted(near - set(anchors), key=lambda j: ranked.index(j))
    found += [j for j in sorted(range(len(deep)), key=lambda j: -deep[j]) if j not in found]
    return set(found[:wanted])


@torch.no_grad()
def shortened(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(1, T)` bool: what is left of one sequence, by the attention of the unpatched encoder."""
    tower: Any = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    maps = [
        each.mean(1).mean(1)[:, -16:].numpy()
        for each in tower(given["pixel_values"], output_attentions=True).attentions
    ]
    last = model.config.vision_feature_layer % 4 - 1  # of three layers, whose input counts as well
    sets = [kept_of(maps[0][n], maps[last][n], 4, 8, 0.6) for n in range(len(maps[0]))]
    coming = iter([j in kept for kept in sets for j in range(16)])
    return torch.tensor([[token != vlms.IMAGE or next(coming) for token in given["input_ids"][0].tolist()]])


@torch.no_grad()
def expected(model: Any, given: dict[str, torch.Tensor], kept: torch.Tensor) -> torch.Tensor:
    """`(1, V)` logits behind one sequence without padding, its new tokens kept."""
    held: dict[str, torch.Tensor] = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        held.update(embeddings=kwargs["inputs_embeds"])

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    model(**given)
    handle.remove()
    left = torch.cat([kept, torch.ones(1, given["input_ids"].shape[1] - kept.shape[1], dtype=torch.bool)], dim=1)
    places = left[0].nonzero().view(1, -1)
    alone = {"inputs_embeds": held["embeddings"][left][None], "position_ids": places, "use_cache": False}
    # Without a mask, gaps between positions would be taken for ends of packed texts.
    hidden = model.get_decoder()(**alone, attention_mask=torch.ones_like(places)).last_hidden_state
    return model.lm_head(hidden[:, -1])


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def llava() -> Any:
    return vlms.make("llava", dtype=F64)


@pytest.mark.parametrize("name", ["llava", "llava_siglip"])
def test_every_step_of_a_padded_batch(name: str) -> None:
    model, given = vlms.make(name, dtype=F64), vlms.inputs(name, dtype=F64)
    with patchattn.patched(model, "hiprune", **SETTINGS):
        tokens, steps = decode(model, given, max_new_tokens=4)
        assert torch.equal(decode(model, given, max_new_tokens=4)[1], steps)
        uncached = decode(model, given, max_new_tokens=4, use_cache=False)[1]
    torch.testing.assert_close(uncached, steps, rtol=1e-5, atol=1e-5)
    for row in range(2):
        alone = vlms.single(given, row)
        kept = shortened(model, alone)
        assert int(kept.sum()) == kept.shape[1] - 8
        for count in (0, 3):
            whole = extended(alone, tokens[row : row + 1, :count])
            same(steps[row : row + 1, count], expected(model, whole, kept))
            with torch.no_grad():
                assert float((model(**whole).logits[:, -1] - steps[row, count]).abs().max()) > 1e-3


def test_two_images_a_cache_and_pieces(llava: Any) -> None:
    """The text between images stays; what comes behind the images may come in pieces."""
    given = two_images()
    kept, ids = shortened(llava, given), given["input_ids"]
    assert int(kept.sum()) == ids.shape[1] - 16
    whole = extended(given, torch.tensor([[7, 8, 9]]))
    with patchattn.patched(llava, "hiprune", **SETTINGS), torch.no_grad():
        with prompt_goes_on():
            done = llava(**given, use_cache=True)
        cache = find_cache(done.values())
        assert [layer.get_seq_length() for layer in cache.layers] == [ids.shape[1]] * 2
        assert [layer.keys.shape[2] for layer in cache.layers] == [ids.shape[1] - 16] * 2
        now = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": whole["attention_mask"]}
        got = llava(**now, **cache_argument(llava, cache)).logits[:, -1]
    same(done.logits[:, -1], expected(llava, given, kept))
    same(got, expected(llava, whole, kept))


def test_beams_and_assisted_decoding(llava: Any) -> None:
    given = vlms.single(vlms.inputs("llava", dtype=F64), 0)
    with patchattn.patched(llava, "hiprune", **SETTINGS):
        how = {"do_sample": False, "max_new_tokens": 5}
        plain = llava.generate(**given, **how)
        assert torch.equal(plain, llava.generate(**given, **how, prompt_lookup_num_tokens=2))
        beams = [llava.generate(**given, **how, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)


def test_everything_kept_is_the_model_bit_for_bit(llava: Any) -> None:
    given = vlms.inputs("llava", dtype=F64)
    want = decode(llava, given)[1]
    with patchattn.patched(llava, "hiprune", keep_ratio=0.99, middle_layer=0):  # of 16 tokens all
        assert torch.equal(decode(llava, given)[1], want)


@pytest.mark.parametrize(("top", "first"), [(5, {5, 4, 6, 1, 9}), (3, {3, 2, 7})])
def test_the_worked_examples(top: int, first: set[int]) -> None:
    """Of 4 x 4 tokens five, one of them an anchor: at a row's end it has two neighbours."""
    middle, deep = torch.zeros(16), torch.linspace(1.0, 0.0, 16)
    middle[top] = 1.0
    found = set(chosen(middle, deep, 4, 5 / 16, 1.0).nonzero().flatten().tolist())
    assert first <= found
    assert found - first <= {0, 1}
    assert len(found) == 5


def test_the_choice() -> None:
    rng = np.random.default_rng(0)
    for rows, columns, wanted, alpha in (
        (4, 4, 8, 0.6),
        (3, 7, 10, 0.1),
        (6, 5, 3, 1.0),
        (2, 2, 4, 0.5),
        (4, 4, 0, 0.5),
    ):
        middle, deep = rng.random((2, rows * columns))
        found = chosen(torch.from_numpy(middle), torch.from_numpy(deep), columns, wanted / (rows * columns), alpha)
        assert set(found.nonzero().flatten().tolist()) == kept_of(middle, deep, columns, wanted, alpha)


def test_what_is_refused(llava: Any) -> None:
    for name in ("llava_next", "qwen2_5_vl", "instructblip"):
        with pytest.raises(NotImplementedError, match="are tiles, merged patches or queries"):
            patchattn.patch_model(vlms.make(name), "hiprune")
    with pytest.raises(ValueError, match="which has 3: set middle_layer"):
        patchattn.patch_model(llava, "hiprune")
    with pytest.raises(ValueError, match="must be attached to the attention of all of its layers"):
        patchattn.patch_model(llava, "hiprune", layers=0)
    given = vlms.single(vlms.inputs("llava", dtype=F64), 1)
    ids, image = given["input_ids"], {"pixel_values": given["pixel_values"]}
    with patchattn.patched(llava, "hiprune", **SETTINGS), torch.no_grad():
        cache = cache_argument(llava, find_cache(llava(input_ids=ids[:, :2], use_cache=True).values()))
        with pytest.raises(NotImplementedError, match="images came behind cached tokens"):
            llava(input_ids=ids[:, 2:], **cache, **image)
        cache = cache_argument(llava, find_cache(llava(**given, use_cache=True).values()))
    with pytest.raises(NotImplementedError, match="has dropped keys of this kv cache"):
        llava(input_ids=ids[:, :1], **cache)
