"""Appending in place: as transformers' layer to the bit, without its copies, and nobody's tensors are touched."""

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from patchattn.cache.memory import held_bytes
from patchattn.cache.tracked import TrackedLayer, sequence_state, track

OWNER = "toy in layer 0"


def some(batch: int, rows: int, heads: int = 2, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, heads, rows, width), torch.randn(batch, heads, rows, width + 1)


def filled(*rows: int, batch: int = 2) -> Any:
    layer: Any = track(DynamicLayer())
    with torch.no_grad():
        for count in rows:
            layer.update(*some(batch, count))
    return layer


def test_it_stores_what_transformers_layer_stores() -> None:
    layer, plain = filled(), DynamicLayer()
    with torch.no_grad():
        for rows in (5, 1, 1, 300, 1, 1, 700, 1):
            new = some(2, rows)
            for ours, theirs in zip(layer.update(*new), plain.update(*new), strict=True):
                assert torch.equal(ours, theirs)
            assert isinstance(layer, type(plain))
            assert layer.get_seq_length() == plain.get_seq_length()
            assert layer.get_mask_sizes(3) == plain.get_mask_sizes(3)
            assert layer.get_max_length() == plain.get_max_length()
            layer.crop(-1)
            plain.crop(-1)
            assert torch.equal(layer.keys, plain.keys)


@pytest.mark.parametrize(("prompt", "spare"), [(10, 256), (4096, 575), (20_000, 1055)])
def test_tokens_are_copied_once_in_so_many(prompt: int, spare: int) -> None:
    """Of long texts so many are spare that a head takes up a multiple of 64."""
    layer = filled(prompt, batch=1)
    places = []
    with torch.no_grad():
        for _ in range(spare + 3):
            held = layer.update(*some(1, 1))
            assert held[0] is layer.keys
            places.append(tuple(tensor.untyped_storage().data_ptr() for tensor in held))
    assert len(set(places[: spare + 1])) == 1
    assert len(set(places)) == 2


def test_keys_and_values_alike_are_in_one_piece_of_memory() -> None:
    layer, plain = track(DynamicLayer()), DynamicLayer()
    with torch.inference_mode():
        for rows in (40, 1, 3, 1, 400, 1):
            new = torch.randn(2, 2, 3, rows, 5).unbind()
            layer.update(*new)
            plain.update(*new)
            assert torch.equal(layer.keys, plain.keys)
            assert torch.equal(layer.values, plain.values)
    assert layer.keys.untyped_storage().data_ptr() == layer.values.untyped_storage().data_ptr()
    assert held_bytes(layer) == 2 * 2 * 3 * (45 + 400 + 256) * 5 * 4
    assert held_bytes(pickle.loads(pickle.dumps(layer))) == 2 * 2 * 3 * 446 * 5 * 4


def test_spare_places_are_counted_as_memory() -> None:
    layer, size = filled(10), 2 * 2 * (3 + 4) * 4  # bytes of a token: rows, heads, both widths, float32
    assert held_bytes(layer) == 10 * size
    with torch.no_grad():
        layer.update(*some(2, 1))
    assert held_bytes(layer) == (10 + 1 + 256) * size
    state = sequence_state(layer, OWNER, rows=11, rewinds=True)
    assert state is not None
    state.write("fact", torch.zeros(2, 1, 11, dtype=torch.float64), per_key=True)
    assert held_bytes(layer) == (10 + 1 + 256) * size + 2 * 11 * 8
    assert held_bytes(pickle.loads(pickle.dumps(layer))) == 11 * size + 2 * 11 * 8
    cache = DynamicCache()
    cache.layers = [layer, filled(7)]
    assert held_bytes(cache) == (10 + 1 + 256 + 7) * size + 2 * 11 * 8


def test_dropped_keys_give_their_memory_back() -> None:
    layer, size = filled(64), 2 * 2 * (3 + 4) * 4
    layer.keep(torch.arange(64).expand(2, 1, -1) >= 60, owner=OWNER, bound=4, slack=0)
    assert layer.keys.shape[2] == 4
    assert held_bytes(layer) == 4 * size + 2 * 4 * 4  # an int32 of each key of a row


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_forks_do_not_see_each_other(how: Any) -> None:
    layer = filled(5, 1)
    fork = how(layer)
    before = layer.keys.clone()
    with torch.no_grad():
        for one in (layer, fork):
            new = some(2, 1)
            keys, _ = one.update(*new)
            assert torch.equal(keys, torch.cat([before, new[0]], dim=2))
    assert type(fork) is type(layer)
    assert not torch.equal(layer.keys, fork.keys)


def test_a_copied_cache_and_its_layers_by_hand() -> None:
    layer = filled(5, 1)
    cache = DynamicCache([(layer.keys, layer.values)])
    before = cache.layers[0].keys.clone()
    layer.crop(-2)
    with torch.no_grad():
        layer.update(*some(2, 3))
    assert torch.equal(cache.layers[0].keys, before)


