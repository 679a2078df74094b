"""`transformers serve` on the folder of a patched model, asked over HTTP on the loopback address."""

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers.utils.import_utils import is_serve_available

import patchattn

from .long_context import BYTES, tiny_llama

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
PROMPT = "a prompt of some length"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a model that says other tokens with its patch than without."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = patchattn.patch_model(tiny_llama(), "moh", active_ratio=0.5)
    model.generation_config.eos_token_id = None
    folder = tmp_path / "served"
    patchattn.save_pretrained(model, folder, custom_code=True)
    BYTES.save_pretrained(folder)
    return folder


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[str]:
    """What `transformers serve folder --trust-remote-code` runs, in a thread; its address."""
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings: dict[str, Any] = {"trust_remote_code": True, "device": "cpu", "dtype": "float32", **options}
    serve = Serve(str(folder), host="127.0.0.1", port=port, non_blocking=True, log_level="error", **settings)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.kill_server()


def asked(address: str, folder: Path) -> str:
    """Eight tokens behind the prompt, greedily."""
    body = {"model": str(folder), "prompt": PROMPT, "max_tokens": 8, "temperature": 0.0, "seed": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    ends = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return str(json.load(response)["choices"][0]["text"])
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:  # the server is not up yet
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)


def said(model: Any) -> str:
    ids = BYTES(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    return BYTES.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    "continuous_batching",
    # Its cache takes most of the machine's memory, and no option of the server makes it small.
    [False, pytest.param(True, marks=pytest.mark.slow)],
)
def test_a_served_folder_answers_as_its_patched_model(folder: Path, continuous_batching: bool) -> None:
    with serving(folder, continuous_batching=continuous_batching) as address:
        answer = asked(address, folder)
    assert answer == said(patchattn.from_pretrained(folder)) != said(tiny_llama())


def test_a_damaged_patch_is_not_served_as_a_plain_model(folder: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("._extra_state"))
    tensors[name] = tensors[name][:-4].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="cannot be served with its patch"), serving(folder):
        pass
