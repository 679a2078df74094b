"""A whole patched model as a folder, and on the Hub: `save_pretrained`, `push_to_hub`."""

import json
import re
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from huggingface_hub import HfApi, ModelCard, ModelCardData
from torch import nn

from ..core.patching import applied_patches
from ..core.plan import Patch
from ..core.registry import variant_info
from ..core.selection import base_model
from ..core.shards import first_process, in_step, own_tensor
from ..files.documents import read_json_object
from ..files.folders import replacing
from .adapters import guard_adapters, whole_adapters
from .card_report import card_report
from .checkpoint import patch_content
from .patch_files import write_patch
from .whole_model import CODE_MODULE

_CODE = '''"""Loads this model with its attention variants; needs `pip install patchattn`."""

from patchattn import patched_class

{architecture} = patched_class("{architecture}")
'''
# What `transformers serve` asks first of any model; without an answer it loads the plain class, and drops the patch.
_SERVED_BY = "AutoModelForDecision"
_SERVED = 'Served = patched_class("{architecture}", serves=True)\n'


def save_pretrained(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    custom_code: bool = False,
    report: str | PathLike[str] | None = None,
) -> None:
    """Write everything a patched model needs into one folder, for `patchattn.from_pretrained`.

    That is what the model's own `save_pretrained` writes (weights, and the patch among them, and `config.json`),
    the patch alone as `save_patch` writes it, and a model card. Of a PeftModel, its adapters take the place of the
    model's weights, each with its patch; those not named `default` lie in folders of their own. All files take the
    place of older ones together, so that there must be room for both: a process that is killed while it saves leaves
    the older save or the new one. Of a model that several processes share, each must call it; the first one writes.

    Args:
        model: a patched model, or a PeftModel around one.
        directory: is made if it does not exist.
        custom_code: also write the Hub's custom-code entry, a file of a few lines that imports patchattn, so that
            `AutoModelFor*.from_pretrained(directory, trust_remote_code=True)` loads the patched model, and so does
            `transformers serve directory --trust-remote-code`, from transformers 5.24 on.
        report: output folder of `patchattn eval`, whose scores and costs of this patch the card then shows.

    Raises:
        ValueError: the model is not patched, carries adapters without being a PeftModel, or cannot have custom code:
            a PeftModel, or a class that no Auto class of transformers knows; or the report has no run with this patch.
        TypeError: `model` is not a transformers model.
        OSError: the folder cannot be written; what it held is then as it was.
    """
    base: Any = base_model(model)
    is_peft = hasattr(base, "peft_config")
    saved: Any = model if is_peft else base
    if is_peft and not hasattr(model, "get_base_model"):
        raise ValueError("This model carries PEFT adapters: pass the PeftModel around it, or merge_and_unload() first.")
    if is_peft and custom_code:
        raise ValueError("custom_code needs a whole model, got a PeftModel: merge_and_unload() first.")
    auto_map = _auto_map(base) if custom_code else {}
    card = _card(base, report)
    content, tensors = patch_content(model)
    guard_adapters()  # PEFT then writes the patch beside each adapter
    whole, is_first = whole_adapters(model) if is_peft else None, first_process(model)
    with in_step(model), ExitStack() as places:
        with in_step(model):
            if is_first:
                place = replacing(directory, outdated=lambda name: not is_peft and _is_weights(name))
                folder = places.enter_context(place)
            else:
                folder = Path(places.enter_context(TemporaryDirectory()))
            if is_first and not is_peft:
                write_patch(folder, content, tensors)
        saved.save_pretrained(folder, state_dict=whole)  # where all processes put their parts together
        if is_first:
            card.save(folder / "README.md")
        if is_first and custom_code:
            config = {**read_json_object(folder / "config.json"), "auto_map": auto_map}
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")
            code = _CODE + (_SERVED if _SERVED_BY in auto_map else "")
            code = code.format(architecture=type(base).__name__)
            (folder / f"{CODE_MODULE}.py").write_text(code, encoding="utf-8")


