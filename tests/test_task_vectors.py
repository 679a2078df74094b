"""Task vectors: the residual stream of demonstrations, against plain hooks on whole forwards; prompts of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchattn
from patchattn.calibration.few_shot import few_shot_prompts
from patchattn.core.layer_vectors import LayerVectors
from patchattn.core.patching import applied_patches
from patchattn.inspection.task_vectors import first_token_accuracy, layer_means

from .reference import WIDTH, tiny_llama
from .test_importance_cli import tokenizer

ROWS = [[3, 7, 1, 9, 22, 5, 7], [2, 8, 7, 1]]
PROMPT = torch.tensor([[0, 0, 4, 11, 6], [13, 2, 4, 11, 6]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def padded(side: str) -> dict[str, torch.Tensor]:
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    for row, tokens in enumerate(ROWS):
        place = slice(7 - len(tokens), 7) if side == "left" else slice(0, len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def behind(model: nn.Module, layer: int, change: Any) -> Any:
    """A hook that changes what a layer hands on."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if torch.is_tensor(output) else output[0]
        new = change(hidden)
        return new if torch.is_tensor(output) or new is None else (new, *output[1:])

    return model.model.layers[layer].register_forward_hook(hook)


def last_states(model: nn.Module, layer: int) -> np.ndarray:
    """`(E,)` behind a layer at the last token, mean over the rows, each run alone."""
    kept: list[torch.Tensor] = []
    handle = behind(model, layer, lambda hidden: kept.append(hidden[0, -1]))
    with torch.no_grad():
        for tokens in ROWS:
            model(torch.tensor([tokens]))
    handle.remove()
    return torch.stack(kept).mean(0).numpy()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_vectors_are_the_last_tokens_mean(side: str, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    found = layer_means(model, [padded(side)])
    for layer in range(2):
        np.testing.assert_allclose(found.vectors[layer], last_states(model, layer), rtol=1e-9, atol=1e-12)
    found.save(tmp_path / "vectors.json", prompts=2)
    assert LayerVectors.parse(tmp_path / "vectors.json") == found
    assert found.at(1).vectors == {1: found.vectors[1]}
    with pytest.raises(ValueError, match=r"of the layers \[0, 1\], got 3"):
        found.at(3)


def test_the_prompts_last_token_gets_the_vector_in_its_place() -> None:
    """Every step of generating, with padding, against one forward with a hook over all of the text."""
    model = tiny_llama(num_hidden_layers=3)
    vector = layer_means(model, [padded("left")]).at(1)
    how: Any = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with patchattn.patched(model, "task_vectors", vectors=vector.to_dict()):
        assert sum(len(patch.sites) for patch in applied_patches(model)) == 1
        found = model.generate(PROMPT, attention_mask=MASK, pad_token_id=0, **how)

    def replace(hidden: torch.Tensor) -> torch.Tensor:
        new = hidden.clone()
        new[:, 4] = torch.tensor(vector.vectors[1])
        return new

    mask = torch.cat([MASK, torch.ones(2, 3, dtype=torch.long)], dim=1)
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    handle = behind(model, 1, replace)
    with torch.no_grad():
        want = model(found.sequences[:, :-1], attention_mask=mask, position_ids=place).logits[:, 4:]
        handle.remove()
        plain = model(found.sequences[:, :-1], attention_mask=mask, position_ids=place).logits[:, 4:]
    got = torch.stack(found.logits, 1).double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got - plain).abs().max() > 1e-2


def test_at_the_last_layer_every_prompt_gets_the_same_answer() -> None:
    model = tiny_llama(num_hidden_layers=2)
    vector = layer_means(model, [padded("left")]).at(1)
    patchattn.patch_model(model, "task_vectors", vectors=vector.to_dict())
    with torch.no_grad():
        logits = model(PROMPT, attention_mask=MASK).logits[:, -1]
        want = model.lm_head(model.model.norm(torch.tensor(vector.vectors[1]).double()))
    torch.testing.assert_close(logits, want.expand(2, -1), rtol=1e-9, atol=1e-9)
    best = int(want.argmax())
    batch = {"input_ids": PROMPT, "attention_mask": MASK}
    assert first_token_accuracy(model, [batch], [[best, best]]) == 1.0
    assert first_token_accuracy(model, [batch], [[best, best + 1]]) == 0.5


