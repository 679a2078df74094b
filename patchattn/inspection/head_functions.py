"""What a head makes of single tokens, read off its weights alone: MAPS, arXiv 2412.11965.

No text is run. A forward over two single tokens finds which modules normalise what, and proves that the weights compute
what is read off them: a model for which they do not is refused by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.heads import BaseFacts
from ..core.importance import HeadImportance, SiteScores
from ..core.layer_outputs import enclosing_block
from ..core.linear import LinearView
from ..core.probing import probed
from ..core.selection import base_model, input_device, select_sites
from ..core.sites import AttentionSite
from ..surgery.projections import Heads, head_projections


@torch.no_grad()
def relation_scores(
    model: nn.Module,
    pairs: Sequence[tuple[int, int]],
    *,
    top: int = 10,
    suppress: bool = False,
    modules: str | None = None,
) -> HeadImportance:
    """How much of a relation between tokens each head implements: capitals of countries, words and their upper case.

    With E the embedding of a relation's first tokens (behind the first layer: what that layer's MLP makes of their
    normalised embedding, without the residual), W_V and W_O a head's weights and U the unembedding, M = E W_V W_O U
    says how much the head promotes every token where it attends to the first one. The gains of norms are part of W_V
    and U, and where norms subtract means, E and W_O are without theirs. A head's score is the share of pairs whose
    second token is among the `top` largest of its row of M.

    Args:
        model: a causal language model in evaluation mode, not quantised and without adapters.
        pairs: ids of the two tokens; the paper takes words with the blank in front of them, 30 pairs or more.
        top: how many tokens of a row count; equal ones all do.
        suppress: score -M in place of M: heads that make the second token less likely.
        modules: which attention modules, as in `patch_model`, where the model has several towers.

    Raises:
        ValueError: a model in training mode, no pair, a token that the model does not have, or a `top` out of range.
        NotImplementedError: a model whose weights do not say this: norms behind attention, embeddings that are
            normalised or projected, sinks, normalised values, and what `head_projections` does not recognise.
    """
    read = _Weights(model, modules)
    size = len(read.unembedding)
    sources, targets = _ids(pairs, size)
    if not 1 <= top <= size:
        raise ValueError(f"top is a number of tokens from 1 to {size}, got {top}.")
    scores = {}
    for site in read.sites:
        found = []
        for written in read.written(site, sources):
            row = written @ read.unembedding.mT
            row = -row if suppress else row
            above = (row > row.gather(1, targets[:, None].to(row.device))).sum(-1)
            found.append(float((above < top).double().mean()))
        scores[site.name] = SiteScores(site.layer_index, site.require("kv_heads", by="MAPS"), tuple(found))
    settings = {"top": top, "suppress": suppress, "pairs": len(pairs)}
    return HeadImportance(scores, "maps", BaseFacts.of(read.base, read.sites[0]), settings, 0)


@torch.no_grad()
def relation_salience(model: nn.Module, ids: Sequence[int], *, modules: str | None = None) -> HeadImportance:
    """How strongly each head writes where it attends to these tokens: the mean of |x W_V W_O| over |x|.

    Args:
        model: as of `relation_scores`; x are its rows of E.
        ids: of tokens.
        modules: as of `relation_scores`.

    Raises:
        ValueError: as `relation_scores`.
        NotImplementedError: as `relation_scores`.
    """
    read = _Weights(model, modules)
    sources, _ = _ids([(one, one) for one in ids], len(read.unembedding))
    scores = {}
    for site in read.sites:
        sizes = read.tokens(site, sources).norm(dim=-1)
        found = [
            float((written.norm(dim=-1) / sizes).double().mean()) for written in read.written(site, sources, last=False)
        ]
        scores[site.name] = SiteScores(site.layer_index, site.require("kv_heads", by="MAPS"), tuple(found))
    settings = {"tokens": len(ids)}
    return HeadImportance(scores, "salience", BaseFacts.of(read.base, read.sites[0]), settings, 0)


@dataclass(frozen=True, eq=False)
class _Norm:
    """A norm `gain * x / size(x) + bias`, of x without its mean where `centred`."""

    gain: torch.Tensor
    centred: bool

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., E)` without the division by the size, which moves no rank within a row."""
        return self.gain * (x - x.mean(-1, keepdim=True) if self.centred else x)


@dataclass(eq=False)
class _Run:
    """A call of a module.

    Attributes:
        given, gave: its first input and output with a floating point number for each of the model's channels.
    """

    module: nn.Module
    given: torch.Tensor | None
    gave: torch.Tensor | None