def test_gradients_flow_as_through_transformers_layer() -> None:
    states = [tuple(tensor.requires_grad_() for tensor in some(2, rows)) for rows in (4, 1, 1)]
    found = []
    for layer in (track(DynamicLayer()), DynamicLayer()):
        total: Any = 0
        for new in states:
            keys, values = layer.update(*new)
            total = total + keys.square().sum() * values.sin().sum()  # kept for the backward pass
        found.append(torch.autograd.grad(total, [tensor for new in states for tensor in new]))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_what_a_backward_pass_needs_is_not_written_to() -> None:
    """A query that learns attends to a cache that does not; tokens go on before the backward pass."""
    layer, query = filled(5, 1), torch.randn(2, 2, 1, 3, requires_grad=True)
    output = (query @ layer.keys.mT).softmax(-1) @ layer.values
    layer.update(*some(2, 1))
    output.sum().backward()
    assert query.grad is not None


def test_inference_mode_may_come_and_go() -> None:
    layer = filled(5)
    expected = [layer.keys]
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            new = some(2, 1)
            layer.update(*new)
            expected.append(new[0])
    assert torch.equal(layer.keys, torch.cat(expected, dim=2))


def test_another_dtype_is_promoted_as_by_transformers() -> None:
    layer, plain = filled(), DynamicLayer()
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32):
            new = tuple(tensor.to(dtype) for tensor in some(2, 2))
            layer.update(*new)
            plain.update(*new)
    assert layer.keys.dtype == plain.keys.dtype == torch.float32
    assert torch.equal(layer.keys, plain.keys)


