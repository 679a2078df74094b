"""The invariants of decoding variants, over every registered one and all models that write text; none is named."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LogitsProcessor, LogitsProcessorList, StaticCache

import patchattn
from patchattn.cache.branch_tokens import BranchTokens
from patchattn.core.kv_caches import cache_argument, find_cache

from . import vlms, writers
from .behaviour import Case, assert_same, on, snapshot
from .families import FAMILIES

pytestmark = pytest.mark.usefixtures("toys")
STEPS = 4
EVERY = on(writers.NAMES, "decoding")
SOME = on(["llama", "gpt2", "llava", "qwen2_5_vl"], "decoding", papers=1)  # for what depends on files, not on families


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    """Equal but for the order of sums; `generate` hands out float32."""
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4, check_dtype=False)


def decode(model: Any, given: dict[str, torch.Tensor], **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, STEPS)` generated tokens and the `(B, STEPS, V)` logits they were chosen by, greedily by default."""
    settings = {"do_sample": False, "max_new_tokens": STEPS, **settings}
    result = model.generate(**given, **settings, return_dict_in_generate=True, output_logits=True)
    return result.sequences[:, -STEPS:], torch.stack(result.logits, dim=1)


def logits(model: Any, given: dict[str, torch.Tensor], last: int = 1) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits[:, -last:]