def _is_weights(name: str) -> bool:
    """Whether transformers would take a file of that name for a model's weights, or a shard of them."""
    return re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name) is not None


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a model patched by patchattn",
    tokenizer: Any = None,
    custom_code: bool = False,
    report: str | PathLike[str] | None = None,
) -> str:
    """Upload a patched model to the Hub; `patchattn.from_pretrained(repo_id)` loads it.

    Args:
        model: as `save_pretrained`, whose folder is what is uploaded.
        repo_id: name of the repository, made if it does not exist.
        private: whether a new repository is private; `None`: the organisation's default.
        token: access token; `None`: the one of `hf auth login`.
        commit_message: of the upload.
        tokenizer: tokenizer or processor to upload along.
        custom_code: as `save_pretrained`.
        report: as `save_pretrained`.

    Returns:
        Address of the commit.

    Raises:
        ValueError, TypeError: as `save_pretrained`; nothing is then sent.
        NotImplementedError: several processes share the model.
    """
    if own_tensor(model) is not None:
        raise NotImplementedError(
            "Several processes share this model: call save_pretrained in each of them, and upload the folder."
        )
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, custom_code=custom_code, report=report)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))


def _auto_map(base: nn.Module) -> dict[str, str]:
    """Every Auto class that stands for this model class, to the class in the code file."""
    config: Any = base.config
    found = {}
    for name in dir(transformers):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and type(config) in mapping:
            classes = mapping[type(config)]
            if type(base) in (classes if isinstance(classes, tuple | list) else (classes,)):
                found[name] = f"{CODE_MODULE}.{type(base).__name__}"
    if not found:
        raise ValueError(
            f"No Auto class of transformers stands for {type(base).__name__}, so custom_code has nothing to extend."
        )
    if isinstance(base, transformers.GenerationMixin):
        found.setdefault(_SERVED_BY, f"{CODE_MODULE}.Served")
    return found


def _card(base: nn.Module, report: str | PathLike[str] | None) -> ModelCard:
    """The model card: what was patched, with which settings, from which papers, its scores, and how to load it."""
    config: Any = base.config
    patches = applied_patches(base)
    title = f"{type(base).__name__} with {' and '.join(dict.fromkeys(patch.variant for patch in patches))}"
    sections = [_section(patch) for patch in patches]
    metadata: dict[str, Any] = {}
    if report is not None:
        plan = [patch.to_dict() for patch in patches]
        metadata = {"model_name": title, "eval_results": card_report().eval_results(report, plan)}
        sections.append(card_report().card_section(report, plan))
    data = ModelCardData(
        library_name="patchattn",
        base_model=_repo_id(config._name_or_path),
        tags=["patchattn", "attention", *dict.fromkeys(patch.variant for patch in patches)],
        **metadata,
    )
    body = "\n\n".join([f"# {title}", *sections])
    changes_shapes = any(variant_info(patch.variant).variant.exchanges() for patch in patches)
    alone = "it is refused, for the shapes of its weights" if changes_shapes else "the attention variants are left out"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n\n{_USAGE.format(alone=alone)}")


_USAGE = """## How to load it

```python
import patchattn

model = patchattn.from_pretrained("this repository or folder")
```

Loaded by transformers alone, {alone}.
"""


def _section(patch: Patch) -> str:
    info = variant_info(patch.variant)
    paper = f"*{info.title}* ({info.year})"
    if info.arxiv_id is not None:
        paper += f", [arXiv:{info.arxiv_id}](https://arxiv.org/abs/{info.arxiv_id})"
    rows = [f"| `{name}` | `{value}` |" for name, value in patch.config.to_dict().items()]
    table = "\n".join(["| setting | value |", "| --- | --- |", *rows])
    modules = (
        f"On {len(patch.sites)} attention module{'s' if len(patch.sites) > 1 else ''}, the first `{patch.sites[0]}`."
    )
    return f"## {info.name}\n\n{info.summary} {paper}.\n\n{modules}\n\n{table}"


def _repo_id(name: str | None) -> str | None:
    """The name, if it can be that of a Hub repository; the card's metadata refuses a local path."""
    is_id = name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists()
    return name if is_id else None
