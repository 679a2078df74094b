"""Attention in the forms that other tools draw: maps for BertViz, queries and keys of every head for AttentionViz."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.heads import BaseFacts
from ..core.probing import recording
from ..core.selection import base_model, evaluating, select_sites
from ..core.sites import AttentionSite
from ..files.documents import write_json
from ..files.tensors import write_tensors
from .attention_maps import attention_maps
from .probabilities import all_probabilities


def bertviz_inputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    tokens: Sequence[str],
    *,
    modules: str | Iterable[str] | None = None,
    row: int = 0,
) -> dict[str, Any]:
    """What `bertviz.head_view` and `bertviz.model_view` take: `head_view(**bertviz_inputs(model, inputs, tokens))`.

    The attention is that of the patched model, computed anew whatever its base implementation, so that it need not be
    loaded with `eager`. Padding is left out.

    Args:
        model: a transformers model, patched or not.
        inputs: keyword arguments of one forward.
        tokens: text of every token of that sequence, padding included, such as `tokenizer.convert_ids_to_tokens` gives.
        modules: which attention modules, as in `patch_model`: the self-attention of one tower.
        row: which sequence of the batch.

    Returns:
        `attention`: a float32 `(1, H, n, n)` per layer, first layer first; `tokens`: n strings.

    Raises:
        ValueError: several attention modules in a layer, another number of tokens, or as `attention_maps`.
        NotImplementedError: as `attention_maps`.
    """
    sites = select_sites(base_model(model), modules=modules)
    _check_self_attention(model, sites)
    maps = attention_maps(model, inputs, modules=modules, row=row)
    layers: dict[str, list[torch.Tensor]] = {}
    for each in maps:
        if each.queries != each.keys:
            raise ValueError(f"{each.site.name} has other keys than queries: give one forward over all of a text.")
        layers.setdefault(each.site.name, []).append(each.weights.float())
    places = maps[0].queries
    if len(tokens) <= places[-1] or isinstance(tokens, str):
        raise ValueError(f"Expected the text of every token of sequence {row}, padding included, got {len(tokens)}.")
    attention = [torch.stack(heads)[None] for heads in layers.values()]
    return {"attention": attention, "tokens": [tokens[place] for place in places]}


@dataclass(frozen=True, eq=False)
class QueriesAndKeys:
    """Queries and keys of every head, of tokens that are no padding, as attention compares them.

    Attributes:
        queries: `(L, H, N, D)` float32, by layer, query head and token: after rotary embedding and norms, before the
            scale.
        keys: `(L, Hkv, N, D)`: of the heads that query heads share, H / Hkv in a row each.
        tokens: text of each of the N tokens, of all sequences one after the other.
        positions: of each token, counted in its sequence from 0.
        sequences: of each token, the number of its sequence.
        scalings: of each layer, what the products are multiplied with.
        base: the model.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    sequences: tuple[int, ...]
    scalings: tuple[float, ...]
    base: BaseFacts

    def save(self, folder: str | Path) -> None:
        """Write `vectors.safetensors` and `tokens.json` into a folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        write_tensors(
            path / "vectors.safetensors", {"queries": self.queries, "keys": self.keys}, {"model": f"{self.base}"}
        )
        labels = {"tokens": self.tokens, "positions": self.positions, "sequences": self.sequences}
        write_json(path / "tokens.json", {"base": vars(self.base), "scalings": self.scalings, **labels})


@torch.no_grad()
def queries_and_keys(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    tokens: Iterable[Sequence[Sequence[str]]],
    *,
    modules: str | Iterable[str] | None = None,
) -> QueriesAndKeys:
    """Queries and keys of every head over some texts, which AttentionViz (arXiv 2305.03210) draws together.

    Args:
        model: a transformers model in evaluation mode, patched or not; variants that change queries or keys are in.
        batches: keyword arguments of its forwards.
        tokens: for each batch the text of every token of each sequence, padding included.
        modules: which attention modules, as in `patch_model`: the self-attention of one tower.

    Raises:
        ValueError: no data, several attention modules in a layer, or numbers of tokens that differ from the inputs'.
        NotImplementedError: layers differ in heads or their size, or keys are not the tokens of the call.
    """
    base = base_model(model)
    sites = select_sites(base, modules=modules)
    _check_self_attention(base, sites)
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {site.name: [] for site in sites}
    scalings: dict[str, float] = {}
    real: list[torch.Tensor] = []

    def see(call: AttentionCall, output: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        name = call.site.name
        if call.key.shape[2] != call.query.shape[2] or call.mask.index is not None:
            raise NotImplementedError(f"Keys of {name} are not the tokens of the call, one by one.")
        is_real = call.mask.real().expand(len(call.query), -1)
        if name == sites[0].name:
            real.append(is_real.cpu())
        query, key = (states.transpose(1, 2)[is_real].float().cpu() for states in (call.query, call.key))
        found[name].append((query, key))
        scalings[name] = float(call.scaling)
        return output

    labels: list[str] = []
    positions: list[int] = []
    sequences: list[int] = []
    with evaluating(base), recording(base, sites, see, at="base", weights=all_probabilities):
        for batch, texts in zip(batches, tokens, strict=True):
            real.clear()
            base(**batch)
            if len(real) != 1:
                raise ValueError(
                    f"{sites[0].name} attends {len(real)} times in one forward: choose others by modules=..."
                )
            (is_real,) = real
            if [len(text) for text in texts] != [is_real.shape[1]] * len(is_real):
                raise ValueError(f"Expected {len(is_real)} texts of {is_real.shape[1]} tokens, got other numbers.")
            first = max(sequences, default=-1) + 1
            for number, (text, keep) in enumerate(zip(texts, is_real.tolist(), strict=True)):
                kept = [token for token, is_kept in zip(text, keep, strict=True) if is_kept]
                labels += kept
                positions += range(len(kept))
                sequences += [first + number] * len(kept)
    if not labels:
        raise ValueError("There is no data: give at least one batch.")
    sides: list[list[torch.Tensor]] = [[], []]
    for site in sites:
        for side, parts in zip(sides, zip(*found[site.name], strict=True), strict=True):
            side.append(torch.cat(parts).transpose(0, 1))
    if len({states.shape for states in sides[0]}) > 1 or len({states.shape for states in sides[1]}) > 1:
        raise NotImplementedError("Layers differ in their heads: choose some that agree with modules=...")
    return QueriesAndKeys(
        torch.stack(sides[0]),
        torch.stack(sides[1]),
        tuple(labels),
        tuple(positions),
        tuple(sequences),
        tuple(scalings[site.name] for site in sites),
        BaseFacts.of(base, sites[0]),
    )


def _check_self_attention(model: nn.Module, sites: Sequence[AttentionSite]) -> None:
    several = len({site.tower for site in sites}) > 1 or len({site.layer_index for site in sites}) < len(sites)
    if several or any(site.is_cross for site in sites):
        raise ValueError(
            f"{type(model).__name__} has several attention modules in a layer, or several towers: choose the "
            "self-attention of one with modules=..."
        )
