"""`patchattn doctor` passes where patches work, and names the reason where they do not."""

import importlib.metadata

import pytest
import torch
from packaging.version import Version

import patchattn
from patchattn.checking import doctor
from patchattn.cli.main import main
from patchattn.core import chain, tested_releases
from patchattn.core import tap as storage
from patchattn.core.patching import unpatch_model

from .behaviour import registered


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command: exit code, and what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def call():
        with pytest.raises(SystemExit) as left:
            main(["doctor"])
        return left.value.code or 0, capsys.readouterr().out

    return call


def problems(out):
    return [line for line in out.splitlines() if line.startswith("Problem:")]


NAMES = {"moh", "ssa", "act", "ssmax", "logn", "flap", "prune", "streaming_llm"}
GRIDS = {"window", "quadrangle"}  # which are tried on images


@pytest.mark.parametrize("names", [NAMES | GRIDS, pytest.param(None, marks=pytest.mark.slow, id="every")])
def test_a_working_installation_passes(run, monkeypatch, names):
    """With a variant of each sort; with every one `.ci/run` runs it, on the oldest releases and on the newest."""
    if names:
        only(monkeypatch, *sorted(names))
    before = registered()
    code, out = run()
    assert code == 0, out
    assert not problems(out)
    assert "failed" not in out
    for name in NAMES:
        assert f"{name}, decoder" in out
        assert f"{name}, encoder" in out or name == "streaming_llm"
    for name in GRIDS:
        assert f"{name}, image encoder" in out
        assert f"{name}, encoder" not in out
    for package in ("torch", "transformers", "peft"):
        assert importlib.metadata.version(package) in out
    assert registered() <= before


def only(monkeypatch, *names):
    """Fewer variants, where one is enough to see a fault."""
    monkeypatch.setattr(doctor, "list_variants", lambda: list(names))


def test_a_seam_that_is_never_called(run, monkeypatch):
    """As if transformers looked attention functions up elsewhere: a patched model computes the unpatched one."""
    only(monkeypatch, "moh")
    monkeypatch.setattr(
        chain.VariantChain,
        "_attend",
        lambda chain, base, looks, depth, call: base(
            call.module, call.query, call.key, call.value, call.mask.given, **call.kwargs
        ),
    )
    code, out = run()
    assert code == 1
    assert sum("the patch changes nothing" in line for line in problems(out)) == 2  # decoder and encoder
    assert sum("off from the same attention in plain torch" in line for line in problems(out)) == 2  # eager and sdpa


def test_a_seam_that_computes_something_else(run, monkeypatch):
    only(monkeypatch, "ssmax")
    attend = chain.VariantChain._attend

    def wrong(chain, base, looks, depth, call):
        output, weights = attend(chain, base, looks, depth, call)
        return output + 0.01, weights

    monkeypatch.setattr(chain.VariantChain, "_attend", wrong)
    code, out = run()
    assert code == 1
    assert any("neutral settings equal the unpatched model" in line for line in problems(out))
    assert any("off from the same attention in plain torch" in line for line in problems(out))


def test_unpatching_that_leaves_something_behind(run, monkeypatch):
    only(monkeypatch, "moh")

    def leaves(model):
        unpatch_model(model)
        with torch.no_grad():
            next(model.parameters()).add_(0.1)
        return model

    monkeypatch.setattr(doctor, "unpatch_model", leaves)
    code, out = run()
    assert code == 1
    assert "the unpatched model is not the one of before" in problems(out)[0]


def test_a_cache_that_new_entries_reach_unchanged(run, monkeypatch):
    """As if a release stored keys and values in another way: only decoding from the cache is then wrong."""
    only(monkeypatch, "ssa")

    def passes_by(tap, key, value, cache, layer_index):
        tap.is_used = True
        return key, value

    monkeypatch.setattr(storage.CacheTap, "change", passes_by)
    code, out = run()
    assert code == 1
    (line,) = problems(out)
    assert line.startswith("Problem: ssa, decoder (cpu): ")
    assert "cache" in line


def test_a_patch_that_comes_back_changed(run, monkeypatch):
    only(monkeypatch, "ssa")
    monkeypatch.setattr(doctor, "load_patch", lambda model, folder: patchattn.patch_model(model, "ssa"))
    code, out = run()
    assert code == 1
    assert all("saved and loaded computes something else" in line for line in problems(out))


def test_whatever_an_upgrade_raises_is_a_reason(run, monkeypatch):
    only(monkeypatch, "moh", "ssmax")

    def renamed(*args, **kwargs):
        raise AttributeError("module 'transformers' has no attribute 'something'")

    monkeypatch.setattr(doctor, "save_patch", renamed)
    code, out = run()
    assert code == 1
    assert len(problems(out)) == 4
    assert all("AttributeError: module 'transformers' has no attribute 'something'" in line for line in problems(out))


@pytest.mark.parametrize(("release", "verdict"), [("5.16.1", "too old"), ("6.0.0", "too new")])
def test_a_release_outside_the_range(run, monkeypatch, release, verdict):
    only(monkeypatch)
    known = importlib.metadata.version
    monkeypatch.setattr(tested_releases, "version", lambda name: release if name == "transformers" else known(name))
    monkeypatch.setattr(tested_releases, "requires", lambda name: ["transformers<6,>=5.17"])
    code, out = run()
    assert code == 1
    assert f"Problem: transformers {release} is {verdict}" in problems(out)[0]


def test_a_newer_release_than_the_tests_saw_is_said_and_tried(run, monkeypatch):
    only(monkeypatch)
    known = importlib.metadata.version
    monkeypatch.setattr(tested_releases, "version", lambda name: "99.0" if name == "peft" else known(name))
    code, out = run()
    assert code == 0
    (line,) = [line for line in out.splitlines() if " peft " in line]
    assert "99.0" in line
    assert "newer than tested" in line


def test_both_ends_name_the_same_packages():
    oldest, newest = tested_releases.pinned("oldest"), tested_releases.pinned("newest")
    assert oldest.keys() == newest.keys()
    assert all(Version(oldest[name]) <= Version(newest[name]) for name in oldest)
