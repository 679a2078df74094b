"""Heads of a task by discrete codes of what they give, out of a few prompts with it and without. arXiv 2405.12522.

A sparse autoencoder is trained on the outputs of all heads; a head's code for a prompt is the number of its largest
feature, and heads whose codes come with the task alone belong to it. The paper's sizes, thresholds and code were not
found: those below, and the exact score, are ours.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.heads import BaseFacts
from ..core.importance import HeadImportance, SiteScores
from ..core.probing import probed
from ..core.selection import base_model, select_sites
from ..core.sites import AttentionSite
from ..core.token_numbers import last_rows
from .channels import on_device


def code_scores(
    model: nn.Module,
    positive: Iterable[Mapping[str, Any]],
    negative: Iterable[Mapping[str, Any]],
    *,
    features: int = 128,
    sparsity: float = 0.02,
    steps: int = 300,
    learning_rate: float = 1e-2,
    seed: int = 0,
    modules: str | Iterable[str] | None = None,
) -> HeadImportance:
    """Share of the prompts with a task for which a head's code is one that no prompt without the task has.

    Args:
        model: a transformers model in evaluation mode.
        positive: batches of prompts with the task, with padding on either side; the paper takes 5 to 10 prompts.
        negative: batches of prompts without it, such as with other names or in another order.
        features: of the autoencoder, which all heads share.
        sparsity: weight of the features' mean size in its loss, beside the mean squared error of outputs whose mean
            square is 1.
        steps: of its training, on all outputs at once, by Adam.
        learning_rate: of it.
        seed: of its weights.
        modules: which attention modules, as in `patch_model`; with heads of one size.

    Raises:
        ValueError: a model in training mode, no prompt of either kind, or a number out of range.
        NotImplementedError: heads of unequal sizes.
    """
    base = base_model(model)
    if base.training:
        raise ValueError("Codes of heads need a model in evaluation mode: model.eval().")
    if min(features, steps) < 1 or not (sparsity >= 0 and learning_rate > 0):
        raise ValueError(
            f"features and steps are at least 1, sparsity at least 0 and learning_rate above 0, got {features}, "
            f"{steps}, {sparsity} and {learning_rate}."
        )
    sites = [site for site in select_sites(base, modules=modules) if not site.is_cross]
    found = [_last_outputs(base, batches, sites) for batches in (positive, negative)]
    if not all(len(each) for each in found):
        raise ValueError(f"There are {len(found[0])} prompts with the task and {len(found[1])} without it: give both.")
    codes = _codes(torch.cat(found), features, sparsity, steps, learning_rate, seed)
    shares = own_codes(codes[: len(found[0])], codes[len(found[0]) :])
    scores, start = {}, 0
    for site in sites:
        heads = site.require("query_heads", by="code_scores")
        scores[site.name] = SiteScores(
            site.layer_index, site.require("kv_heads", by="code_scores"), tuple(shares[start : start + heads].tolist())
        )
        start += heads
    settings = {"features": features, "sparsity": sparsity, "steps": steps, "seed": seed}
    return HeadImportance(scores, "codes", BaseFacts.of(base, sites[0]), settings, len(codes))


def own_codes(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """`(H,)` share of rows of `(P, H)` codes that are in no row of `(N, H)`, head by head."""
    shared = (positive[:, None] == negative[None]).any(1)
    return 1.0 - shared.double().mean(0)


@torch.no_grad()
def _last_outputs(base: Any, batches: Iterable[Mapping[str, Any]], sites: list[AttentionSite]) -> torch.Tensor:
    """`(prompts, heads of all sites, D)` at the last token of each."""
    kept: dict[str, torch.Tensor] = {}

    def see(call: AttentionCall, output: torch.Tensor) -> None:
        rows = last_rows(call.mask).expand(output.shape[:2])
        kept[call.site.name] = output[rows.to(output.device)].cpu().double()

    found = []
    with probed(base, see, modules=[f"^{site.name}$" for site in sites]):
        for batch in batches:
            base(**on_device(base, batch))
            if missing := [site.name for site in sites if site.name not in kept]:
                raise ValueError(f"{missing[0]} was not run on a prompt. Leave it out with modules=...")
            if len({each.shape[-1] for each in kept.values()}) > 1:
                raise NotImplementedError("Heads differ in size: choose those of one size with modules=...")
            found.append(torch.cat([kept[site.name] for site in sites], dim=1))
            kept.clear()
    return torch.cat(found) if found else torch.zeros(0, 0, 0)


def _codes(
    outputs: torch.Tensor, features: int, sparsity: float, steps: int, learning_rate: float, seed: int
) -> torch.Tensor:
    """`(prompts, heads)` number of each output's largest feature."""
    rows = outputs.flatten(0, 1)
    rows = rows / rows.square().mean().sqrt().clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(features, rows.shape[1], generator=generator, dtype=torch.float64)
    decoder = (drawn / drawn.norm(dim=-1, keepdim=True)).requires_grad_()
    encoder = drawn.div(drawn.norm(dim=-1, keepdim=True)).mT.contiguous().requires_grad_()
    bias = torch.zeros(features, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([encoder, decoder, bias], lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            hidden = torch.relu(rows @ encoder + bias)
            # of unit length, or features would shrink and decoders grow
            made = hidden @ (decoder / decoder.norm(dim=-1, keepdim=True).clamp(min=1e-12))
            loss = (made - rows).square().mean() + sparsity * hidden.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.relu(rows @ encoder + bias).detach().argmax(-1).view(outputs.shape[:2])
