"""PAI against attention written out row by row in float64, and against a run of the text alone."""

from typing import Any

import pytest
import torch

import patchattn
from patchattn.core.kv_caches import cache_argument, find_cache
from patchattn.decoding import guidance
from patchattn.decoding.answering import prompt_goes_on

from . import vlms
from .guidance_reference import guided, raised, text_alone
from .test_decoding import decode, extended

F64 = torch.float64
ALL = {"first_layer": 0, "alpha": 0.7, "gamma": 1.5, "beta": 0.1}


@pytest.fixture(scope="module")
def llava() -> Any:
    return vlms.make("llava", dtype=F64)


def boosts_of(ids: torch.Tensor, alpha: float) -> list[list[float]]:
    return [[alpha * float(token == vlms.IMAGE) for token in row] for row in ids.tolist()]


@torch.no_grad()
def expected(
    model: Any, given: dict[str, torch.Tensor], settings: dict[str, Any], layers: list[int], *, end: int | None = None
) -> torch.Tensor:
    """`(B, V)` logits behind whole texts padded on the left, whose prompts end with the token `end - 1`."""
    ids = given["input_ids"]
    rows = [list(range((end or ids.shape[1]) - 1, ids.shape[1]))] * len(ids)
    with raised(model, boosts_of(ids, settings["alpha"]), rows, layers) as twin:
        logits = twin(**given, use_cache=False).logits[:, -1]
    if settings["gamma"] == 1.0:
        return logits
    real = given["attention_mask"].bool()
    return torch.stack(
        [
            guided(one, text_alone(model, ids[i : i + 1, real[i]]), settings["gamma"], settings["beta"])
            for i, one in enumerate(logits)
        ]
    )


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal as distributions."""
    torch.testing.assert_close(got.double().log_softmax(-1), want.log_softmax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "layers"),
    [
        ("llava", {}, [0, 1]),
        ("llava", {"gamma": 1.0, "last_layer": 0}, [0]),
        ("qwen2_5_vl", {"first_layer": 1, "beta": 0.0}, [1]),
    ],
)
def test_every_step_of_a_padded_batch(name: str, changes: dict[str, Any], layers: list[int]) -> None:
    """From the first token on: the prompt's last row is raised too."""
    settings = {**ALL, **changes}
    model, given = vlms.make(name, dtype=F64), vlms.inputs(name, dtype=F64)
    patchattn.patch_model(model, "pai", **settings)
    tokens, steps = decode(model, given, max_new_tokens=4)
    assert torch.equal(decode(model, given, max_new_tokens=4)[1], steps)  # a second run is as the first
    patchattn.unpatch_model(model)
    for count in range(3 if name == "llava" else 1):
        whole = extended(given, tokens[:, :count])
        want = expected(model, whole, settings, layers, end=given["input_ids"].shape[1])
        same(steps[:, count], want)
        with torch.no_grad():
            plain = model(**whole).logits[:, -1]
        assert float((want.log_softmax(-1) - plain.log_softmax(-1)).abs().nan_to_num(0.0).max()) > 1e-2


def two_images() -> dict[str, torch.Tensor]:
    image = [vlms.IMAGE] * 16
    ids = torch.tensor([[5, *image, 9, 8, 7, *image, 21, 22]])
    pixels = torch.randn(2, 3, vlms.SIDE, vlms.SIDE, generator=torch.Generator().manual_seed(5), dtype=F64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_two_images_and_the_text_between_them(llava: Any) -> None:
    given = two_images()
    with patchattn.patched(llava, "pai", **ALL), torch.no_grad():
        got = llava(**given).logits[:, -1]
    same(got, expected(llava, given, ALL, [0, 1]))


@pytest.mark.parametrize("where", [1, 18, 20, 21])
def test_a_prompt_in_two_calls(llava: Any, where: int) -> None:
    """Also one whose first piece is text alone, or ends with the image, or whose second is one token."""
    given = vlms.single(vlms.inputs("llava", dtype=F64), 0)
    ids, mask = given["input_ids"], given["attention_mask"]
    with patchattn.patched(llava, "pai", **ALL), torch.no_grad():
        want = llava(**given).logits[:, -1]
        image = {"pixel_values": given["pixel_values"]}
        first, second = (image, {}) if where >= 18 else ({}, image)
        with prompt_goes_on():
            done = llava(input_ids=ids[:, :where], attention_mask=mask[:, :where], use_cache=True, **first)
        more = cache_argument(llava, find_cache(done.values()))
        got = llava(input_ids=ids[:, where:], attention_mask=mask, **more, **second).logits[:, -1]
    same(got, want)


def test_a_prompt_in_two_calls_is_refused_where_nobody_says_so(llava: Any) -> None:
    given = vlms.single(vlms.inputs("llava", dtype=F64), 1)
    ids, mask, image = given["input_ids"], given["attention_mask"], {"pixel_values": given["pixel_values"]}
    with patchattn.patched(llava, "pai", **ALL), torch.no_grad():
        done = llava(input_ids=ids[:, :19], attention_mask=mask[:, :19], use_cache=True, **image)
        more = {"input_ids": ids[:, 19:22], "attention_mask": mask[:, :22]}
        more |= cache_argument(llava, find_cache(done.values()))
        with pytest.raises(ValueError, match=r"Call the model on the earlier pieces of a prompt under"):
            llava(**more)
        with pytest.raises(ValueError, match=r"prefill_chunk_size|[Ii]mage"):
            llava.generate(**given, prefill_chunk_size=20, max_new_tokens=1)


def test_a_second_turn_behind_an_answer_of_one_token(llava: Any) -> None:
    """Both prompts' ends are raised."""
    given = vlms.single(vlms.inputs("llava", dtype=F64), 1)
    whole = extended(given, torch.tensor([[7, 8, 9]]))
    settings, length = {**ALL, "gamma": 1.0}, given["input_ids"].shape[1]
    rows = [[length - 1, length + 2]]
    with raised(llava, boosts_of(whole["input_ids"], 0.7), rows, [0, 1]) as twin, torch.no_grad():
        want = twin(**whole, use_cache=False).logits[:, -1]
    with patchattn.patched(llava, "pai", **settings), torch.no_grad():
        cache = cache_argument(llava, find_cache(llava(**given, use_cache=True).values()))
        now = {"input_ids": whole["input_ids"][:, length:], "attention_mask": whole["attention_mask"]}
        with prompt_goes_on(False):
            got = llava(**now, **cache).logits[:, -1]
    same(got, want.detach())


def test_pieces_of_image_tokens_alone_and_of_text_alone(llava: Any) -> None:
    """The second branch gets no token of such a piece, and what comes behind is as ever."""
    given = vlms.single(vlms.inputs("llava", dtype=F64), 0)
    ids, mask, cache = given["input_ids"], given["attention_mask"], None
    with patchattn.patched(llava, "pai", **ALL), torch.no_grad():
        want = llava(**given).logits[:, -1]
        for start, end in ((0, 2), (2, 18), (18, ids.shape[1])):
            image = {"pixel_values": given["pixel_values"]} if start == 2 else {}
            now = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "use_cache": True, **image}
            if end < ids.shape[1]:
                with prompt_goes_on():
                    done = llava(**now, **cache_argument(llava, cache))
                cache = find_cache(done.values())
        got = llava(**now, **cache_argument(llava, cache)).logits[:, -1]
    same(got, want)