def test_a_compiled_update_equals_a_plain_one() -> None:
    layer, plain = filled(5, 1), DynamicLayer()
    plain.update(layer.keys.clone(), layer.values.clone())

    @torch.compile(fullgraph=True, backend="eager")
    def step(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return layer.update(keys, values)[0] * 1

    with torch.no_grad():
        for _ in range(3):
            new = some(2, 1)
            assert torch.equal(step(layer, *new), plain.update(*new)[0])
        new = some(2, 1)
        assert torch.equal(layer.update(*new)[0], plain.update(*new)[0])


def test_a_reset_layer_leaves_what_it_handed_out() -> None:
    layer = filled(5, 1)
    held, before = layer.keys, layer.keys.clone()
    layer.reset()
    assert layer.get_seq_length() == 0
    assert torch.equal(held, before)
    with torch.no_grad():
        layer.update(*some(3, 2))
    assert layer.keys.shape == (3, 2, 2, 3)


def test_only_a_dynamic_layer_forgets() -> None:
    sliding: Any = track(DynamicSlidingWindowLayer(sliding_window=4))
    static: Any = track(StaticLayer(max_cache_len=8))
    for layer, name in ((sliding, "DynamicSlidingWindowLayer"), (static, "StaticLayer")):
        layer.update(*some(2, 3))
        assert isinstance(layer, TrackedLayer)
        with pytest.raises(
            NotImplementedError,
            match=f"drops keys, or parts of them, which {name} cannot follow: use a dynamic kv cache",
        ):
            layer.keep(torch.ones(2, 1, 3, dtype=torch.bool), owner=OWNER)
        state = sequence_state(layer, OWNER, rows=3, rewinds=True)
        assert state is not None
        with pytest.raises(NotImplementedError, match="reads keys by pages"):
            state.blocks("mean", 2, layer.keys, lambda keys, _: keys)


def test_one_owner_drops_keys_and_nobody_counts_them() -> None:
    layer = filled(6)
    everything = torch.ones(2, 1, 6, dtype=torch.bool)
    layer.keep(everything, owner=OWNER)
    with pytest.raises(NotImplementedError, match=f"another in layer 0 was to drop keys .* from which {OWNER} drops"):
        layer.keep(everything, owner="another in layer 0")
    layer = filled(6)
    state = sequence_state(layer, "act in layer 0", rows=6, rewinds=False)
    assert state is not None
    state.write("mass", torch.zeros(2, 4, 6), per_key=True)
    with pytest.raises(NotImplementedError, match=f"act in layer 0 remembers something of every key .* where {OWNER}"):
        layer.keep(everything, owner=OWNER)
    assert layer.kept is None
    assert layer.get_seq_length() == 6


@pytest.mark.parametrize(
    ("counts", "slack", "has_empty"), [([9, 9, 9, 9], 0, False), ([9, 9, 9, 9], 4, True), ([9, 8, 9, 9], 0, True)]
)
def test_it_knows_whether_slots_are_empty_or_keys_hidden(counts: list[int], slack: int, has_empty: bool) -> None:
    layer, places = filled(40), torch.arange(40)
    assert not layer.has_empty
    layer.keep(places >= 40 - torch.tensor(counts).view(2, 2, 1), owner=OWNER, slack=slack)
    layer.is_expected = True
    with torch.no_grad():
        layer.update(*some(2, 1))
    assert layer.has_empty == has_empty == bool((layer.columns() < 0).any())


def test_what_keep_is_told_is_checked() -> None:
    layer = filled(6)
    kept = torch.ones(2, 1, 6, dtype=torch.bool)
    for wrong in (kept.long(), kept[..., :5], kept[:1], kept[:, 0]):
        with pytest.raises(ValueError, match=r"which of 6 keys to keep is told by bools .* \(2, 1 or 2, 6\)"):
            layer.keep(wrong, owner=OWNER)
    with pytest.raises(NotImplementedError, match="attention has 3 where its kv cache stores 2"):
        layer.keep(kept.expand(-1, 3, -1), owner=OWNER)
    with pytest.raises(ValueError, match="slack, since and bound must not be negative"):
        layer.keep(kept, owner=OWNER, slack=-1)
    with pytest.raises(ValueError, match="At most 4 keys per row and head may be kept, but 6 are"):
        layer.keep(kept, owner=OWNER, bound=4, slack=0)
    with pytest.raises(ValueError, match="has none yet"):
        track(DynamicLayer()).keep(kept, owner=OWNER)


def test_per_key_state_has_a_dimension_of_heads() -> None:
    state = sequence_state(filled(6), OWNER, rows=6, rewinds=True)
    assert state is not None
    with pytest.raises(ValueError, match=r"as \(B, h, Tk\), got the shape \(2, 6\)"):
        state.write("mark", torch.zeros(2, 6), per_key=True)


def test_pages_are_made_once() -> None:
    layer, made = filled(7), []

    def mean(keys: torch.Tensor, part: slice) -> torch.Tensor:
        made.append(keys.shape[2] // 2)
        assert torch.equal(keys, layer.keys[:, :, part])
        return keys.unflatten(2, (-1, 2)).mean(dim=3)

    state = sequence_state(layer, OWNER, rows=7, rewinds=True)
    assert state is not None
    with torch.no_grad():
        for rows, removed in ((1, 0), (1, 0), (3, 3), (2, 0), (1, 8)):
            found = state.blocks("mean", 2, layer.keys, mean)
            expected = [layer.keys[:, :, i : i + 2].mean(dim=2) for i in range(0, layer.keys.shape[2] - 1, 2)]
            assert found is not None
            assert torch.equal(found, torch.stack(expected, dim=2))
            layer.update(*some(2, rows))
            layer.crop(-removed)
    assert made == [3, 1, 1]
    layer.crop(-2)
    assert layer.get_seq_length() == 2
    with pytest.raises(ValueError, match="'mean' of 1 pages of 2 keys, got 0 pages of 3"):
        state.blocks("mean", 3, layer.keys, mean)


def test_heads_apart_keep_other_keys_and_follow() -> None:
    """Heads 1 and 2 of 4 forget all but the first and the last two keys; the others keep all."""
    layer: Any = track(DynamicLayer())
    text, batch = torch.randn(3, 4, 12, 3), torch.arange(3)
    with torch.no_grad():
        layer.update(text[:, :, :5], text[:, :, :5])
        other = layer.set_apart([2, 1], owner=OWNER)
        for end in range(6, 10):
            layer.is_expected = True  # as the chain of a patched model says
            held, _ = layer.update(text[batch, :, end - 1 : end], text[batch, :, end - 1 : end])
            assert torch.equal(held, text[batch][:, [0, 3], :end])
            columns = other.columns()
            columns = torch.arange(end).expand(3, 1, -1) if columns is None else columns
            other.keep((columns < 1) | (columns >= end - 2), owner=OWNER, bound=3, slack=2)
            shown = other.columns() >= 0
            assert torch.equal(
                other.keys[shown.expand(-1, 2, -1)].view(3, 2, 3, 3),
                text[batch][:, [1, 2]][:, :, [0, end - 2, end - 1]],
            )
            if end == 7:
                batch = batch[torch.tensor([2, 0, 0])]
                layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert layer.get_seq_length() == other.get_seq_length() == 9
    assert other.keys.shape[2] < 9
    twin = copy.deepcopy(layer)
    layer.crop(-2)
    assert layer.get_seq_length() == other.get_seq_length() == 7
    assert twin.apart[1].get_seq_length() == 9
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([5, 1]))
    assert torch.equal(other.keys[..., -1, :], text[batch[[2, 0]]][:, [1, 2], 6])
    assert held_bytes(layer) > sum(t.nbytes for t in (layer.keys, layer.values, other.keys, other.values))
    with pytest.raises(NotImplementedError, match="cannot take back the last 5"):
        layer.crop(-5)
    assert layer.get_seq_length() == 7
    layer.reset()
    assert layer.apart is None


def test_only_some_heads_can_be_set_apart() -> None:
    for heads in ([], [0, 1], [2]):
        with pytest.raises(ValueError, match="some of 2 kv heads"):
            filled(3).set_apart(heads, owner=OWNER)
    layer = filled(3)
    layer.set_apart([0], owner=OWNER)
    with pytest.raises(ValueError, match="once"):
        layer.set_apart([0], owner=OWNER)