class _Weights:
    """Weights of a model as MAPS reads them."""

    def __init__(self, model: nn.Module, modules: str | None) -> None:
        base: Any = base_model(model)
        self.base: Any = base
        if base.training:
            raise ValueError("Functions of heads are read off a model in evaluation mode: model.eval().")
        self.sites = [site for site in select_sites(self.base, modules=modules) if not site.is_cross]
        several = len({site.tower for site in self.sites}) > 1
        if several or len({site.layer_index for site in self.sites}) < len(self.sites):
            raise ValueError(f"{type(self.base).__name__} has several towers: choose one with modules=...")
        head = base.get_output_embeddings()
        view = None if head is None else LinearView.of(head, "the output embedding")
        if view is None or base.config.is_encoder_decoder:
            raise self._refused("it is no decoder with an output embedding")
        self.embedding = _wide(base.get_input_embeddings().weight)
        self.width = self.embedding.shape[1]
        self.runs = self._trace()
        final = self._maker(head)
        if final is None:
            raise self._refused("what its output embedding reads is not normalised")
        self.final = self._norm(final)
        self.unembedding = _wide(view.weight) * self.final.gain
        self.norms: dict[str, _Norm] = {}
        self.projections: dict[str, tuple[Heads, Heads]] = {}
        for site in self.sites:
            self._read(site)
        self._check_embedding()

    def tokens(self, site: AttentionSite, ids: torch.Tensor) -> torch.Tensor:
        """`(S, E)` of the tokens as the first layer or as later layers get them."""
        embedded = self.embedding[ids.to(self.embedding.device)]
        if site.layer_index == min(each.layer_index for each in self.sites) == 0:
            return embedded
        norm, mlp = self._first_mlp()
        weight = next(mlp.parameters())
        made = mlp(norm(embedded.to(weight)[:, None]))
        return _wide(made[0] if isinstance(made, tuple) else made)[:, 0]

    def written(self, site: AttentionSite, ids: torch.Tensor, *, last: bool = True) -> list[torch.Tensor]:
        """`(S, E)` of every query head: what it writes, as the output embedding with its norm's gain reads it.

        With `last=False` as it stands in the residual stream.
        """
        value, output = self.projections[site.name]
        made, read = (_wide(LinearView.at(self.base, part.projection).weight) for part in (value, output))
        x = self.norms[site.name].linear(self.tokens(site, ids))
        share = len(output.index) // len(value.index)
        found = []
        for head, columns in enumerate(output.index):
            one = x @ made[value.index[head // share]].mT @ read[:, columns].mT
            found.append(one - one.mean(-1, keepdim=True) if last and self.final.centred else one)
        return found

    def _trace(self) -> dict[str, _Run]:
        """Every module's call, by name, in the order in which they end, of two texts of one token each."""
        runs: dict[str, _Run] = {}

        def after(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                given = self._first([*args, *kwargs.values()])
                runs.setdefault(name, _Run(module, given, self._first(output)))

            return hook

        def see(call: AttentionCall, output: torch.Tensor) -> None:
            if call.kwargs.get("s_aux") is not None:
                raise self._refused(f"{call.site.name} has sinks in its softmax")

        handles = [
            module.register_forward_hook(after(name), with_kwargs=True)
            for name, module in self.base.named_modules()
            if name
        ]
        try:
            with probed(self.base, see, modules=[f"^{site.name}$" for site in self.sites]):
                self.base(input_ids=torch.tensor([[0], [1]], device=input_device(self.base)), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return runs

    def _first(self, given: Any) -> torch.Tensor | None:
        """The first tensor of the residual stream's width among what a module got or gave."""
        if isinstance(given, torch.Tensor):
            is_stream = given.is_floating_point() and given.dim() == 3 and given.shape[-1] == self.width
            return given if is_stream else None
        values = given if isinstance(given, list | tuple) else list(given.values()) if hasattr(given, "values") else []
        found = (self._first(value) for value in values)
        return next((one for one in found if one is not None), None)

    def _maker(self, module: nn.Module, name: str | None = None) -> str | None:
        """Name of the module that made what another one got."""
        run = next((run for each, run in self.runs.items() if each == name or (name is None and run.module is module)))
        if run.given is None:
            return None
        place = run.given.untyped_storage().data_ptr()
        for each, other in self.runs.items():
            same = other.gave is not None and other.gave.untyped_storage().data_ptr() == place
            if same and any(True for _ in other.module.parameters()):
                return each
        return None

    def _norm(self, name: str) -> _Norm:
        """Read a norm off what it makes of vectors; refuse what is none."""
        module = self.runs[name].module
        like = next(module.parameters(), self.embedding)
        ones = torch.full((1, 1, self.width), 1e3, device=like.device, dtype=like.dtype)  # far above any epsilon
        signs = ones * torch.tensor([1.0, -1.0], device=like.device).repeat(self.width // 2 + 1)[: self.width]
        plus, minus = _wide(module(ones))[0, 0], _wide(module(-ones))[0, 0]
        centred = torch.allclose(plus, minus, rtol=1e-3, atol=1e-4)
        bias = (plus + minus) / 2
        gain = (_wide(module(signs.to(like.dtype)))[0, 0] - bias) / signs[0, 0].sign() if centred else plus - bias
        drawn = torch.randn(1, 1, self.width, generator=torch.Generator().manual_seed(0)) * 1e3
        drawn = drawn.to(like)
        x = _wide(drawn)[0, 0]
        x = x - x.mean() if centred else x
        want = gain * x / x.square().mean().sqrt() + bias
        if self.width % 2 or not torch.allclose(
            _wide(module(drawn))[0, 0], want, rtol=2e-2, atol=2e-2 * float(want.abs().max())
        ):
            raise self._refused(f"{name} ({type(module).__name__}) is no norm that is known")
        return _Norm(gain, centred)

    def _read(self, site: AttentionSite) -> None:
        """The norm and the projections of a module; refuse one that they do not explain."""
        norm = self._maker(self.base.get_submodule(site.name), site.name)
        block = enclosing_block(self.base, site.name)
        if norm is None or not norm.startswith(f"{block}."):
            raise self._refused(f"what {site.name} reads is not normalised in its layer")
        parts = head_projections(self.base, site)
        value = [part for part in parts if part.of == "kv"][-1]  # behind that of keys
        output = next(part for part in parts if part.side == "columns")
        run = self.runs[site.name]
        if run.given is None or run.gave is None:
            raise self._refused(f"{site.name} is not run on a text")
        into, out = (LinearView.at(self.base, part.projection) for part in (value, output))
        values = (_wide(run.given) @ _wide(into.weight).mT + _wide(into.bias))[..., value.index]  # (2, 1, G, D)
        share = len(output.index) // len(value.index)
        states = torch.zeros(*run.given.shape[:2], out.in_features, device=values.device, dtype=values.dtype)
        states[..., output.index.flatten()] = values.repeat_interleave(share, dim=2).flatten(2)
        want, got = states @ _wide(out.weight).mT, _wide(run.gave) - _wide(out.bias)
        error = 1e-4 if run.gave.dtype in (torch.float32, torch.float64) else 2e-2
        if not torch.allclose(got, want, rtol=0.0, atol=error * float(want.abs().max())):
            raise self._refused(f"{site.name} makes something else of one token than its projections alone")
        place = run.gave.untyped_storage().data_ptr()
        for name, other in self.runs.items():
            outside = not name.startswith(site.name) and not site.name.startswith(f"{name}.")
            reads = other.given is not None and other.given.untyped_storage().data_ptr() == place
            if outside and reads and any(True for _ in other.module.parameters()):
                raise self._refused(f"{name} changes what {site.name} writes before it is added")
        self.norms[site.name] = self._norm(norm)
        self.projections[site.name] = (value, output)

    def _first_mlp(self) -> tuple[nn.Module, nn.Module]:
        """The first layer's MLP and the norm before it: what reads what a norm of the layer gave, but attention."""
        first = min(self.sites, key=lambda site: site.layer_index)
        block = enclosing_block(self.base, first.name)
        found = []
        for name, module in self.base.get_submodule(block).named_children():
            path = f"{block}.{name}"
            is_run = path in self.runs and any(True for _ in module.parameters())
            norm = self._maker(module, path) if is_run else None
            if norm is not None and norm.startswith(f"{block}.") and not f"{first.name}.".startswith(f"{path}."):
                found.append((self.runs[norm].module, module))
        if first.layer_index != 0 or len(found) != 1:
            raise self._refused(f"{len(found)} modules of its first layer look like an MLP behind a norm")
        return found[0]

    def _check_embedding(self) -> None:
        """Refuse a model whose first layer does not get embeddings, but for a factor and what all tokens get."""
        first = min(self.sites, key=lambda site: site.layer_index)
        norm = self._maker(self.base.get_submodule(first.name), first.name)
        given = None if norm is None else self.runs[norm].given
        if first.layer_index != 0 or given is None:
            raise self._refused("its first layer is left out, or gets no embeddings")
        found, want = _wide(given)[0, 0] - _wide(given)[1, 0], self.embedding[0] - self.embedding[1]
        if float(torch.cosine_similarity(found, want.to(found), dim=0)) < 0.999:
            raise self._refused("its first layer gets something else than embeddings")

    def _refused(self, reason: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self.base).__name__} has no functions of heads that weights tell: {reason}.")


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Without gradients, in float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _ids(pairs: Sequence[tuple[int, int]], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not pairs:
        raise ValueError("A relation needs at least one pair of tokens.")
    found = torch.tensor(pairs)
    if int(found.min()) < 0 or int(found.max()) >= size:
        raise ValueError(f"Tokens have ids from 0 to {size - 1}, got {int(found.min())} to {int(found.max())}.")
    return found[:, 0], found[:, 1]