def test_prompts_padded_on_the_right_and_logits_of_several_tokens(llava: Any) -> None:
    given = vlms.inputs("llava", dtype=F64)
    length = int(given["attention_mask"][0].sum())
    alone = [vlms.single(given, row) for row in range(2)]
    ids = torch.zeros_like(given["input_ids"])
    ids[0, :length], ids[1] = alone[0]["input_ids"][0], alone[1]["input_ids"][0]
    right = {**given, "input_ids": ids, "attention_mask": (ids != 0).long()}
    settings = {**ALL, "gamma": 1.0}
    wanted = [expected(llava, one, settings, [0, 1])[0] for one in alone]
    several = expected(llava, alone[1], settings, [0, 1], end=ids.shape[1] - 1)[0]
    with patchattn.patched(llava, "pai", **settings), torch.no_grad():
        got = llava(**right).logits
        same(got[0, length - 1], wanted[0])
        same(got[1, -1], wanted[1])
        same(llava(**alone[1], logits_to_keep=2).logits[0, -1], several)
    assert float((several - wanted[1]).abs().max()) > 1e-4  # which the row before the last is raised by


def test_eager_shows_the_raised_weights() -> None:
    given = vlms.single(vlms.inputs("llava", dtype=F64), 1)
    model = vlms.make("llava", dtype=F64)
    model.set_attn_implementation("eager")
    image = given["input_ids"] == vlms.IMAGE
    with torch.no_grad():
        plain = model(**given, output_attentions=True).attentions[0]
        with patchattn.patched(model, "pai", **{**ALL, "gamma": 1.0}):
            got = model(**given, output_attentions=True)
    weights = got.attentions[0]
    torch.testing.assert_close(weights.sum(-1)[:, :, -1], torch.ones(1, 4, dtype=F64))
    torch.testing.assert_close(weights[:, :, :-1], plain[:, :, :-1], rtol=0, atol=0)
    share = [(each[:, :, -1] * image[:, None]).sum(-1) for each in (weights, plain)]
    assert bool((share[0] > share[1]).all())
    same(got.logits[:, -1], expected(model, given, {**ALL, "gamma": 1.0}, [0, 1]))


def test_the_worked_example() -> None:
    """Logits (1, -1, 0), all of image tokens, with alpha 0.7: (1.7, -0.3, 0)."""
    seen = []
    model = vlms.make("llava", dtype=F64)
    original = guidance.attend_rows

    def spy(call: Any, weigh: Any) -> Any:
        logits = torch.zeros(1, 1, 1, call.key.shape[2], dtype=F64)
        logits[..., 2:5] = torch.tensor([1.0, -1.0, 0.0])
        visible = torch.zeros_like(logits, dtype=torch.bool)
        visible[..., 2:5] = True
        logits = logits.masked_fill(~visible, -1e30)
        seen.append(weigh(logits, visible)[0, 0, 0, 2:5])
        return original(call, weigh)

    with pytest.MonkeyPatch.context() as patch, patchattn.patched(model, "pai", **{**ALL, "gamma": 1.0}):
        patch.setattr(guidance, "attend_rows", spy)
        with torch.no_grad():
            model(**vlms.single(vlms.inputs("llava", dtype=F64), 0))
    torch.testing.assert_close(seen[0], torch.tensor([0.759, 0.103, 0.139], dtype=F64), rtol=0, atol=1e-3)


def test_what_is_refused(llava: Any) -> None:
    with pytest.raises(ValueError, match="has 2, and first_layer is 2"):
        patchattn.patch_model(llava, "pai")
    given = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    with (
        patchattn.patched(llava, "pai", **{**ALL, "gamma": 1.0}),
        pytest.raises(NotImplementedError, match="holds several texts"),
    ):
        llava(**given, use_cache=False)
