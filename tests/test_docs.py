"""What the documentation shows is run, and what it lists is complete."""

import doctest
import importlib
import inspect
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import patchattn
import patchattn_kernels
from patchattn.core import registry
from patchattn.core.tested_releases import pinned
from patchattn.reading.grid_masks import GridVariant

from . import vlms
from .families import FAMILIES
from .long_context import BYTES_CHAT
from .long_context import tiny_llama as tiny_chat_llama

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MODULES = [
    found.name
    for package in (patchattn, patchattn_kernels)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels").glob("*.md")])


def blocks(path: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What examples write stays out of the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.fixture
def readme(tmp_path: Path) -> list[str]:
    """The README's blocks, with a tiny chat model in a folder in the place of one of the Hub."""
    tiny_chat_llama().save_pretrained(tmp_path / "chat")
    BYTES_CHAT.save_pretrained(tmp_path / "chat")
    found = [block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "chat")) for block in blocks(README)]
    assert found[0] != blocks(README)[0]
    return found


def test_readme(readme: list[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "readme"}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for block in readme:
            exec(compile(block, "README.md", "exec"), namespace)
    old = [str(one.message) for one in warned if issubclass(one.category, FutureWarning)]
    assert not [message for message in old if "is_gradient_checkpointing" not in message]  # that is PEFT's
    inputs = namespace["inputs"]
    again, same = (namespace[name].eval()(**inputs).logits for name in ("again", "same"))
    assert torch.equal(again, same)
    tuned, reloaded = (namespace[name].eval()(**inputs).logits for name in ("tuned", "reloaded"))
    torch.testing.assert_close(tuned, reloaded, rtol=0, atol=0)


def test_the_first_block_of_the_readme_runs_alone(readme: list[str]) -> None:
    first, *_ = readme
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(compile(first, "README.md", "exec"), namespace)
    assert not patchattn.patch_info(namespace["chat"].model)["patches"]


def test_the_readme_says_which_releases_it_runs_on() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for package in ("transformers", "torch"):
        major, minor, _ = pinned("oldest")[package].split(".")
        assert f"{package} {major}.{minor} or newer" in text


@pytest.mark.parametrize("package", ["transformers", "torch", "peft", "accelerate", "numpy"])
def test_the_page_on_compatibility_names_what_was_run(package: str) -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    ends = [".".join(pinned(end)[package].split(".")[:2]) for end in ("oldest", "newest")]
    assert re.search(rf"^\| {package} \| {re.escape(ends[0])} \| {re.escape(ends[1])}( \(.*\))? \|$", text, re.M)


def test_first_steps(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / "start.md"):
        exec(compile(block, "start.md", "exec"), namespace)
    assert not torch.equal(namespace["changed"], namespace["plain"])
    assert "did you mean 'active_ratio'?" in capsys.readouterr().out


def test_readme_has_the_commands_of_continuous_integration() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name in re.findall(r"readme_command (\w+)\)", script):
        assert re.search(rf"^<!-- ci: {name} -->\n```bash\npip install .+\n```$", text, re.M), name


def test_readme_lists_every_variant() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in patchattn.list_variants():
        info = patchattn.variant_info(name)
        paper = f"{info.title}, [arXiv {info.arxiv_id}](https://arxiv.org/abs/{info.arxiv_id}) ({info.year})"
        training = "needed" if info.needs_training else ""
        assert text.count(f"| [`{name}`](docs/variants/{name}.md) | {info.summary} | {training} | {paper} |\n") == 1


@pytest.mark.parametrize("name", patchattn.list_variants())
def test_page_of_a_variant(name: str, tmp_path: Path) -> None:
    page = ROOT / "docs" / "variants" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    for setting, described in patchattn.variant_info(name).config_fields.items():
        default = described["default"]
        spelt = f'"{default}"' if isinstance(default, str) else str(default)
        assert f"| `{setting}` | `{spelt}` |" in text
    first, *others = blocks(page)
    capabilities = patchattn.variant_info(name).capabilities
    encoders = FAMILIES["bert" if "bidirectional" in capabilities else "bart"]
    of_text = tiny_llama if "causal" in capabilities else encoders.make
    make = of_text if "without_images" in capabilities else lambda: vlms.make("llava")
    if issubclass(patchattn.variant_info(name).variant, GridVariant):
        make = FAMILIES["vit"].make
    imports = "".join(f"{line}\n" for line in first.splitlines() if line.startswith("from "))
    ways = [imports + line for line in first.splitlines() if line and not line.startswith("from ")]  # one a line
    for way in ways:
        exec(way, {"patchattn": patchattn, "model": make()})
    tokens = torch.arange(24).view(2, 12)
    model = make()
    exec(ways[0], {"patchattn": patchattn, "model": model})
    namespace = {
        "patchattn": patchattn,
        "model": model.train(),
        "batch": {"input_ids": tokens, "labels": tokens},
        "accumulation_steps": 2,
        "accelerator": types.SimpleNamespace(backward=lambda loss: loss.backward()),
        "Trainer": Trainer,
        "arguments": TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True),
        "data": [],
    }
    for block in others:
        exec(compile(block, str(page), "exec"), namespace)


def test_api_page_lists_every_public_name() -> None:
    listed = set(
        re.findall(r"^::: patchattn\.(?:\w+\.)*(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    )
    public = {
        name
        for name in patchattn.__all__
        if inspect.isclass(value := getattr(patchattn, name)) or inspect.isfunction(value)
    }
    assert public <= listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#|mailto:", target):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.fixture
def example_variant() -> Iterator[types.ModuleType]:
    """The complete variant that CONTRIBUTING shows, registered for the length of a test."""
    (code,) = [block for block in blocks(ROOT / "CONTRIBUTING.md") if "register_variant(" in block]
    module = types.ModuleType("patchattn.variants.gating.head_scale")
    module.__package__ = "patchattn.variants.gating"
    sys.modules[module.__name__] = module
    try:
        exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules[module.__name__]
        registry._REGISTRY.pop("head_scale", None)


def test_example_of_a_variant(example_variant: types.ModuleType) -> None:
    model = tiny_llama()
    tokens = torch.arange(10)[None]
    before = model(tokens).logits
    with patchattn.patched(model, "head_scale"):
        assert torch.equal(model(tokens).logits, before)
    with patchattn.patched(model, "head_scale", initial_scale=0.5):
        patched = model(tokens).logits
    assert torch.equal(model(tokens).logits, before)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.5
    torch.testing.assert_close(patched, model(tokens).logits)