def test_marked_tokens_get_it_wherever_padding_lies() -> None:
    model = tiny_llama(num_hidden_layers=2)
    vector = torch.linspace(-1, 1, WIDTH).tolist()
    settings: dict[str, Any] = {"rows": "marked", "tokens": [1, 3], "phase": "both", "gain": 0.5, "strength": 2.0}
    patchattn.patch_model(model, "task_vectors", vectors={0: vector}, **settings)
    together = {}
    with torch.no_grad():
        for side in ("left", "right"):
            batch = padded(side)
            together[side] = model(**batch).logits[batch["attention_mask"].bool()]
    patchattn.unpatch_model(model)

    def change(hidden: torch.Tensor) -> torch.Tensor:
        new = hidden.clone()
        new[0, [1, 3]] = 0.5 * hidden[0, [1, 3]] + 2.0 * torch.tensor(vector, dtype=torch.float64)
        return new

    handle = behind(model, 0, change)
    with torch.no_grad():
        want = torch.cat([model(torch.tensor([tokens])).logits[0] for tokens in ROWS])
    handle.remove()
    for got in together.values():
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({}, ValueError, "needs vectors"),
        ({"vectors": {7: [0.0] * WIDTH}}, ValueError, r"of the layers \[7\]"),
        ({"vectors": {0: []}}, TypeError, "list of numbers"),
        ({"vectors": {0: [1.0], 1: [1.0, 2.0]}}, ValueError, "of one length"),
        ({"vectors": {}}, TypeError, "mapping from layers"),
        ({"vectors": {0: [0.0] * WIDTH}, "tokens": [1]}, ValueError, "tokens are for rows"),
        (
            {"vectors": {"vectors": {0: [0.0] * WIDTH}, "base": {"model_type": "llama", "layers": 9, "heads": 4}}},
            ValueError,
            "list of vectors is for",
        ),
    ],
)
def test_what_is_refused(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    model = tiny_llama(num_hidden_layers=2)
    with pytest.raises(error, match=says):
        patchattn.patch_model(model, "task_vectors", **settings)
    assert not applied_patches(model)


def test_vectors_of_another_width_are_refused_in_the_call() -> None:
    model = patchattn.patch_model(tiny_llama(), "task_vectors", vectors={0: [1.0, 2.0]})
    with pytest.raises(ValueError, match=f"has 2 numbers, but the layer of .* hands on {WIDTH}"):
        model(PROMPT)


def test_prompts_of_demonstrations() -> None:
    pairs = [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")]
    how: dict[str, Any] = {"shots": 3, "count": 5, "batch_size": 2, "template": "{} x {} y ", "seed": 1}
    known = dict(pairs)
    words = tokenizer()
    words.post_processor = None
    plain, mixed = (few_shot_prompts(words, pairs, shuffled=shuffled, **how) for shuffled in (False, True))
    assert [len(batch.texts) for batch in plain] == [2, 2, 1]
    for batches, fits in ((plain, True), (mixed, False)):
        for batch in batches:
            for text, answer in zip(batch.texts, batch.answers, strict=True):
                *shown, question = text.removesuffix(" x").split(" y ")
                assert len(shown) == 3
                assert len({one.split(" x ")[0] for one in shown} | {question}) == 4
                assert all((known[one.split(" x ")[0]] == one.split(" x ")[1]) is fits for one in shown)
                assert words.convert_ids_to_tokens(answer) == known[question]
    assert [batch.texts for batch in few_shot_prompts(words, pairs, **how)] == [batch.texts for batch in plain]
    with pytest.raises(ValueError, match="need more than 4 pairs, got 4"):
        few_shot_prompts(words, pairs, shots=4)
    with pytest.raises(ValueError, match="two places"):
        few_shot_prompts(words, pairs, shots=1, template="{}")
