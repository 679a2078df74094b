"""`check_patch`: does a patch behave on this model, with these inputs?"""

import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache

from ..core.host import find_sites
from ..core.kv_caches import cache_argument, find_cache, takes_cache
from ..core.patching import applied_patches, apply_patches, is_patched, patched, unpatch_model, unpatched
from ..core.plan import Patch
from ..core.registry import variant_info
from ..core.selection import base_model, evaluating
from ..core.variant import VariantConfig
from .forwards import TOLERANCE, difference, first_output, inputs_for

_REPEATS = 5  # timed pairs of forwards
_PAD = 3  # tokens of padding added


@dataclass(frozen=True)
class Check:
    """One thing checked.

    Attributes:
        name: what must be true.
        status: `passed`, `failed`, or `not applicable` to this model or these inputs (`detail` says why).
        error: largest difference, relative to the largest output; 0 is equality to the last bit.
        base_error: the same of the unpatched model, where it may have one.
        detail: how it was checked.
    """

    name: str
    status: Literal["passed", "failed", "not applicable"]
    error: float | None = None
    base_error: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class CheckReport:
    """What `check_patch` found.

    Attributes:
        model: class of the model.
        patches: the plan that was checked.
        dtype, device: of the model.
        sites: number of patched attention modules.
        inline: classes of those that compute attention in their own code.
        checks: one entry per property.
        milliseconds, base_milliseconds: median time of one forward, patched and unpatched, measured in turn.
    """

    model: str
    patches: list[dict[str, Any]]
    dtype: str
    device: str
    sites: int
    milliseconds: float
    base_milliseconds: float
    inline: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """No check failed."""
        return all(check.status != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON types."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        names = " + ".join(patch["variant"] for patch in self.patches)
        lines = [f"{self.model} with {names} on {self.sites} attention modules ({self.dtype}, {self.device})"]
        if self.inline:
            lines.append(
                f"  note: {', '.join(self.inline)}: attention in the model's own code, so that no fused kernel takes "
                "its place, and memory grows with the square of the length wherever that code computes weights"
            )
        for check in self.checks:
            error = "" if check.error is None else f"  error {check.error:.1e}"
            base = "" if check.base_error is None else f" (unpatched {check.base_error:.1e})"
            lines.append(f"  {check.status:14} {check.name}{error}{base}{'  ' + check.detail if check.detail else ''}")
        ratio = self.milliseconds / self.base_milliseconds
        lines.append(f"  forward: {self.milliseconds:.2f} ms, unpatched {self.base_milliseconds:.2f} ms ({ratio:.2f}x)")
        return "\n".join(lines)


def check_patch(
    model: nn.Module,
    inputs: Mapping[str, Any] | torch.Tensor | None = None,
    variant: str | Sequence[str] | None = None,
    config: VariantConfig | Mapping[str, Any] | None = None,
) -> CheckReport:
    """Check a patch on a model and inputs of one's own. The model is afterwards as it was, patched or not.

    Checked are: neutral settings equal the unpatched model to the last bit, those of variants that only sum in another
    order (`neutral_rounds`) within a tolerance; unpatching restores it to the last bit; padding changes no real token;
    a forward with a kv cache and decoding in chunks equal one forward without.

    Args:
        model: a patched model, or an unpatched one together with `variant`.
        inputs: keyword arguments of one forward, or input ids `(B, T)`; random tokens or pixels by default.
        variant: what to patch an unpatched model with for the length of the check.
        config: settings of `variant`; see `patch_model`.

    Returns:
        A report; `print(report)` shows it, `report.passed` sums it up.

    Raises:
        ValueError: the model is patched and `variant` is given, neither of the two, or inputs must be given.
    """
    if is_patched(model) and variant is not None:
        raise ValueError("The model is patched already: leave variant out to check that patch, or unpatch it first.")
    if not is_patched(model) and variant is None:
        raise ValueError("The model is not patched: patch it first, or say which variant to check.")
    given = inputs_for(model, inputs)
    if variant is None:
        with evaluating(model):
            return _report(model, given)
    with evaluating(model), patched(model, variant, config):
        return _report(model, given)


def _report(model: nn.Module, inputs: dict[str, Any]) -> CheckReport:
    plan = applied_patches(base_model(model))
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    with unpatched(model):
        checks = [_check_neutral(model, inputs, plan), _check_restore(model, inputs, plan)]
    for name, probe in (("padding changes no real token", _padding), ("cached decoding equals one forward", _caching)):
        checks.append(_check_probe(name, probe, model, inputs, TOLERANCE.get(parameter.dtype, 1e-4)))
    patched_sites = {site for patch in plan for site in patch.sites}
    classes = [
        site.module_class for site in find_sites(base_model(model)) if site.inline and site.name in patched_sites
    ]
    base_times, times = _times(model, inputs)
    return CheckReport(
        model=type(base_model(model)).__name__,
        patches=[patch.to_dict() for patch in plan],
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=str(parameter.device),
        sites=len(patched_sites),
        inline=sorted(set(classes)),
        checks=checks,
        milliseconds=statistics.median(times),
        base_milliseconds=statistics.median(base_times),
    )


def _check_neutral(model: nn.Module, inputs: dict[str, Any], plan: list[Patch]) -> Check:
    expected = first_output(model, inputs)
    neutral, tolerance = [], 0.0
    for patch in plan:
        variant = variant_info(patch.variant).variant
        tolerance = TOLERANCE[expected.dtype] if variant.neutral_rounds else tolerance
        settings = {**patch.config.to_dict(), **variant.neutral_config()}
        neutral.append(Patch(patch.variant, variant.config_class.from_dict(settings), patch.sites))
    apply_patches(base_model(model), neutral)
    try:
        error = difference(first_output(model, inputs), expected)
    finally:
        unpatch_model(model)
    return Check("neutral settings equal the unpatched model", "passed" if error <= tolerance else "failed", error)


def _check_restore(model: nn.Module, inputs: dict[str, Any], plan: list[Patch]) -> Check:
    expected, keys = first_output(model, inputs), list(model.state_dict())
    apply_patches(base_model(model), plan)
    first_output(model, inputs)
    unpatch_model(model)
    error = difference(first_output(model, inputs), expected)
    same = error == 0 and list(model.state_dict()) == keys
    return Check("unpatching restores the model", "passed" if same else "failed", error)


def _check_probe(
    name: str,
    probe: Callable[[nn.Module, dict[str, Any]], float | str],
    model: nn.Module,
    inputs: Any,
    tolerance: float,
) -> Check:
    error = probe(model, inputs)
    if isinstance(error, str):
        return Check(name, "not applicable", detail=error)
    with unpatched(model):
        base_error = probe(model, inputs)
    if isinstance(base_error, str):
        return Check(name, "not applicable", error, detail=base_error)
    return Check(name, "passed" if error <= max(tolerance, 4 * base_error) else "failed", error, base_error)


def _padding(model: nn.Module, inputs: dict[str, Any]) -> float | str:
    """Largest relative error that padding one row of two makes on real tokens, or why that cannot be seen."""
    tokens = _plain_tokens(inputs, "input_ids")
    if isinstance(tokens, str):
        return tokens
    base: Any = base_model(model)
    paired = base.config.is_encoder_decoder
    takes_positions = "position_ids" in inspect.signature(base.forward).parameters
    left = takes_positions and _is_causal(model)
    real = slice(_PAD, None) if left else slice(0, tokens.shape[1] - _PAD)
    mask = torch.ones_like(tokens).repeat(2, 1)
    mask[1] = 0
    mask[1, real] = 1
    extra = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if left else {}
    decoder = {"decoder_input_ids": inputs["decoder_input_ids"][:1]} if paired else {}
    pairs = {name: value.repeat(2, 1) for name, value in decoder.items()}
    pad = getattr(base.config.get_text_config(), "pad_token_id", None) or 0
    padded = tokens.repeat(2, 1).masked_fill(mask == 0, pad)
    together = first_output(model, {"input_ids": padded, "attention_mask": mask, **extra, **pairs})
    if together.dim() != 3:
        return "the output has no row per token"
    rows = slice(None) if paired else real  # a decoder's rows are all real
    return max(
        difference(together[1:, rows], first_output(model, {"input_ids": padded[1:, real], **decoder})),
        difference(together[:1], first_output(model, {"input_ids": tokens, **decoder})),
    )


def _caching(model: nn.Module, inputs: dict[str, Any]) -> float | str:
    """Largest relative error of one forward with a kv cache, and of decoding in chunks with one, against a forward
    without; or why there is none."""
    base: Any = base_model(model)
    if ahead := [p.variant for p in applied_patches(base) if p.looks_ahead]:
        return f"under {ahead[0]!r} the rows of one forward depend on later ones, or on where calls end"
    paired = base.config.is_encoder_decoder
    if not (paired or _is_causal(model)):
        return "the model has no causal decoder"
    if not takes_cache(model):
        return "the model takes no kv cache"
    name = "decoder_input_ids" if paired else "input_ids"
    tokens = _plain_tokens(inputs, name)
    if isinstance(tokens, str):
        return tokens
    given = {key: value[:1] for key, value in inputs.items() if key != name} if paired else {}
    full = first_output(model, {**given, name: tokens, "use_cache": False})
    at_once = difference(first_output(model, {**given, name: tokens, "use_cache": True}), full)
    cache = None if paired else DynamicCache(config=base.config.get_text_config())
    half, parts = tokens.shape[1] // 2, []
    for chunk in tokens.split([half, tokens.shape[1] - half - 1, 1], dim=1):
        with torch.no_grad():
            result = model(**given, **{name: chunk}, **cache_argument(model, cache), use_cache=True)
        cache = find_cache(result.values())
        if paired:
            given = {"encoder_outputs": (result.encoder_last_hidden_state,)}
        parts.append(result.logits if "logits" in result else result.last_hidden_state)
    return max(at_once, difference(torch.cat(parts, dim=1), full))


def _plain_tokens(inputs: dict[str, Any], name: str) -> torch.Tensor | str:
    """One row of text `(1, T)` without padding, or why the inputs hold none."""
    tokens, mask = inputs.get(name), inputs.get("attention_mask") if name == "input_ids" else None
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
        return f"the inputs hold no {name}"
    text = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "decoder_input_ids"}
    if name == "input_ids" and (others := sorted(set(inputs) - text)):
        return f"the inputs hold more than text ({', '.join(others)})"
    row = tokens[0] if mask is None else tokens[0][mask[0].bool()]
    least = _PAD + 1
    return row[None] if len(row) >= least else f"the first row has fewer than {least} tokens"


def _is_causal(model: nn.Module) -> bool:
    base: Any = base_model(model)
    return hasattr(base, "generate") and base.can_generate()


def _times(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Milliseconds of forwards, unpatched and patched in turn, so that both see the same machine."""
    base_times, times = [], []
    for _ in range(_REPEATS):
        times.append(_time(model, inputs))
        with unpatched(model):
            base_times.append(_time(model, inputs))
    return base_times, times


def _time(model: nn.Module, inputs: dict[str, Any]) -> float:
    first_output(model, inputs)  # warm-up
    _synchronize(model)
    start = time.perf_counter()
    first_output(model, inputs)
    _synchronize(model)
    return (time.perf_counter() - start) * 1e3


def _synchronize(model: nn.Module) -> None:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