def extended(given: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs with text after them."""
    longer = {**given, "input_ids": torch.cat([given["input_ids"], tokens], dim=1)}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in given:
            longer[name] = torch.cat([given[name], torch.full_like(tokens, value).to(given[name].dtype)], dim=1)
    return longer


class Told(LogitsProcessor):
    """Lets these tokens `(1, STEPS)` be chosen and no others."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.left = tokens[0].tolist()

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        told = torch.full_like(scores, -torch.inf)
        told[:, self.left.pop(0)] = 0.0
        return told


def forced(model: Any, given: dict[str, torch.Tensor], tokens: torch.Tensor, case: Case) -> torch.Tensor:
    """`(1, STEPS, V)` logits that tokens are chosen by: of one forward; or step by step, if rows know of later ones."""
    if not case.looks_ahead:
        return logits(model, extended(given, tokens), STEPS + 1)[:, :-1]
    return decode(model, given, logits_processor=LogitsProcessorList([Told(tokens)]))[1]


@EVERY
def test_neutral_settings_change_nothing(family: str, case: Case) -> None:
    model, given = writers.make(family), writers.inputs(family)
    plain, expected = logits(model, given), decode(model, given)
    case.neutral.patch(model)
    assert torch.equal(logits(model, given), plain)
    for left, right in zip(decode(model, given), expected, strict=True):
        assert torch.equal(left, right)


@EVERY
def test_a_patch_changes_logits_and_unpatching_leaves_plain_generate(family: str, case: Case) -> None:
    model, given = writers.make(family), writers.inputs(family)
    expected = decode(model, given)
    before, info = snapshot(model), patchattn.patch_info
    case.patch(model)
    assert info(model)["patches"][0]["variant"] == case.variant
    assert info(model)["extra_parameters"] == 0
    changed = decode(model, given)[1]
    assert not torch.allclose(changed[:, 0], expected[1][:, 0], atol=1e-3)
    with patchattn.unpatched(model):
        assert torch.equal(decode(model, given)[1], expected[1])
    assert torch.equal(decode(model, given)[1], changed)
    patchattn.unpatch_model(model)
    assert_same(before, snapshot(model))
    for left, right in zip(decode(model, given), expected, strict=True):
        assert torch.equal(left, right)


@EVERY
def test_a_padded_batch_equals_its_rows_alone(family: str, case: Case) -> None:
    dtype = writers.exact(family)
    model, given = case.patch(writers.make(family, dtype=dtype)), writers.inputs(family, rows=3, dtype=dtype)
    tokens, steps = decode(model, given)
    for row in range(3):
        alone, alone_steps = decode(model, writers.single(given, row))
        assert torch.equal(tokens[row], alone[0])
        close(steps[row], alone_steps[0])


@EVERY
def test_cached_decoding_equals_one_forward(family: str, case: Case) -> None:
    dtype = writers.exact(family)
    model, given = case.patch(writers.make(family, dtype=dtype)), writers.inputs(family, dtype=dtype)
    tokens, steps = decode(model, given)
    for row in range(2):
        close(forced(model, writers.single(given, row), tokens[row : row + 1], case), steps[row : row + 1])


@EVERY
def test_beams_carry_their_branch_along(family: str, case: Case) -> None:
    """The score of every beam is that of its tokens under one forward of the patched model."""
    dtype = writers.exact(family)
    model, given = case.patch(writers.make(family, dtype=dtype)), writers.inputs(family, dtype=dtype)
    settings = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": STEPS}
    settings |= {"length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}
    result = model.generate(**given, **settings)
    tokens = result.sequences[:, -STEPS:].view(2, 2, STEPS)
    for row in range(2):
        assert not torch.equal(tokens[row, 0], tokens[row, 1])
        alone = writers.single(given, row)
        for beam in range(2):
            steps = forced(model, alone, tokens[row, beam][None], case).log_softmax(-1)
            score = steps.gather(-1, tokens[row, beam][None, :, None]).sum()
            close(result.sequences_scores.view(2, 2)[row, beam].double(), score.double())


@EVERY
def test_sampling_is_reproducible_and_processors_come_after(family: str, case: Case) -> None:
    model, given = case.patch(writers.make(family)), writers.inputs(family)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(decode(model, given, do_sample=True, temperature=3.0, num_return_sequences=3)[0])
    assert torch.equal(*runs)
    settings = {"do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 1}
    result = model.generate(**given, **settings, return_dict_in_generate=True, output_logits=True, output_scores=True)
    torch.testing.assert_close(result.scores[0], result.logits[0] / 2.0)


@SOME
def test_saved_and_loaded(family: str, case: Case, tmp_path: Path) -> None:
    model, given = case.patch(writers.make(family)), writers.inputs(family)
    expected = decode(model, given)
    patchattn.save_patch(model, tmp_path / "patch")
    patchattn.save_pretrained(model, tmp_path / "model")
    patched = patchattn.load_patch(writers.make(family), tmp_path / "patch")
    whole = patchattn.from_pretrained(tmp_path / "model")
    assert patchattn.patch_info(whole)["patches"] == patchattn.patch_info(model)["patches"]
    for loaded in (patched, whole):
        for part in (loaded, getattr(loaded, "language_model", loaded)):
            if part.can_generate():
                part.generation_config.eos_token_id = None
        assert torch.equal(decode(loaded, given)[0], expected[0])
        torch.testing.assert_close(decode(loaded, given)[1], expected[1], rtol=1e-4, atol=1e-4)


@SOME
def test_copies_and_pickles_are_complete_and_independent(family: str, case: Case) -> None:
    model, given = case.patch(writers.make(family)), writers.inputs(family)
    pickled = pickle.dumps(model)  # before a forward: transformers then installs hooks that cannot be pickled
    expected = decode(model, given)[1]
    for twin in (copy.deepcopy(model), pickle.loads(pickled)):
        assert torch.equal(decode(twin, given)[1], expected)
        patchattn.unpatch_model(twin)
        assert not torch.equal(decode(twin, given)[1], expected)
        assert torch.equal(decode(model, given)[1], expected)


@SOME
def test_under_peft(family: str, case: Case, tmp_path: Path) -> None:
    model, given = case.patch(writers.make(family)), writers.inputs(family)
    expected = decode(model, given)[1]
    targets = "all-linear" if family in FAMILIES else r".*language_model.*q_proj"
    lora = LoraConfig(r=2, target_modules=targets, modules_to_save=["patchattn"])
    tuned = get_peft_model(model, lora).eval()
    close(decode(tuned, given)[1], expected)  # LoRA starts as the identity
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    moved = decode(tuned, given)[1]
    assert not torch.equal(moved, expected)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.patch(writers.make(family)), tmp_path).eval()
    assert torch.equal(decode(again, given)[1], moved)
    plain = patchattn.unpatch_model(tuned.unload())
    close(decode(plain, given)[1], decode(writers.make(family), given)[1])


@EVERY
def test_beside_an_attention_variant(family: str, case: Case) -> None:
    model, given = writers.make(family), writers.inputs(family)
    where = {"modules": "language"} if family in vlms.VLMS else {}
    alone = decode(case.patch(copy.deepcopy(model)), given)[1]
    patchattn.patch_model(
        model, ["ssa", case.variant], {"ssa": {"query": False}, case.variant: dict(case.settings)}, **where
    )
    torch.testing.assert_close(decode(model, given)[1], alone, rtol=0.1, atol=0.5)  # SSA starts near the identity
    assert not torch.equal(decode(model, given)[1], alone)
    patchattn.unpatch_model(model)
    case.patch(patchattn.patch_model(model, "ssa", query=False))
    assert [patch["variant"] for patch in patchattn.patch_info(model)["patches"]] == ["ssa", case.variant]


@EVERY
def test_half_precision(family: str, case: Case) -> None:
    model = case.patch(writers.make(family, dtype=torch.bfloat16))
    steps = decode(model, writers.inputs(family, dtype=torch.bfloat16))[1]
    assert not bool(steps.isnan().any())


@EVERY
def test_what_is_refused(family: str, case: Case) -> None:
    model, given = writers.make(family), writers.inputs(family)
    with pytest.raises(ValueError, match="chooses its own attention modules"):
        case.patch(model, layers=0)
    case.patch(model)
    with pytest.raises(ValueError, match="one decoding variant at a time"):
        case.patch(model)
    with pytest.raises(ValueError, match="no loss"):
        model(**given, labels=given["input_ids"])
    if family != "instructblip":
        with pytest.raises(NotImplementedError, match="static"):
            model(**given, **cache_argument(model, StaticCache(config=model.config, max_cache_len=200)))


@on(["llava"], "decoding")
def test_a_second_turn_and_a_cache_from_before(family: str, case: Case) -> None:
    model, given = writers.make(family, dtype=torch.float64), writers.inputs(family, rows=1, dtype=torch.float64)
    with torch.no_grad():
        old = find_cache(model(**given, use_cache=True).values())
    case.patch(model)
    first = model.generate(**given, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    cache = find_cache(first.values())
    assert cache is not None
    assert any(isinstance(layer, BranchTokens) for layer in cache.layers)
    more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    asked = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    second = model.generate(**asked, **cache_argument(model, cache), max_new_tokens=2, do_sample=False)
    if not case.looks_ahead:
        assert torch.equal(second, model.generate(**{**given, **asked}, max_new_tokens=2, do_sample=False))
    with pytest.raises(ValueError, match=r"filled before the model was patched|was filled without it"):
        model(input_ids=more[:, -1:], **cache_argument(model, old))


@on(["llava"], "decoding")
def test_assisted_decoding_takes_back_what_is_rejected(family: str, case: Case) -> None:
    model, given = case.patch(writers.make(family)), writers.inputs(family, rows=1)
    settings = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**given, **settings)
    assert torch.equal(plain, model.generate(**given, **settings, prompt_lookup_num_tokens=2))
