"""Some of the keys of a call, by number or by page, as many or unequally many in each head: against loops."""

from typing import Any

import pytest
import torch

from patchattn.core.chain import attention_call
from patchattn.core.host import find_sites
from patchattn.core.module_call import ModuleCall
from patchattn.core.places import Places, taken
from patchattn_kernels import selected_attention

from .test_masks_of_users import llama

BATCH, GROUPS, HEADS, DIM = 2, 2, 4, 8


def operands(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7 * queries + keys)
    shapes = [(BATCH, HEADS, queries, DIM), (BATCH, GROUPS, keys, DIM), (BATCH, GROUPS, keys, DIM)]
    query, key, value = (torch.randn(*shape, generator=generator) for shape in shapes)
    return query, key, value


def made(queries: int, keys: int, mask: Any = None) -> Any:
    model = llama(kv_heads=GROUPS)
    module, site = model.model.layers[0].self_attn, find_sites(model)[0]
    return attention_call(ModuleCall(module, *operands(queries, keys), mask, {}), site, "sdpa")


def meant(places: Places, keys: int) -> list[list[list[int]]]:
    """By sequence and kv head, which keys."""
    found = []
    for batch in range(BATCH):
        found.append([])
        for head in range(GROUPS):
            own = places.index[min(batch, len(places.index) - 1), min(head, places.index.shape[1] - 1)].tolist()
            if places.counts is not None:
                counts = places.counts
                own = own[: int(counts[min(batch, len(counts) - 1), min(head, counts.shape[1] - 1)])]
            some = [j for p in own if p >= 0 for j in range(p * places.block, (p + 1) * places.block) if j < keys]
            found[-1].append(some)
    return found


PLACES = {
    "keys": Places(torch.tensor([[[0, 3, 9]]])),
    "keys in slots": Places(torch.tensor([[[-1, 3, 9], [-1, -1, 4]]]), has_empty=True),
    "counts": Places(torch.tensor([[[0, 3, 9], [2, 5, 6]], [[1, 2, 3], [0, 4, 8]]]), torch.tensor([[3, 1], [2, 3]])),
    "counts of all": Places(torch.tensor([[[0, 3, 9]]]), torch.tensor([[2]])),
    "one set, counts by head": Places(torch.tensor([[[0, 3, 9]]]), torch.tensor([[2, 1], [3, 3]])),
    "pages": Places(torch.tensor([[[0, 2], [1, 3]]]), block=3),
    "the last page is cut": Places(torch.tensor([[[0, 3], [1, 2]]]), block=3),
    "pages with counts": Places(torch.tensor([[[0, 1, 3], [2, 3, 1]]]), torch.tensor([[2, 2], [3, 1]]), block=3),
    "pages in slots": Places(torch.tensor([[[-1, 0, 3], [-1, -1, 2]]]), block=3, has_empty=True),
}


@pytest.mark.parametrize("keys", [10, 12])
@pytest.mark.parametrize("name", PLACES)
def test_keys_values_mask_and_columns_are_those_of_the_places(name: str, keys: int) -> None:
    places, shown = PLACES[name], torch.rand(BATCH, 1, 3, keys, generator=torch.Generator().manual_seed(1)) > 0.3
    call = made(3, keys, shown)
    found = call.at(places)
    slots = found.key.shape[2]
    seen = found.mask.seen().expand(BATCH, HEADS, 3, slots)
    index = found.mask.index.expand(BATCH, GROUPS, -1)
    for batch, of_heads in enumerate(meant(places, keys)):
        for head, wanted in enumerate(of_heads):
            wanted, empty = sorted(wanted), slots - len(wanted)
            assert index[batch, head].tolist() == [-1] * empty + wanted
            assert torch.equal(found.key[batch, head, empty:], call.key[batch, head, wanted])
            assert torch.equal(found.value[batch, head, empty:], call.value[batch, head, wanted])
            for query_head in range(head * 2, head * 2 + 2):
                assert not seen[batch, query_head, :, :empty].any()
                assert torch.equal(seen[batch, query_head, :, empty:], shown[batch, 0][:, wanted])
    assert found.mask.has_empty or not (index < 0).any()


