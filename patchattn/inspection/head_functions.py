"""What a head makes of single tokens, read off its weights alone: MAPS, arXiv 2412.11965.

No text is run. A forward over two single tokens finds which modules normalise what, and proves that the weights compute
what is read off them: a model for which they do not is refused by name.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.heads import BaseFacts
from ..core.importance import HeadImportance, SiteScores
from ..core.layer_outputs import enclosing_block
from ..core.linear import LinearView
from ..core.selection import base_model, input_device, select_sites
from ..core.sites import AttentionSite
from ..surgery.projections import Heads, head_projections
from .tracing import Norm, Traced, wide


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
        TypeError: something else than pairs of numbers.
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
        ids = torch.tensor([[0], [1]], device=input_device(base))
        self.traced = Traced(base, ids, self.sites, self._check_sinks, self._refused)
        final = self.traced.maker(head)
        if final is None:
            raise self._refused("what its output embedding reads is not normalised")
        self.final = self.traced.norm(final)
        self.unembedding = wide(view.weight) * self.final.gain
        self.norms: dict[str, Norm] = {}
        self.projections: dict[str, tuple[Heads, Heads]] = {}
        for site in self.sites:
            self._read(site)
        self._check_embedding()

    def tokens(self, site: AttentionSite, ids: torch.Tensor) -> torch.Tensor:
        """`(S, E)` of the tokens as the first layer or as later layers get them."""
        embedded = self.traced.embedding[ids.to(self.traced.embedding.device)]
        if site.layer_index == min(each.layer_index for each in self.sites) == 0:
            return embedded
        norm, mlp = self._first_mlp()
        weight = next(mlp.parameters())
        made = mlp(norm(embedded.to(weight)[:, None]))
        return wide(made[0] if isinstance(made, tuple) else made)[:, 0]

    def written(self, site: AttentionSite, ids: torch.Tensor, *, last: bool = True) -> list[torch.Tensor]:
        """`(S, E)` of every query head: what it writes, as the output embedding with its norm's gain reads it.

        With `last=False` as it stands in the residual stream.
        """
        value, output = self.projections[site.name]
        made, read = (wide(LinearView.at(self.base, part.projection).weight) for part in (value, output))
        x = self.norms[site.name].linear(self.tokens(site, ids))
        share = len(output.index) // len(value.index)
        found = []
        for head, columns in enumerate(output.index):
            one = x @ made[value.index[head // share]].mT @ read[:, columns].mT
            found.append(one - one.mean(-1, keepdim=True) if last and self.final.centred else one)
        return found

    def _read(self, site: AttentionSite) -> None:
        """The norm and the projections of a module; refuse one that they do not explain."""
        norm = self.traced.maker(self.base.get_submodule(site.name), site.name)
        block = enclosing_block(self.base, site.name)
        if norm is None or not norm.startswith(f"{block}."):
            raise self._refused(f"what {site.name} reads is not normalised in its layer")
        parts = head_projections(self.base, site)
        value = [part for part in parts if part.of == "kv"][-1]  # behind that of keys
        output = next(part for part in parts if part.side == "columns")
        run = self.traced.runs[site.name]
        if run.given is None or run.gave is None:
            raise self._refused(f"{site.name} is not run on a text")
        into, out = (LinearView.at(self.base, part.projection) for part in (value, output))
        values = (wide(run.given) @ wide(into.weight).mT + wide(into.bias))[..., value.index]  # (2, 1, G, D)
        share = len(output.index) // len(value.index)
        states = torch.zeros(*run.given.shape[:2], out.in_features, device=values.device, dtype=values.dtype)
        states[..., output.index.flatten()] = values.repeat_interleave(share, dim=2).flatten(2)
        want, got = states @ wide(out.weight).mT, wide(run.gave) - wide(out.bias)
        error = 1e-4 if run.gave.dtype in (torch.float32, torch.float64) else 2e-2
        if not torch.allclose(got, want, rtol=0.0, atol=error * float(want.abs().max())):
            raise self._refused(f"{site.name} makes something else of one token than its projections alone")
        self.traced.check_added(site)
        self.norms[site.name] = self.traced.norm(norm)
        self.projections[site.name] = (value, output)

    def _first_mlp(self) -> tuple[nn.Module, nn.Module]:
        """The first layer's MLP and the norm before it: what reads what a norm of the layer gave, but attention."""
        first = min(self.sites, key=lambda site: site.layer_index)
        block = enclosing_block(self.base, first.name)
        found = []
        for name, module in self.base.get_submodule(block).named_children():
            path = f"{block}.{name}"
            is_run = path in self.traced.runs and any(True for _ in module.parameters())
            norm = self.traced.maker(module, path) if is_run else None
            if norm is not None and norm.startswith(f"{block}.") and not f"{first.name}.".startswith(f"{path}."):
                found.append((self.traced.runs[norm].module, module))
        if first.layer_index != 0 or len(found) != 1:
            raise self._refused(f"{len(found)} modules of its first layer look like an MLP behind a norm")
        return found[0]

    def _check_embedding(self) -> None:
        """Refuse a model whose first layer does not get embeddings, but for a factor and what all tokens get."""
        first = min(self.sites, key=lambda site: site.layer_index)
        norm = self.traced.maker(self.base.get_submodule(first.name), first.name)
        given = None if norm is None else self.traced.runs[norm].given
        if first.layer_index != 0 or given is None:
            raise self._refused("its first layer is left out, or gets no embeddings")
        found, want = wide(given)[0, 0] - wide(given)[1, 0], self.traced.embedding[0] - self.traced.embedding[1]
        if float(torch.cosine_similarity(found, want.to(found), dim=0)) < 0.999:
            raise self._refused("its first layer gets something else than embeddings")

    def _check_sinks(self, call: AttentionCall, output: torch.Tensor) -> None:
        if call.kwargs.get("s_aux") is not None:
            raise self._refused(f"{call.site.name} has sinks in its softmax")

    def _refused(self, reason: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self.base).__name__} has no functions of heads that weights tell: {reason}.")


def _ids(pairs: Sequence[tuple[int, int]], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not pairs:
        raise ValueError("A relation needs at least one pair of tokens.")
    if wrong := [pair for pair in pairs if len(pair) != 2 or not all(isinstance(token, Integral) for token in pair)]:
        raise TypeError(f"A relation is of pairs of ids of tokens, got {wrong[0]!r}.")
    found = torch.tensor(pairs)
    if int(found.min()) < 0 or int(found.max()) >= size:
        raise ValueError(f"Tokens have ids from 0 to {size - 1}, got {int(found.min())} to {int(found.max())}.")
    return found[:, 0], found[:, 1]
