"""`head_importance`: scores of all heads of a model, in one pass over data that can be killed and continued."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from ..core.heads import BaseFacts
from ..core.importance import HeadImportance, SiteScores
from ..core.probing import recording
from ..core.selection import base_model, select_sites
from ..core.settings import nearest
from ..core.sites import AttentionSite
from ..files.tensors import fingerprint, write_tensors
from .channels import Metric, on_device
from .importance_methods import METHODS, Loss, Method, Per, options

Batches = Iterable[Mapping[str, Any]]
_STATE = "patchattn sums 2"
_CHOICES = {"per": ("token", "example", "batch"), "metric": ("wifv", "ifv", "wifn")}


def head_importance(
    model: nn.Module,
    batches: Batches = (),
    method: str = "michel",
    *,
    normalise: bool = True,
    per: Per | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    seed: int | None = None,
    sites: Sequence[AttentionSite] | None = None,
    state: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> HeadImportance:
    """Score every query head of a model; higher is more worth to keep.

    One pass over the data, with memory for a few numbers per head or channel. Padding is left out as attention sees it.
    The model is left as it was: its weights get no gradients, and a patched model is scored as patched, with its heads
    numbered as they are then.

    Args:
        model: a transformers model in evaluation mode, patched or not.
        batches: keyword arguments of its forward; tensors are moved to its device. Not for `magnitude` and `random`.
        method: `michel`: gradient of the loss by a gate on the head (arXiv 1905.10650). `flap`: fluctuation of the
            head's channels (arXiv 2312.11983). `amp`: l1 norm of what the head adds, mean over each
            example's tokens, then over examples (arXiv 2504.21174). `entropy`: how focused its
            attention is. `magnitude`: norm of its weights. `random`.
        normalise: compare heads within their layer: scores are divided by the l2 norm of those of their attention
            module; for `flap` channels are standardised instead, and `random` is as it is.
        per: of `michel`: what gradients are summed over before their absolute value is taken: each `token` alone (the
            default, as the authors' code does), the tokens of an `example`, or of a whole `batch`.
        loss: of `michel`: called with the model's outputs and the batch, gives a scalar. By default the model's own
            loss, times the number of labels in the batch, so that an example counts the same in every batch. Without
            `labels`, a causal language model takes its own tokens.
        metric: of `flap`: `wifv` (the default), `ifv` or `wifn`.
        seed: of `random`; 0 by default.
        sites: those of `find_sites(model)` to score; all by default.
        state: file that keeps the sums after every batch. Called again with it, and the same data, the pass goes on
            from there, with the same result.
        progress: called with the number of batches done.

    Raises:
        ValueError: an unknown method or option, no data, a model in training mode, labels that are missing, an
            attention module that the data does not reach, or a state file of something else.
        TypeError: batches that are not dictionaries.
        NotImplementedError: the model's attention does not go through transformers' registry, or its projections are
            not recognised.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=4, vocab_size=64)).eval()
        >>> importance = head_importance(model, [{"input_ids": torch.arange(12).view(2, 6)}])
        >>> len(importance.lowest(count=3))
        2
    """
    chosen = check_options(method, per=per, loss=loss, metric=metric, seed=seed)
    if model.training and METHODS[method].needs_data:
        raise ValueError("Importance needs a model in evaluation mode: model.eval().")
    base = base_model(model)
    chosen_sites = select_sites(base) if sites is None else list(sites)
    if not chosen_sites:
        raise ValueError("sites is empty: there is no head to score.")
    for site in chosen_sites:
        if site.query_heads is None:
            raise NotImplementedError(f"The number of heads of {site.name} is not known: leave it out with sites=...")
    scorer = METHODS[method](base, chosen_sites, **chosen)
    settings = {**chosen, "normalise": normalise}
    if "loss" in settings:
        settings["loss"] = "own" if loss is None else "given"
    if not scorer.needs_data:
        if state is not None or any(True for _ in batches):
            raise ValueError(f"{method!r} looks at no data: leave out batches and state.")
    else:
        notes = _Notes(None)
        if state is not None:
            about = {"format": _STATE, "method": method, "settings": settings, "weights": fingerprint(base)}
            notes = _Notes(Path(state), {**about, "sites": [site.name for site in chosen_sites]})
        _run(model, scorer, chosen_sites, batches, notes, progress or (lambda done: None))
    scores = scorer.scores(normalise)
    facts = BaseFacts.of(base, chosen_sites[0])
    described = {
        site.name: SiteScores(
            site.layer_index, site.kv_heads or site.query_heads or 0, tuple(scores[site.name].tolist())
        )
        for site in chosen_sites
    }
    return HeadImportance(described, method, facts, settings, max(scorer.tokens.values()))


def check_options(method: str, **given: Any) -> dict[str, Any]:
    """The options of a method, those given among them.

    Args:
        method: its name.
        given: options of any method; `None` is not given.

    Raises:
        ValueError: there is no such method, it does not take one of them, or not that value.
    """
    if method not in METHODS:
        raise ValueError(f"There is no method {method!r} to score heads{nearest(str(method), list(METHODS))}")
    known = options(method)
    chosen = {name: value for name, value in given.items() if value is not None}
    for name, value in chosen.items():
        if name not in known:
            raise ValueError(f"{method!r} takes {', '.join(known) or 'no options of its own'}, got {name}={value!r}.")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r}.")
    return {**known, **chosen}


def _run(
    model: nn.Module,
    scorer: Method,
    sites: list[AttentionSite],
    batches: Batches,
    notes: "_Notes",
    progress: Callable[[int], None],
) -> None:
    done = notes.restore(scorer)
    seen = 0
    with recording(model, sites, scorer.see, at=scorer.at):
        for batch in batches:
            seen += 1
            inputs = on_device(model, batch)
            notes.passed(inputs, seen)
            if seen > done:
                inputs = scorer.prepared(inputs)
                with torch.set_grad_enabled(scorer.needs_gradients):
                    scorer.end_batch(model(**inputs), inputs)
                notes.save(scorer, seen)
            progress(seen)
    if not seen:
        raise ValueError("There is no data to score heads on: give batches.")
    if seen < done:
        raise ValueError(
            f"{notes.path} is of other data: it knows {done} batches, and these are {seen}; delete it to start anew."
        )
    if missed := [name for name, count in scorer.tokens.items() if not count]:
        raise ValueError(f"No token of the data reaches {missed[0]}: leave it out with sites=...")


class _Notes:
    """What is summed up so far, on disk, and of which data."""

    def __init__(self, path: Path | None, about: Mapping[str, Any] | None = None) -> None:
        self.path, self.about = path, json.dumps(about, sort_keys=True)
        self.digest = hashlib.sha256()
        self.done, self.expected = 0, ""

    def restore(self, scorer: Method) -> int:
        """Hand a scorer what was summed up; how many batches that is."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            same = about["about"] == self.about
            self.done, self.expected = int(about["batches"]), about["data"]
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} holds no state of a calibration; delete it to start anew.") from error
        if not same:
            raise ValueError(f"{self.path} is of another method, setting or model; delete it to start anew.")
        wanted = {name: tensor.dtype for name, tensor in scorer.state().items()}
        try:
            if {name: tensor.dtype for name, tensor in state.items()} != wanted:
                raise ValueError("it holds other sums")
            scorer.load(state)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); delete it to start anew.") from error
        return self.done

    def passed(self, batch: Mapping[str, Any], number: int) -> None:
        """Note what batch this is; ValueError if another one was there before."""
        if self.path is None:
            return
        for name in sorted(batch):
            value = batch[name]
            if isinstance(value, torch.Tensor):
                self.digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
                self.digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                self.digest.update(f"{name}{value!r}".encode())
        if number == self.done and self.digest.hexdigest() != self.expected:
            raise ValueError(f"{self.path} is of other data; delete it to start anew.")

    def save(self, scorer: Method, done: int) -> None:
        """Whole or not at all: a killed process leaves the file of before."""
        if self.path is None:
            return
        about = {"about": self.about, "batches": str(done), "data": self.digest.hexdigest()}
        write_tensors(self.path, scorer.state(), about)
