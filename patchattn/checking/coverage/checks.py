"""What is asked of one small model: does a patch run, change what it should and nothing else, and come off again."""

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...core.call import AttentionCall
from ...core.patching import is_patched, patch_model, unpatch_model
from ...core.probing import probed
from ...core.registry import list_variants, temporarily_registered, variant_info
from ...core.sites import AttentionSite
from ...core.variant import Attend, AttentionOutput, Variant, VariantConfig, VariantInfo
from ...surgery.projections import head_projections
from ..forwards import TOLERANCE
from .inputs import guesses

_PATIENCE = 5.0  # seconds of computing while guessing inputs for one module


@dataclass
class Findings:
    """What the checks of one model found; `problems` is empty where everything was as it should be."""

    reached: int = 0
    whole_model: bool = False
    geometry: str = ""
    neutral_difference: float | None = None
    half_the_heads: str = ""
    learned_router: str = ""
    ssa: str = ""
    pruning: str = ""
    refusal: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One forward: a module inside the model and what it is called with."""

    path: str
    inputs: dict[str, Any]

    def __call__(self, model: nn.Module) -> list[torch.Tensor]:
        """All tensors of the output."""
        torch.manual_seed(0)  # some models draw random numbers in eval mode
        with torch.no_grad():
            return list(_tensors(model.get_submodule(self.path)(**copy.deepcopy(self.inputs))))


def find_runs(model: PreTrainedModel, sites: list[AttentionSite]) -> tuple[list[Run], set[str], str]:
    """Forwards that together reach as many sites as can be: of the model, then of its parts it did not reach.

    Returns:
        The forwards, the names of the sites they reach, and the last error of the model's own forward, if it failed.
    """
    names = {site.name for site in sites}
    runs: list[Run] = []
    reached: set[str] = set()
    failure = ""
    for path, module in model.named_modules():
        inside = {name for name in names if not path or name.startswith(path + ".")}
        if not isinstance(module, PreTrainedModel) or not inside - reached:
            continue
        found, error = _first_run(model, path, module, inside)
        if found is None:
            failure = failure or f"{type(module).__name__}: {error}"
            continue
        runs.append(found[0])
        reached |= found[1]
    return runs, reached, failure


def _first_run(
    model: nn.Module, path: str, module: PreTrainedModel, inside: set[str]
) -> tuple[tuple[Run, set[str]] | None, str]:
    error = "no inputs to guess"
    start = time.process_time()
    for inputs in guesses(module):
        if time.process_time() - start > _PATIENCE:
            break
        run = Run(path, inputs)
        try:
            with _noting_calls(model, inside) as called:
                outputs = run(model)
        except Exception as caught:  # a wrong guess may fail anywhere in foreign code, in any way
            error = _line(caught)
            continue
        if outputs and called:
            return (run, called), ""
        error = "no attention was called"
    return None, error


@contextmanager
def _noting_calls(model: nn.Module, names: set[str]) -> Iterator[set[str]]:
    called: set[str] = set()
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name in names
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def check(model: PreTrainedModel, sites: list[AttentionSite], runs: list[Run], reached: set[str]) -> Findings:
    """Patch, run, compare and unpatch a model that runs unpatched."""
    findings = Findings(reached=len(reached), whole_model=any(run.path == "" for run in runs))
    before = _state(model)
    base = _outputs(model, runs)
    if difference(base, _outputs(model, runs)) != 0:
        findings.problems.append("two unpatched forwards differ")
    if not any(torch.isfinite(t).any() for t in base if t.is_floating_point()):
        findings.problems.append("the output is not finite")

    _check_neutral(model, runs, base, findings)
    heads = [site.query_heads for site in sites if site.name in reached]
    half = {"active_ratio": 0.5, "shared_ratio": 0.0}
    findings.half_the_heads = _changes(model, runs, base, "moh", half)
    if findings.half_the_heads == "no change" and any((count or 1) > 1 for count in heads):
        findings.problems.append("dropping half of the heads changes nothing")
    findings.learned_router = _changes(model, runs, base, "moh", {**half, "router": "learned", "router_std": 0.5})
    findings.ssa = _changes(model, runs, base, "ssa", {}, fill=0.3)
    findings.pruning = _check_pruning(model, runs, [site for site in sites if site.name in reached], findings)
    findings.geometry = _check_geometry(model, runs, base, reached, findings)
    if any(site.inline for site in sites):
        _check_again(model, runs, base, findings)
    for name in ("half_the_heads", "learned_router", "ssa"):
        if (text := getattr(findings, name)).startswith("error"):
            findings.problems.append(f"{name.replace('_', ' ')}: {text}")

    if difference(base, _outputs(model, runs)) != 0:
        findings.problems.append("the output after unpatching differs")
    after = _state(model)
    findings.problems += [f"unpatching left a change in {part}" for part in after if after[part] != before[part]]
    return findings


def _check_neutral(model: PreTrainedModel, runs: list[Run], base: list[torch.Tensor], findings: Findings) -> None:
    for name in list_variants("attention"):
        variant = variant_info(name).variant
        try:
            patch_model(model, name, variant.neutral_config())
            apart = difference(base, _outputs(model, runs))
            if variant.neutral_rounds and apart <= TOLERANCE[base[0].dtype]:
                apart = 0.0
            findings.neutral_difference = max(apart, findings.neutral_difference or 0.0)
            if apart != 0:
                findings.problems.append(f"neutral {name} differs by {apart:.1e}")
        except NotImplementedError:
            pass  # a refusal is not a difference; it is recorded where the variant is run in earnest
        except Exception as error:  # what foreign model code raises is a finding, not the end of the sweep
            if isinstance(error, ValueError) and not is_patched(model):
                continue  # it asks for a choice, such as between stacks of layers
            findings.problems.append(f"neutral {name}: {_line(error)}")
        finally:
            _clean(model)


def _changes(
    model: PreTrainedModel,
    runs: list[Run],
    base: list[torch.Tensor],
    variant: str,
    settings: dict[str, Any],
    fill: float = 0.0,
) -> str:
    """`runs` if the variant runs and changes the output, else what happened instead."""
    torch.manual_seed(1)
    try:
        patch_model(model, variant, settings)
        if fill:
            for module in model.modules():
                for parameter in module.parameters() if isinstance(module, Variant) else ():
                    parameter.data.normal_(std=fill)
        return "runs" if difference(base, _outputs(model, runs)) != 0 else "no change"
    except NotImplementedError as error:
        return f"refused: {error}"
    except Exception as error:  # see _check_neutral
        return f"error: {_line(error)}"
    finally:
        _clean(model)


def _check_pruning(model: PreTrainedModel, runs: list[Run], sites: list[AttentionSite], findings: Findings) -> str:
    """Whether taking the first head out of the weights equals masking it; on how many modules, or why on none."""
    refusals: list[str] = []
    heads: dict[str, list[int]] = {}
    for site in sites:
        try:
            head_projections(model, site)
        except NotImplementedError as error:
            refusals.append(str(error))
        else:
            if (site.query_heads or 1) > 1:
                heads[site.name] = [0]
    if not heads:
        return f"refused: {refusals[0]}" if refusals else "not tried: one head"
    try:
        outputs = []
        for physical in (False, True):
            patch_model(model, "prune", heads=heads, physical=physical)
            outputs.append(_outputs(model, runs))
            unpatch_model(model)
        # Some models give attention maps unasked, and those of removed heads are not there.
        pairs = [(left, right) for left, right in zip(*outputs, strict=True) if left.shape == right.shape]
        scale = max(float(t.abs().max()) for t, _ in pairs if t.is_floating_point() and t.numel())
        apart = max(difference([left], [right]) for left, right in pairs)
        if apart > 1e-4 * max(scale, 1.0):
            findings.problems.append(f"pruning: removed heads differ from masked ones by {apart:.1e}")
    except Exception as error:  # see _check_neutral
        findings.problems.append(f"pruning: {_line(error)}")
    finally:
        _clean(model)
    reason = f": refused: {refusals[0]}" if refusals else ""
    return f"exact on {len(heads)} of {len(sites)}{reason}"


class _Again(Variant):
    """Hands on the same numbers in other tensors, so that an inline module computes all of it again."""

    config_class = VariantConfig

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        return inner(call.replace(query=call.query.clone(), key=call.key.clone(), value=call.value.clone()))


_AGAIN = VariantInfo(
    name="coverage_again",
    variant=_Again,
    title="",
    arxiv_id=None,
    year=2026,
    summary="",
    extra_parameters="",
    needs_training=False,
)


def _check_again(model: PreTrainedModel, runs: list[Run], base: list[torch.Tensor], findings: Findings) -> None:
    """Whether attention that is computed again from the tensors that variants see is that of the model."""
    with temporarily_registered(_AGAIN):
        try:
            patch_model(model, _AGAIN.name)
            apart = difference(base, _outputs(model, runs))
            scale = max((float(t.abs().max()) for t in base if t.is_floating_point() and t.numel()), default=1.0)
            if apart > 1e-5 * max(scale, 1.0):
                findings.problems.append(f"attention computed again differs by {apart:.1e}")
        except NotImplementedError as error:
            findings.refusal = str(error)
        except Exception as error:  # see _check_neutral
            findings.problems.append(f"attention computed again: {_line(error)}")
        finally:
            _clean(model)


def _check_geometry(
    model: PreTrainedModel, runs: list[Run], base: list[torch.Tensor], reached: set[str], findings: Findings
) -> str:
    """Compare what the sites state with the shapes of the calls; `right`, or what is wrong where."""
    wrong: list[str] = []
    seen: set[str] = set()
    notes: list[str] = []

    def compare(call: AttentionCall, output: torch.Tensor) -> None:
        site = call.site
        seen.add(site.name)
        stated = (site.query_heads, site.kv_heads, site.head_dim)
        actual = (call.query.shape[1], call.key.shape[1], call.query.shape[-1])
        for what, said, is_so in zip(("query heads", "kv heads", "head dim"), stated, actual, strict=True):
            if said is None:
                notes.append(f"{what} unknown in {site.module_class}")
            elif said != is_so:
                wrong.append(f"{site.module_class}: {what} {said}, really {is_so}")
        try:
            tokens = call.context.layer_input()
            if site.input_size is not None and tokens.shape[-1] != site.input_size:
                wrong.append(f"{site.module_class}: input size {site.input_size}, really {tokens.shape[-1]}")
        except NotImplementedError:
            notes.append(f"input not aligned in {site.module_class}")
        memory = call.context.module_call().memory
        if memory is not None and not site.is_cross:
            notes.append(f"self attention called with another sequence in {site.module_class}")

    try:
        with probed(model, compare):
            if (apart := difference(base, _outputs(model, runs))) != 0:
                findings.problems.append(f"looking at attention changes the output by {apart:.1e}")
    except NotImplementedError as error:  # of a module whose own code is not understood
        findings.refusal = str(error)
    except Exception as error:  # see _check_neutral
        findings.problems.append(f"probe: {_line(error)}")
    if unseen := sorted({type(model.get_submodule(n)).__name__ for n in reached - seen}):
        wrong.append(f"{', '.join(unseen)}: run, but attention was not called through the seam")
    findings.problems += dict.fromkeys(wrong)
    return "; ".join(dict.fromkeys([*wrong, *notes])) or "right"


def _clean(model: PreTrainedModel) -> None:
    with suppress(ValueError):  # the patch was refused, so there is none
        unpatch_model(model)


def _state(model: PreTrainedModel) -> dict[str, Any]:
    """What a patch must leave as it was."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return {
        "the state dict's keys": list(model.state_dict()),
        "the configuration": model.config.to_dict(),
        "the attention implementation": [getattr(config, "_attn_implementation", None) for config in configs],
        "the hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def _outputs(model: nn.Module, runs: list[Run]) -> list[torch.Tensor]:
    return [tensor for run in runs for tensor in run(model)]


def difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Largest absolute difference; 0 only if all is equal to the last bit, NaN being equal to itself."""
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if not a.numel() or torch.equal(a, b):
            continue
        a, b = torch.view_as_real(a) if a.is_complex() else a, torch.view_as_real(b) if b.is_complex() else b
        apart = (a.double() - b.double()).abs()
        apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, apart.nan_to_num(torch.inf))
        worst = max(worst, float(apart.max()))
    return worst


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value.detach()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:200]
