"""The model `patchattn` of EleutherAI's lm-evaluation-harness: its own `hf`, patched. Needs `patchattn[eval]`."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ...core.patching import applied_patches, is_patched, patch_model
from ...core.registry import list_variants, variant_info
from ...core.selection import base_model
from ...core.settings import nearest
from ...files.documents import parse_yaml, read_json_object
from ...saving.checkpoint import is_patch_alone, load_patch
from ...saving.patch_files import read_patch
from ...saving.whole_model import patched_class, saved_plan

# These load weights in ways of their own, after which nothing has been patched.
_REFUSED = ("autogptq", "delta", "gptqmodel")
_LOADING = ("attn_implementation", "cache_dir", "device_map", "token")  # of transformers' from_pretrained
_OWN = ("layers", "modules", "patch", "preset", "variant")


@register_model("patchattn")
class PatchattnLM(HFLM):
    """lm-eval's `hf` model, patched: `--model patchattn --model_args pretrained=...,variant=moh,active_ratio=0.75`.

    Args:
        pretrained: folder or Hub id of a model. One that was saved patched comes with its patch; so does a folder that
            `save_patch` wrote, with its base model, and with the PEFT adapter beside it if there is one.
        variant: name of a variant, or several joined by `+`, the first outermost.
        patch: a saved patch, folder or Hub id, instead of `variant`.
        others: `layers`, `modules`, `preset` and the settings of the variant as `patch_model` takes them, by name or by
            variant and name, such as `moh.active_ratio=0.75`; every argument of lm-eval's `hf` but `autogptq`, `delta`
            and `gptqmodel`; `attn_implementation`, `cache_dir`, `device_map` and `token` of `from_pretrained`. Text
            that goes to a variant is read as YAML.

    Raises:
        ValueError: an unknown argument, variant, setting or value; before anything is loaded.
        TypeError: `pretrained` is not a string.
    """

    AUTO_MODEL_CLASS: Any
    batch_size_per_gpu: Any

    def __init__(self, pretrained: str, variant: str | None = None, patch: str | None = None, **others: Any) -> None:
        if not isinstance(pretrained, str):
            raise TypeError(
                f"pretrained must be a folder or a Hub id, got {type(pretrained).__name__}. A model that is loaded and "
                "patched already goes to lm_eval.models.huggingface.HFLM."
            )
        if variant is not None and patch is not None:
            raise ValueError(f"Give variant={variant!r} or patch={patch!r}, not both: a saved patch says what it is.")
        if patch in list_variants() and not Path(str(patch)).exists():
            raise ValueError(f"{patch!r} is a variant: write variant={patch}. A patch is a folder that was saved.")
        self._names = [name.strip() for name in variant.split("+")] if variant else []
        self._settings, self._where, arguments = _sorted_arguments(self._names, others)
        for name in self._names:
            variant_info(name).configure(self._settings[name])
        pretrained, self._patch, adapter = _sources(pretrained, patch)
        if adapter is not None:
            arguments.setdefault("peft", adapter)
        super().__init__(pretrained=pretrained, **arguments)
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None:  # on CPUs lm-eval would let every process do all of the work
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        plan = applied_patches(base_model(self.model)) if is_patched(self.model) else []
        self._looks_ahead = any(part.looks_ahead for part in plan)

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        """Patch between loading the weights and putting an adapter on, which may hold a variant's parameters."""
        plain = self.AUTO_MODEL_CLASS
        architectures = getattr(self.config, "architectures", None) or [None]
        was_patched = saved_plan(pretrained, revision=kwargs.get("revision") or "main") is not None
        self.AUTO_MODEL_CLASS = _Loading(patched_class(architectures[0]) if was_patched else plain, self._put_patch)
        try:
            super()._create_model(pretrained, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = plain

    def _put_patch(self, model: Any) -> None:
        if self._patch is not None:
            load_patch(model, self._patch)
        if self._names:
            settings = self._settings if len(self._names) > 1 else self._settings[self._names[0]]
            patch_model(model, self._names, settings, **self._where)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        """Row by row where later tokens count: HFLM pads on the right and tells the model nothing of it."""
        given = self.batch_size_per_gpu
        if self._looks_ahead:
            self.batch_size_per_gpu = 1
        try:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        finally:
            self.batch_size_per_gpu = given

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results about the model; what is patched among it."""
        from ...version import __version__

        plan = [part.to_dict() for part in applied_patches(base_model(self.model))]
        return {**super().get_model_info(), "patchattn_version": __version__, "patches": plan}


class _Loading:
    """Stands in for an Auto class: what it loads is patched before anyone else sees it."""

    def __init__(self, kind: Any, patch: Callable[[Any], None]) -> None:
        self.kind, self.patch = kind, patch

    def from_pretrained(self, source: str, **kwargs: Any) -> Any:
        model = self.kind.from_pretrained(source, **kwargs)
        self.patch(model)
        return model


def run_lm_eval(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, with the model `patchattn` known to it."""
    given = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = given


def _sorted_arguments(
    names: Sequence[str], given: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Settings by variant, where to patch, and what goes to HFLM; ValueError on an argument of none of them."""
    fields = {name: ["preset", *variant_info(name).config_fields] for name in names}
    hflm = [*set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs", *_REFUSED}, *_LOADING]
    settings: dict[str, dict[str, Any]] = {name: {} for name in names}
    where: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        prefix, _, rest = key.rpartition(".")
        owners = [name for name in names if prefix in ("", name) and rest in fields[name]]
        if key in hflm:
            arguments[key] = value
        elif len(owners) == 1:
            settings[owners[0]][rest] = _value(key, value)
        elif owners:
            spelt = " or ".join(f"{name}.{rest}" for name in owners)
            raise ValueError(f"{key!r} is a setting of {' and '.join(owners)}: write {spelt}.")
        elif names and key in ("layers", "modules"):
            where[key] = _value(key, value)
        else:
            known = {*_OWN, *hflm, *(field for name in names for field in fields[name])}
            if key in _OWN:
                raise ValueError(f"{key!r} needs variant=NAME.")
            if having := [name for name in list_variants() if not names and rest in variant_info(name).config_fields]:
                raise ValueError(f"{key!r} is a setting of {' and '.join(having)}: it needs variant={having[0]}.")
            raise ValueError(f"The model 'patchattn' has no argument {key!r}{nearest(key, sorted(known))}")
    return settings, where, arguments


def _value(key: str, value: Any) -> Any:
    return parse_yaml(value, f"{key}={value}", has_lines=False) if isinstance(value, str) else value


def _sources(pretrained: str, patch: str | None) -> tuple[str, str | None, str | None]:
    """Base model, patch and adapter; a folder with a patch alone says where its base model came from."""
    folder = Path(pretrained)
    if not is_patch_alone(folder):
        return pretrained, patch, None
    has_adapter = (folder / "adapter_config.json").is_file()
    adapter = read_json_object(folder / "adapter_config.json") if has_adapter else {}
    base = adapter.get("base_model_name_or_path") or read_patch(folder).base.get("name_or_path")
    if not base:
        raise ValueError(f"{folder} does not say where its base model came from: give pretrained=MODEL,patch={folder}.")
    if patch is not None:
        raise ValueError(f"{folder} is a patch already; patch={patch!r} would be a second one.")
    return base, str(folder), str(folder) if has_adapter else None
