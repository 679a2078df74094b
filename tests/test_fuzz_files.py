"""Damaged files: what is loaded is right, or it is refused in words that name the file."""

import json
import random
import shutil

import pytest
import torch

import patchattn
from patchattn.cli.plot_reports import pareto_points
from patchattn.core.heads import BaseFacts
from patchattn.core.patching import is_patched
from patchattn.evaluation.report.card import card_section, eval_results
from patchattn.evaluation.report.report import make_report, summary, write_report
from patchattn.inspection.head_importance import head_importance
from patchattn.variants.pruning.flap import flap_statistics

from .damage import damage
from .families import FAMILIES, outputs
from .test_eval_report import Given, batch

COUNT, SEED = 500, 5
MISTAKES = (ValueError, TypeError, NotImplementedError)
INPUTS = FAMILIES["llama"].inputs()


def base():
    return FAMILIES["llama"].make()


def save_patch(folder, variants=("ssa", "moh"), settings=None):
    settings = settings or {"moh": {"router": "learned", "active_ratio": 0.5}}
    model = patchattn.patch_model(base(), list(variants), settings if len(variants) > 1 else settings[variants[0]])
    patchattn.save_patch(model, folder)


def save_flap(folder):
    model = base()
    statistics = flap_statistics(model, [INPUTS])
    patchattn.save_patch(patchattn.patch_model(model, "flap", statistics=statistics, sparsity=0.3), folder)


def load_patch(folder):
    model = base()
    try:
        return patchattn.load_patch(model, folder)
    finally:
        if not is_patched(model):
            assert all(torch.equal(a, b) for a, b in zip(outputs(model, **INPUTS), UNPATCHED, strict=True))


def save_whole(folder):
    patchattn.save_pretrained(patchattn.patch_model(base(), "ssmax"), folder)


def save_heads(folder):
    heads = {"heads": {"0": [0, 2], "1": [3]}, "base": vars(BaseFacts("llama", 2, 4))}
    (folder / "heads.json").write_text(json.dumps(heads))


def save_importance(folder):
    head_importance(base(), [INPUTS]).save(folder / "importance.json")


def save_statistics(folder):
    flap_statistics(base(), [INPUTS], amp=True).save(folder / "flap.safetensors")


class KilledError(Exception):
    pass


def save_state(folder):
    def stop(done):
        if done == 1:
            raise KilledError

    with pytest.raises(KilledError):
        head_importance(base(), [INPUTS, INPUTS], state=folder / "state.safetensors", progress=stop)


def save_report(folder):
    model, task = base(), Given("glue/sst2")
    rows = batch([1, 0, 1, 1], seconds=2.0, peak_memory=2**30)
    row = {"samples": 4, **summary(task, [rows])}
    plain = {**patchattn.patch_info(model), "parameters": 100}
    patched = {**patchattn.patch_info(patchattn.patch_model(model, "ssa")), "parameters": 123}
    found, patches = {name: {task.name: row} for name in RUNS}, dict(zip(RUNS, (plain, patched), strict=True))
    settings = {"batch": 4, "seed": 0, "limit": None, "processes": 1}
    answers = {task.name: dict.fromkeys(RUNS, rows)}
    write_report(make_report(model, [task], found, patches, settings, answers), folder)


def read_report(folder):
    patches = patchattn.patch_info(patchattn.patch_model(base(), "ssa"))["patches"]
    pareto_points([folder], None, None)
    eval_results(folder, patches)
    card_section(folder, patches)


RUNS = ("unpatched", "ssa")
CASES = {
    "patch": (save_patch, load_patch),
    "pruned": (lambda folder: save_patch(folder, ["prune"], {"prune": {"heads": {"0": [1], "1": [0]}}}), load_patch),
    "flap": (save_flap, load_patch),
    "whole": (save_whole, patchattn.from_pretrained),
    "heads": (save_heads, lambda folder: patchattn.patch_model(base(), "act", heads=str(folder / "heads.json"))),
    "importance": (
        save_importance,
        lambda folder: patchattn.patch_model(base(), "prune", sparsity=0.3, importance=str(folder / "importance.json")),
    ),
    "statistics": (
        save_statistics,
        lambda folder: patchattn.patch_model(base(), "flap", sparsity=0.3, statistics=folder / "flap.safetensors"),
    ),
    "state": (save_state, lambda folder: head_importance(base(), [INPUTS] * 2, state=folder / "state.safetensors")),
    "report": (save_report, read_report),
}
UNPATCHED = outputs(base(), **INPUTS)


@pytest.mark.slow
def test_damaged_files_are_refused_by_name_or_loaded(tmp_path):
    draw = random.Random(SEED)
    loaded, wrong = dict.fromkeys(CASES, 0), []
    for name, (save, load) in CASES.items():
        (tmp_path / name).mkdir()
        save(tmp_path / name)
        check(name, load(tmp_path / name))
    for number in range(COUNT):
        name = draw.choice(sorted(CASES))
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / name, folder)
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
        victim = draw.choice(files)
        what = f"number {number}: {name}, {damage(draw, victim)}"
        try:
            found = CASES[name][1](folder)
        except MISTAKES as error:
            if str(folder) not in str(error) or len(str(error)) > 2500:
                wrong.append(f"{what}: names no file, or at length: {type(error).__name__}: {str(error)[:300]}")
        except BaseException as error:
            wrong.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
        else:
            loaded[name] += 1
            if victim.name == "patchattn_model.safetensors" and name != "whole":
                wrong.append(f"{what}: was loaded")
            try:
                check(name, found, is_whole=name != "whole")
            except AssertionError as error:
                wrong.append(f"{what}: {str(error)[:300]}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert loaded["patch"] < COUNT / 20


def check(name, found, *, is_whole=True):
    """What was loaded computes numbers; weights and settings of a whole model are transformers' business."""
    if isinstance(found, torch.nn.Module) and is_whole:
        assert all(bool(tensor.isfinite().all()) for tensor in outputs(found, **INPUTS)), "not finite"
