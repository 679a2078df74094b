"""Patched models in the hands of Trainer, pipelines and accelerate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from transformers import Trainer, TrainingArguments

import patchattn

from .behaviour import Case, cases, on, randomise, toys, variant_parameters
from .families import FAMILIES, outputs

pytestmark = pytest.mark.usefixtures("toys")
FIXED = {case.variant for case in cases() if case.info.extra_parameters.startswith("none")}


def both_ways(first: Any, *others: Any) -> pytest.MarkDecorator:
    """Parametrize a test by `case` and `how`: papers in the first way, toys and what cuts weights in all of them."""
    papers = {case.variant: case for case in reversed(cases()) if case.refusal("qwen3") is None}.values()
    pairs = [(case, first) for case in papers]
    pairs += [(case, how) for case in papers if case.info.kind == "surgery" for how in others]
    pairs += [(case, how) for case in toys() for how in (first, *others)]
    return pytest.mark.parametrize(("case", "how"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}") for pair in pairs])


@on(["llama"], first=True, without=FIXED)
def test_trainer_trains_resumes_and_its_checkpoint_loads(family: str, case: Case, tmp_path: Path) -> None:
    """Of papers those whose parameters learn; under others, as under most toys, the model alone does."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (16, 8), generator=generator)]
    final = []
    for steps in ([4], [2, 4]):
        folder = tmp_path / str(len(steps))
        for stop in steps:
            model = case.patch(FAMILIES[family].make(), live=False)
            arguments = TrainingArguments(
                output_dir=str(folder),
                max_steps=4,
                save_steps=2,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            )
            trainer = Trainer(model, arguments, train_dataset=rows)
            resumed = stop == 4 and len(steps) == 2
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resumed else None)
        final.append(model.state_dict())
        loaded = patchattn.from_pretrained(folder / "checkpoint-4")
        inputs = FAMILIES[family].inputs()
        torch.testing.assert_close(outputs(loaded, **inputs)[0], outputs(model.eval(), **inputs)[0])
    assert final[0].keys() == final[1].keys()
    for name, tensor in final[0].items():
        torch.testing.assert_close(tensor, final[1][name])


@both_ways("offloaded, then patched", "patched, then offloaded")
def test_offloaded_models(case: Case, how: str) -> None:
    """accelerate keeps an offloaded model's parameters elsewhere and brings them in for each module's forward."""
    patched_first = how.startswith("patched")
    inputs = FAMILIES["qwen3"].inputs()
    plain = FAMILIES["qwen3"].make()
    base = outputs(plain, **inputs)[0]
    expected = outputs(case.patch(plain), **inputs)[0]
    model = FAMILIES["qwen3"].make()
    if patched_first:
        case.patch(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    cuts = case.info.kind == "surgery"  # weights that accelerate now holds
    if not patched_first and cuts:
        with pytest.raises(NotImplementedError, match="offloaded or dispatched by accelerate: prune before that"):
            case.patch(model)
        return
    if not patched_first:
        case.patch(model, live=False)
        assert not any(p.is_meta for p in variant_parameters(model).values())
        randomise(model)
    assert torch.equal(outputs(model, **inputs)[0], expected)
    if cuts:
        with pytest.raises(ValueError, match="remove_hook_from_submodules"):
            patchattn.unpatch_model(model)
        remove_hook_from_submodules(model)
    patchattn.unpatch_model(model)
    assert torch.equal(outputs(model, **inputs)[0], base)


@both_ways("loaded, then patched", "patched, then dispatched", "dispatched, then patched")
def test_models_with_layers_on_disk(case: Case, how: str, tmp_path: Path) -> None:
    inputs = FAMILIES["qwen3"].inputs()
    expected = outputs(case.patch(FAMILIES["qwen3"].make()), **inputs)[0]
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = FAMILIES["qwen3"].make()
    if how.startswith("patched"):
        case.patch(model)
    if how.startswith("loaded"):
        model.save_pretrained(tmp_path / "model")
        model = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path).eval()
    else:
        dispatch_model(model, places, offload_dir=tmp_path, main_device="cpu")
    if not how.startswith("patched"):
        if case.info.kind == "surgery":
            with pytest.raises(NotImplementedError, match="offloaded or dispatched by accelerate: prune before that"):
                case.patch(model)
            return
        case.patch(model)
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    assert torch.equal(outputs(model, **inputs)[0], expected)