@pytest.mark.parametrize("name", PLACES)
def test_attention_reads_these_keys_alone(name: str) -> None:
    """One row that decodes, through `rule` and through the kernel that reads pages, against loops in float64."""
    places, keys = PLACES[name], 10
    call = made(1, keys)
    few = call.at(places)
    rule = few.rule()
    group = HEADS // GROUPS
    of_pages = None
    if places.counts is not None or places.block > 1:
        whole = torch.tensor([[places.index.shape[-1]]]) if places.counts is None else places.counts
        if not places.has_empty:
            of_pages = selected_attention(
                call.query, call.key, call.value, places.index, whole, places.block, call.rule()
            )[0]
    visible = rule.visible(slice(0, 1), (1, few.key.shape[2]), torch.device("cpu"))
    visible = visible.expand(BATCH, -1, -1, -1).expand(-1, HEADS, -1, -1)
    for batch, of_heads in enumerate(meant(places, keys)):
        for query_head in range(HEADS):
            head, wanted = query_head // group, of_heads[query_head // group]
            logits = call.key[batch, head, wanted].double() @ call.query[batch, query_head, 0].double() * DIM**-0.5
            want = logits.softmax(0) @ call.value[batch, head, wanted].double()
            logits = few.key[batch, head].double() @ few.query[batch, query_head, 0].double() * rule.scaling
            logits = logits.masked_fill(~visible[batch, query_head, 0], -torch.inf)
            got = logits.softmax(0) @ few.value[batch, head].double()
            torch.testing.assert_close(got, want)
            if of_pages is not None:
                torch.testing.assert_close(of_pages[batch, query_head, 0].double(), want, rtol=1e-5, atol=1e-5)


def test_rows_are_taken_off_any_layout() -> None:
    index = torch.tensor([[[0, 2, 5], [1, 3, 4]]])
    whole = torch.randn(BATCH, 7, GROUPS, 2 * DIM)
    buffer = torch.randn(BATCH, GROUPS, 11, DIM)
    layouts = {
        "a view of a buffer": buffer.narrow(2, 0, 7),
        "with spare places before it": buffer.narrow(2, 3, 7),
        "heads turned": whole[..., :DIM].transpose(1, 2),
        "channels apart": whole.transpose(1, 2)[..., ::2],
        "repeated": buffer[:1].expand(BATCH, -1, -1, -1),
        "fused with another": torch.randn(BATCH, 7, GROUPS * DIM + 3)[..., : GROUPS * DIM]
        .unflatten(-1, (GROUPS, DIM))
        .transpose(1, 2),
    }
    for name, tensor in layouts.items():
        want = torch.stack([torch.stack([tensor[b, h, index[0, h]] for h in range(GROUPS)]) for b in range(BATCH)])
        assert torch.equal(taken(tensor, index), want), name


def test_gradients_go_to_the_keys_that_were_taken() -> None:
    tensor = torch.randn(BATCH, 5, GROUPS, DIM, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[[0, 2], [1, 4]]])
    assert torch.autograd.gradcheck(lambda given: taken(given.transpose(1, 2), index), [tensor])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"index": torch.zeros(1, 3).long()}, ValueError, r"Expected index \(B or 1, 1 or kv heads, N\), got \(1, 3\)"),
        ({"index": torch.zeros(1, 1, 3)}, TypeError, "integers, got index of torch.float32"),
        ({"index": torch.zeros(1, 1, 3).bool()}, TypeError, "integers, got index of torch.bool"),
        ({"index": torch.zeros(1, 1, 3).long(), "counts": torch.tensor([3])}, ValueError, r"Expected counts .*\(1,\)"),
        ({"index": torch.zeros(1, 1, 3).long(), "counts": torch.ones(1, 1)}, TypeError, "got counts of torch.float32"),
        ({"index": torch.zeros(1, 1, 3).long(), "block": 0}, ValueError, "at least one key, got block=0"),
    ],
)
def test_what_is_no_place_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Places(**arguments)


def test_places_of_another_number_of_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected an index \(B, 1 or kv heads, keys\)"):
        made(1, 10).at(Places(torch.zeros(1, 3, 2).long()))


@pytest.mark.parametrize("places", [Places(torch.tensor([[[2, 10]]])), Places(torch.tensor([[[0, 3]]]), block=4)])
def test_a_key_or_page_that_is_not_there_is_refused(places: Places) -> None:
    """The number of one head's key would else be that of another head's."""
    with pytest.raises(IndexError, match="in a call with 10 keys"):
        made(1, 10).at(places)
