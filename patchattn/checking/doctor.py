"""`patchattn doctor`: do the releases at hand carry a patch? What to run after upgrading anything.

Every variant is put on a tiny random decoder or encoder, of text or of images: it must change the outputs, be neutral
where it says so, be undone to the last bit, leave real tokens alone where padding is added, agree with itself when
decoding from a cache, and come back from disk. One patch is held against attention that nothing of patchattn touched.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    DynamicCache,
    EuroBertConfig,
    EuroBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from ..core.kv_caches import cache_argument
from ..core.packing import CHILD
from ..core.patching import applied_patches, patch_model, patched, unpatch_model
from ..core.registry import list_variants, variant_info
from ..core.selection import base_model
from ..core.variant import Variant
from ..saving.checkpoint import from_pretrained, load_patch, save_patch
from ..surgery.kv_merge import KvMerge
from .check import check_patch

_REFERENCE = "patchattn_doctor"
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


@dataclass(frozen=True)
class Finding:
    """One thing that must be true of a working installation.

    Attributes:
        what: was looked at.
        problem: what is wrong with it, None if nothing is.
    """

    what: str
    problem: str | None


def self_test(device: str = "cpu") -> Iterator[Finding]:
    """Patch tiny models with every variant that fits, and check each; one finding per model and variant.

    Args:
        device: where to.
    """
    for base in ("eager", "sdpa"):
        yield Finding(f"a patch on {base} attention", _reason(partial(_compare_with_reference, device, base)))
    kinds = {
        "decoder": (_decoder, {"causal", "gqa"}, False),
        "encoder": (_encoder, {"bidirectional"}, False),
        "image encoder": (_image_encoder, {"bidirectional"}, True),
    }
    for kind, (make, needed, has_grid) in kinds.items():
        for name in list_variants():
            info = variant_info(name)
            needs_grid = info.variant.needs_grid is not Variant.needs_grid
            fits = {*needed, "without_images"} <= info.capabilities and needs_grid is has_grid
            if info.kind != "decoding" and fits:
                merges = kind == "encoder" and issubclass(info.variant, KvMerge)
                model = _grouped_encoder if merges else make
                yield Finding(f"{name}, {kind}", _reason(partial(_try_variant, name, model, device)))


def _reason(run: Callable[[], str | None]) -> str | None:
    """What is wrong, in words; None if nothing is. Whatever an upgrade broke, the other checks still run."""
    try:
        return run()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _decoder() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2)).eval()


def _encoder() -> Any:
    torch.manual_seed(0)
    return BertModel(BertConfig(**_SIZES)).eval()


def _grouped_encoder() -> Any:
    """One whose configuration has a number of kv heads, for what changes it."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 2}
    return EuroBertModel(EuroBertConfig(**_SIZES, **special, num_key_value_heads=2)).eval()


def _image_encoder() -> Any:
    """One for what needs a grid of patches, here of 4 x 4."""
    torch.manual_seed(0)
    sizes = {name: size for name, size in _SIZES.items() if name != "vocab_size"}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4)).eval()


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    if model.main_input_name == "input_ids":
        return {"input_ids": _tokens(model)}
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels.to(model.device)}


def _tokens(model: Any) -> torch.Tensor:
    return torch.arange(3, 35, device=model.device).view(2, 16)


@torch.no_grad()
def _output(model: Any) -> torch.Tensor:
    first: torch.Tensor = model(**_inputs(model))[0]
    return first


@torch.no_grad()
def _continued(model: Any) -> torch.Tensor:
    """Logits of the last tokens, which come one by one behind the others."""
    tokens, cache, logits = _tokens(model), DynamicCache(config=model.config), []
    for part in (tokens[:, :-2], tokens[:, -2:-1], tokens[:, -1:]):
        logits.append(model(part, **cache_argument(model, cache))[0][:, -1])
    return torch.stack(logits)


def _compare_with_reference(device: str, base: str) -> str | None:
    """A head that `prune` masks, beside attention in plain torch that leaves it out; patchattn has no part in that."""

    def without_head(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
        logits = query @ key.mT / query.shape[-1] ** 0.5
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        output = logits.masked_fill(later, -torch.inf).softmax(-1) @ value
        output[:, 1] = 0.0
        return output.transpose(1, 2), None

    model = _decoder().to(device)
    model.set_attn_implementation(base)
    with patched(model, "prune", heads={0: [1], 1: [1]}, physical=False):
        found = _output(model)
    AttentionInterface.register(_REFERENCE, without_head)
    try:
        model.set_attn_implementation(_REFERENCE)
        expected = _output(model)
    finally:
        AttentionInterface._global_mapping.pop(_REFERENCE, None)
    error = float((found - expected).abs().max())
    return None if error < 1e-4 else f"a patched model is {error:.1e} off from the same attention in plain torch"


def _try_variant(name: str, make: Callable[[], Any], device: str) -> str | None:
    info, model = variant_info(name), make().to(device)
    # What drops keys of a kv cache, or reads fewer of them while decoding, changes only what comes after.
    output = _continued if info.kind == "cache" or "bidirectional" not in info.capabilities else _output
    before = output(model)
    patch_model(model, name, info.examples[0])
    _randomise(model)
    after = output(model)
    if not bool(after.isfinite().all()):
        return "the patched model's outputs are not finite"
    if torch.equal(after, before):
        return "the patch changes nothing: the model does not call it"
    for check in check_patch(model, _inputs(model)).checks:
        if check.status == "failed":
            return f"not true: {check.name} (error {check.error:.1e})"
    if model.can_generate() and not any(patch.looks_ahead for patch in applied_patches(model)):
        cached, anew = (_generated(model, use_cache) for use_cache in (True, False))
        if not torch.equal(cached, anew):
            return "generate gives other tokens from a cache than without"
    with TemporaryDirectory() as folder:
        save_patch(model, folder)
        if not torch.equal(output(load_patch(make().to(device), folder)), after):
            return "a patch that was saved and loaded computes something else"
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if not torch.equal(output(from_pretrained(folder).to(model.device)), after):
            return "a patched model that was saved and loaded computes something else"
    unpatch_model(model)
    return None if torch.equal(output(model), before) else "the unpatched model is not the one of before"


def _generated(model: Any, use_cache: bool) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        _tokens(model), max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0
    )
    return tokens


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Give a variant's parameters values that matter; they start out neutral."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in base_model(model).named_parameters():
        if CHILD in name.split("."):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
