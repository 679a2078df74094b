"""What the unpatched model reads of prompts, once for all patches that act behind a prompt."""

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ...core.info import patch_info
from ...core.kv_caches import cache_argument, find_cache
from ...core.patching import is_patched, unpatched
from ...files.tensors import write_tensors

_ROUNDING = 0.01
_LOGITS, _PARTS = "logits", ("keys", "values")
TAIL = 64  # last tokens of a prompt, which every patch reads itself: scores are made of their queries


class Prefixes:
    """Keys and values of all tokens of a prompt but the last `TAIL`, in files.

    Args:
        folder: of the files, which may be removed at any time: what is missing is read again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_checked = False

    def of(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        """The kv cache of a batch's prefix as an argument of `generate`; nothing where there is none to be shared.

        That is so of prompts that are not longer than `TAIL`, and of caches with layers that slide or hold states.

        Args:
            model: patched or not, in evaluation mode; it is the unpatched one that reads.
            ids: `(B, T)` the prompts, padded on the left.
            mask: `(B, T)` 1 for tokens, 0 for padding.

        Raises:
            ValueError: the patched model reads the first prefix that it is asked for otherwise than the unpatched one.
        """
        length = ids.shape[1] - TAIL
        if length < 1:
            return {}
        what = f"{model.config.name_or_path} {model.dtype} {ids.tolist()} {mask.tolist()}"
        path = self._folder / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.safetensors"
        if not path.is_file():
            with unpatched(model) if is_patched(model) else nullcontext():
                read = _read(model, ids[:, :length], mask[:, :length])
            cache = find_cache(read.values())
            if cache is None or any(type(layer) is not DynamicLayer for layer in cache.layers):
                return {}
            tensors = {f"{n}.{key}": getattr(layer, key) for n, layer in enumerate(cache.layers) for key in _PARTS}
            self._folder.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {**tensors, _LOGITS: read.logits[0]}, {})
        held = load_file(path, device=str(model.device))
        before = held.pop(_LOGITS)
        if is_patched(model) and not self._is_checked:
            _check(model, before, _read(model, ids[:, :length], mask[:, :length]).logits[0])
            self._is_checked = True
        cache = DynamicCache(config=model.config)
        for layer in range(len(held) // 2):
            cache.update(*(held[f"{layer}.{key}"] for key in _PARTS), layer)
        return cache_argument(model, cache)


def _read(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    """What `generate` gives with one new token, which says what comes behind; it knows what positions models need."""
    with torch.inference_mode():
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )


def _check(model: Any, before: torch.Tensor, now: torch.Tensor) -> None:
    """Other machines round otherwise; what a patch changes is more than that."""
    apart = float((now - before).norm() / before.norm())
    if apart > _ROUNDING:
        names = ", ".join(dict.fromkeys(patch["variant"] for patch in patch_info(model)["patches"]))
        raise ValueError(
            f"{names}: is said to act behind a prompt, and changes what is read of one (logits by {100 * apart:.2g} "
            "percent): leave out behind_prompt."
        )
