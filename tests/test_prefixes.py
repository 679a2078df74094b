"""Prompts that the unpatched model has read: the same answers as from reading; and answers that end early."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from patchattn import patched
from patchattn.evaluation.board.plan import read_board
from patchattn.evaluation.run.compare import patched_run
from patchattn.evaluation.tasks.generation import generate
from patchattn.evaluation.tasks.prefixes import TAIL, Prefixes

from .test_board import SHIPPED
from .test_longbench import BYTES

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "initializer_range": 0.3,
}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().double()
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two, one of them padded, and longer than what evictions keep."""
    ids = torch.randint(10, 300, (2, 3 * TAIL), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return ids, mask


def logits(model: Any, prompts: tuple[torch.Tensor, torch.Tensor], read: dict[str, Any]) -> torch.Tensor:
    ids, mask = prompts
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **read,
    )
    return torch.stack(found.logits)


def test_the_shipped_rows_behind_a_prompt_answer_as_if_they_had_read_it(
    tmp_path: Path, model: Any, prompts: tuple[torch.Tensor, torch.Tensor]
) -> None:
    dense = logits(model, prompts, {})
    torch.testing.assert_close(logits(model, prompts, Prefixes(tmp_path).of(model, *prompts)), dense)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    for name, row in read_board(SHIPPED)[1].items():
        if not row.behind_prompt:
            continue
        with patched_run(model, row.run, 0):
            whole = logits(model, prompts, {})
            shared = logits(model, prompts, Prefixes(tmp_path).of(model, *prompts))
        torch.testing.assert_close(shared, whole, msg=name)
        assert not torch.allclose(whole, dense), name
    assert file.stat().st_mtime_ns == before  # read once


def test_a_patch_that_changes_what_is_read_is_refused(
    tmp_path: Path, model: Any, prompts: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with (
        patched(model, "streaming", sinks=2, recent=16),
        pytest.raises(ValueError, match="streaming: is said to act behind a prompt"),
    ):
        Prefixes(tmp_path).of(model, *prompts)


def test_short_prompts_and_caches_that_slide_are_read_as_a_whole(
    tmp_path: Path, model: Any, prompts: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ids, mask = prompts
    assert Prefixes(tmp_path).of(model, ids[:, :TAIL], mask[:, :TAIL]) == {}
    sliding = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=32)).eval()
    assert Prefixes(tmp_path).of(sliding, ids, mask) == {}
    assert not list(tmp_path.iterdir())


def test_an_answer_ends_where_it_holds_what_is_wanted(model: Any) -> None:
    tokenizer = BYTES
    prompts = [list(b"abcdefgh"), list(b"ijkl")]
    whole = generate(model, tokenizer, prompts, max_new_tokens=12)
    first = whole[0]["pred"]
    wanted = [[first[2:4].swapcase()], ["not in any answer"]]
    ended = generate(model, tokenizer, prompts, max_new_tokens=12, wanted=wanted)
    end = first.find(first[2:4]) + 2
    assert ended[0]["pred"] == first[:end]
    assert ended[0]["new_tokens"] < whole[0]["new_tokens"] == 12
    assert ended[1]["pred"] == whole[1]["pred"]
