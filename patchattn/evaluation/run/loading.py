"""Models for `patchattn eval`: what can be said of one before it is loaded, and loading it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from ...saving.checkpoint import from_pretrained, is_patch_alone
from ...saving.patch_files import read_patch
from ...saving.pretrained import load_pretrained
from ...saving.whole_model import saved_plan
from ..tasks.task import ModelKind

_KINDS: dict[ModelKind, tuple[str, tuple[str, ...]]] = {
    "classifier": ("ForSequenceClassification", ("ForSequenceClassification",)),
    "causal_lm": ("ForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "vision_language": ("ForImageTextToText", ("ForConditionalGeneration",)),
}


@dataclass(frozen=True)
class Source:
    """A model that is not loaded yet.

    Attributes:
        name: folder or Hub id.
        kind: what it is for.
        is_patched: whether it was saved with patches on it.
        base: folder or Hub id of its base model, where it is a patch alone; else the name.
    """

    name: str
    kind: ModelKind
    is_patched: bool
    base: str

    def load(self, device: Any) -> Any:
        """The model on a device, in evaluation mode."""
        if self.is_patched:
            return from_pretrained(self.name, dtype="auto").eval().to(device)
        auto = getattr(transformers, f"AutoModel{_KINDS[self.kind][0]}")
        return load_pretrained(auto, self.name, dtype="auto").eval().to(device)

    def load_tokenizer(self, name: str | None = None) -> Any:
        """The tokenizer, or the processor, of the model or of another name; the end of a text pads where nothing does.

        Raises:
            ValueError: there is none.
        """
        auto = AutoProcessor if self.kind == "vision_language" else AutoTokenizer
        loaded = load_pretrained(auto, name or self.base)
        text = getattr(loaded, "tokenizer", loaded)
        if text.pad_token is None:
            text.pad_token = text.eos_token
        return loaded


def find_source(name: str) -> Source:
    """What a folder or a Hub id holds, before the model is loaded.

    Raises:
        ValueError: no configuration there, or that of a model that no task is for.
    """
    folder = Path(name)
    if is_patch_alone(folder):
        saved = read_patch(folder)
        base = saved.base.get("name_or_path")
        if not base:
            raise ValueError(f"{name} is a patch and names no base model: give the base model, and --patch {name}.")
        return Source(name, _kind(name, saved.base.get("architecture"), saved.base.get("model_type")), True, base)
    config = load_pretrained(AutoConfig, name)
    architecture = (config.architectures or [None])[0]
    return Source(name, _kind(name, architecture, config.model_type), saved_plan(name) is not None, name)


def _kind(name: str, architecture: str | None, model_type: str | None) -> ModelKind:
    for kind, (_, endings) in _KINDS.items():
        if architecture is not None and architecture.endswith(endings):
            sees = model_type in transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            if kind != "vision_language" or sees:
                return kind
    raise ValueError(
        f"{name} is a {architecture or 'model without an architecture in its configuration'}; expected a causal "
        "language model, a sequence classifier or a vision-language model."
    )
