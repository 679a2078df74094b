"""DuoAttention's gates: which kv heads need keys from far away, learned by distillation. arXiv 2410.10819."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from patchattn_kernels import sink_and_recent

from ..core.call import AttentionCall
from ..core.heads import BaseFacts
from ..core.patching import is_patched, patch_model, unpatch_model
from ..core.registry import temporarily_registered
from ..core.selection import base_model, causal_sites, input_device, select_sites
from ..core.settings import option
from ..core.sites import AttentionSite
from ..core.variant import Attend, AttentionOutput, Variant, VariantConfig, VariantInfo
from ..files.documents import parse_json, quoted
from ..files.tensors import fingerprint, write_tensors
from ..reading.gates import HeadGates
from .passkeys import PasskeyText

_NAME = "duo_gates"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch's Adam calls them


@dataclass(frozen=True, kw_only=True)
class _GatedConfig(VariantConfig):
    sinks: int = option(128, help="First keys.", minimum=0)
    recent: int = option(256, help="Last keys, a token's own among them.", minimum=1)


class _Gated(Variant):
    """Attention of each kv head between that to all keys, gate 1, and that to the first and the last ones, gate 0."""

    config_class = _GatedConfig
    config: _GatedConfig
    sees_all = False

    def __init__(self, config: _GatedConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads, kv_heads = (site.require(count, by="the calibration of gates") for count in ("query_heads", "kv_heads"))
        self.heads, self.group = heads, heads // kv_heads
        self.gate = nn.Parameter(torch.ones(kv_heads))

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if self.sees_all:
            return inner(call)
        keep = sink_and_recent(self.config.sinks, self.config.recent, self.heads, call.query.device)
        whole, weights = inner(call)
        near, _ = inner(call.seeing(keep))
        gate = self.gate.repeat_interleave(self.group)[:, None].to(whole.dtype)
        return gate * whole + (1.0 - gate) * near, weights


_INFO = VariantInfo(
    name=_NAME,
    variant=_Gated,
    title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    arxiv_id="2410.10819",
    year=2024,
    summary="Attention of each kv head between that to all keys and that to the first and the last ones.",
    extra_parameters="one gate per kv head",
    needs_training=True,
)


def learn_gates(
    model: nn.Module,
    text: Callable[[int], PasskeyText],
    *,
    steps: int = 2000,
    learning_rate: float = 0.02,
    penalty: float = 0.05,
    sinks: int = 128,
    recent: int = 256,
    modules: str | list[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    about: Mapping[str, Any] | None = None,
    save_every: int = 50,
    progress: Callable[[int], None] | None = None,
) -> HeadGates:
    """Learn a gate for each kv head: how much of its attention has to reach far.

    The last hidden states, with heads between streaming and full attention, are to be those of the model itself:

        sum over the tokens asked of mean over width (h_model - h_gated)^2 / their number + penalty * mean |gate| .

    Gates start at 1 and stay from 0 to 1; nothing else is trained, and the model is as before afterwards.

    Args:
        model: a causal language model that is not patched, in evaluation mode.
        text: gives the text of each step, from 0.
        steps: of AdamW without weight decay, of one text each. Its rate rises over the first fifth and falls over the
            last, never below a tenth of the highest.
        learning_rate: the highest.
        penalty: lambda, the weight of the gates.
        sinks: first keys of a text that heads see where they stream.
        recent: last keys likewise, a token's own among them.
        modules: names of attention modules, or regular expressions; needed where a model has several towers.
        resume: a file to which the state is written every `save_every` steps, and from which it goes on.
        about: what the texts are, to be compared with what the file was written for.
        save_every: see there.
        progress: called with the number of steps done.

    Raises:
        ValueError: an argument out of range, a model that is patched or training, modules that are not all layers of
            one decoder, or a file of another calibration.
        NotImplementedError: no attention module is causal self-attention.
    """
    if min(steps, save_every) < 1 or learning_rate <= 0 or penalty < 0:
        raise ValueError(
            f"Expected steps and save_every of at least 1, a learning_rate above 0 and a penalty of at least 0, got "
            f"{steps}, {save_every}, {learning_rate} and {penalty}."
        )
    base: Any = base_model(model)
    if base.training:
        raise ValueError("Gates are learned with the model in evaluation mode: model.eval().")
    if is_patched(base):
        raise ValueError("The model is patched: learn its gates before, or after patchattn.unpatch_model(model).")
    sites = _decoder_sites(base, modules)
    settings = {"steps": steps, "learning_rate": learning_rate, "penalty": penalty, "sinks": sinks, "recent": recent}
    device, decoder = input_device(base), base.get_decoder()
    with _gated(base, sites, sinks, recent) as variants:
        gates = [variant.gate for variant in variants]
        optimizer = torch.optim.AdamW(gates, lr=learning_rate, weight_decay=0.0)
        state = None
        if resume is not None:
            words = {"settings": settings, "about": dict(about or {}), "model": fingerprint(base)}
            state = _State(Path(resume), json.dumps(words, sort_keys=True), gates, optimizer)
        for step in range(0 if state is None else state.load(), steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * _share(step, steps)
            sample = text(step)
            ids, rows = torch.tensor([sample.tokens], device=device), slice(len(sample.tokens) - sample.asked, None)
            with torch.no_grad(), _seeing_all(variants):
                wanted = _hidden(decoder, ids)[0, rows]
            found = _hidden(decoder, ids)[0, rows]
            error = (wanted - found).to(gates[0].dtype).square().mean(-1).mean()
            loss = error + penalty * torch.cat([gate.abs().to(device) for gate in gates]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for gate in gates:
                    gate.clamp_(0.0, 1.0)
            if state is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                state.save(step + 1)
            if progress is not None:
                progress(step + 1)
        return HeadGates(tuple(tuple(gate.tolist()) for gate in gates), BaseFacts.of(base, sites[0]))


def _share(step: int, steps: int) -> float:
    """Of the learning rate, in one of so many steps."""
    fifth = steps / 5
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def _hidden(decoder: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def _decoder_sites(base: nn.Module, modules: Any) -> list[AttentionSite]:
    """One attention module for every layer of a decoder."""
    found = select_sites(base, modules=modules)
    sites = causal_sites(base, found)
    if not sites:
        raise NotImplementedError(
            f"{type(base).__name__} has no causal self-attention among the chosen modules, whose kv heads could stream."
        )
    layers = [site.layer_index for site in sites]
    if layers != list(range(sites[0].layer_count)):
        raise ValueError(
            f"Gates are learned for all {sites[0].layer_count} layers of one decoder, but the chosen modules are of "
            f"the layers {layers}: choose a decoder with modules=..."
        )
    return sites


@contextmanager
def _gated(base: nn.Module, sites: list[AttentionSite], sinks: int, recent: int) -> Iterator[list[_Gated]]:
    """The model with gates, the only parameters to be trained; as it was afterwards."""
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    with temporarily_registered(_INFO):
        names = [f"^{site.name}$" for site in sites]
        patch_model(base, _NAME, {"sinks": sinks, "recent": recent}, modules=names)
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            variants = [module for module in base.modules() if isinstance(module, _Gated)]
            for variant in variants:  # in half precision gates would not move
                variant.gate.data = variant.gate.data.to(torch.promote_types(variant.gate.dtype, torch.float32))
                variant.gate.requires_grad_()
            yield variants
        finally:
            unpatch_model(base)
            for parameter in trained:
                parameter.requires_grad_()


@contextmanager
def _seeing_all(variants: list[_Gated]) -> Iterator[None]:
    for variant in variants:
        variant.sees_all = True
    try:
        yield
    finally:
        for variant in variants:
            variant.sees_all = False


class _State:
    """A calibration on disk: gates, what the optimiser remembers, and the number of steps done."""

    def __init__(self, path: Path, words: str, gates: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.path, self.words, self.gates, self.optimizer = path, words, gates, optimizer

    def save(self, step: int) -> None:
        tensors = {f"gate.{index}": gate.detach() for index, gate in enumerate(self.gates)}
        for index, gate in enumerate(self.gates):
            tensors |= {f"{name}.{index}": self.optimizer.state[gate][name] for name in _MOMENTS}
        write_tensors(self.path, tensors, {"calibration": self.words, "step": str(step)})

    def load(self) -> int:
        """The number of steps that were done, 0 without a file.

        Raises:
            ValueError: the file is damaged, or of another calibration.
        """
        if not self.path.is_file():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                step, words = int(about["step"]), about["calibration"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} is no state of a calibration that could go on ({error}).") from error
        if words != self.words:
            raise ValueError(
                f"{self.path} is of another calibration, {quoted(parse_json(words, self.path))}, than this one, "
                f"{quoted(parse_json(self.words, self.path))}: delete it, or write elsewhere."
            )
        state = {}
        for index, gate in enumerate(self.gates):
            with torch.no_grad():
                gate.copy_(tensors[f"gate.{index}"])
            state[index] = {
                "step": torch.tensor(float(step)),
                **{name: tensors[f"{name}.{index}"] for name in _MOMENTS},
            }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        return step
