"""What is told through logging and warnings: once, at its level, and never through a handler of ours."""

import importlib.metadata
import logging
import subprocess
import sys
import warnings

import pytest
import torch

import patchattn
from patchattn.core import notices, tested_releases
from patchattn_kernels import backend

from .families import FAMILIES


@pytest.fixture
def told(caplog):
    """All that patchattn logs from here on, as (level, message)."""
    caplog.set_level(logging.DEBUG, logger="patchattn")
    return lambda: [(one.levelname, one.getMessage()) for one in caplog.records if one.name.startswith("patchattn")]


@pytest.fixture
def release(monkeypatch):
    """Makes transformers seem another release, and what is told once be told again."""
    known = importlib.metadata.version
    notices.note_releases.cache_clear()
    monkeypatch.setattr(tested_releases, "requires", lambda name: ["transformers<6,>=5.17"])

    def seem(installed):
        monkeypatch.setattr(tested_releases, "version", lambda n: installed if n == "transformers" else known(n))

    yield seem
    notices.note_releases.cache_clear()


def test_patching_loading_and_unpatching(told, tmp_path):
    model = patchattn.patch_model(FAMILIES["llama"].make(), ["ssa", "moh"])
    patchattn.save_patch(model, tmp_path)
    patchattn.unpatch_model(model)
    patchattn.load_patch(model, tmp_path)
    patched = [("INFO", f"Patched LlamaForCausalLM with {name} on 2 attention modules") for name in ("ssa", "moh")]
    unpatched = [("INFO", "Unpatched LlamaForCausalLM")]
    assert [one for one in told() if one[0] == "INFO" and "patched" in one[1].lower()] == [
        *patched,
        *unpatched,
        *patched,
    ]
    details = [message for level, message in told() if level == "DEBUG" and message.startswith("moh: ")]
    assert "router='query_norm'" in details[0]
    assert "model.layers.0.self_attn, model.layers.1.self_attn" in details[0]


def test_a_refused_patch_is_none(told):
    with pytest.raises(ValueError, match="no layer 9"):
        patchattn.patch_model(FAMILIES["llama"].make(), "moh", layers=9)
    assert not [message for _, message in told() if message.startswith("Patched")]


def test_why_the_kernels_do_not_run_is_told_once(told, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PATCHATTN_KERNELS", "auto")
    backend._note_once.cache_clear()
    model = patchattn.patch_model(FAMILIES["llama"].make(), "act", alpha=1.0)
    for _ in range(3):
        model(torch.arange(3, 13)[None])
    (why,) = [one for one in told() if "Plain torch computes in place of Triton" in one[1]]
    assert why[0] == "DEBUG"
    backend._note_once("too old a GPU", True)
    assert told()[-1] == ("INFO", "Plain torch computes in place of Triton: too old a GPU")


@pytest.mark.parametrize("installed", ["5.16.0", "6.0.0"])
def test_a_release_outside_the_range_is_warned_of_once(release, installed):
    release(installed)
    with pytest.warns(UserWarning, match=f"transformers {installed} is too .* for patchattn") as warned:
        patchattn.patch_model(FAMILIES["llama"].make(), "moh")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patchattn.patch_model(FAMILIES["llama"].make(), "moh")
    assert warned[0].filename == __file__


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was(release):
    release("6.0.0")
    model = FAMILIES["llama"].make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="too new"):
            patchattn.patch_model(model, "moh")
    assert not patchattn.patch_info(model)["patches"]


def test_a_newer_release_is_mentioned_and_a_tested_one_is_not(release, told):
    release("5.99.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patchattn.patch_model(FAMILIES["llama"].make(), "moh")
    (newer,) = [message for level, message in told() if "transformers is 5.99.0" in message and level == "INFO"]
    assert "patchattn doctor" in newer
    notices.note_releases.cache_clear()
    release(tested_releases.pinned("oldest")["transformers"])
    patchattn.patch_model(FAMILIES["llama"].make(), "moh")
    assert sum("transformers is" in message for _, message in told()) == 1


def test_the_library_sets_no_handler_and_no_level():
    code = (
        "import logging, patchattn, patchattn_kernels, patchattn.core.patching, patchattn.cli.main\n"
        "loggers = [logging.getLogger(name) for name in ('patchattn', 'patchattn.kernels')]\n"
        "assert not any(one.handlers or one.level or not one.propagate for one in loggers)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
