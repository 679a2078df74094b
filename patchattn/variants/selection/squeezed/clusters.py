"""What Squeezed Attention knows of a fixed prefix: which of its keys are alike, in a file."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from patchattn_kernels.rows import full_precision

from ....core.call import AttentionCall
from ....core.heads import BaseFacts, parse_facts
from ....core.patching import is_patched
from ....core.probing import probed
from ....core.selection import base_model, input_device, select_sites
from ....core.sites import AttentionSite
from ....files.documents import parse_json, quoted
from ....files.tensors import write_tensors
from ....reading.whole import whole_sites

_FORMAT = "patchattn clusters of a prefix 1"
_STEPS = 1000  # quantiles of scores are told in steps of a thousandth
_MOST = 2**15  # clusters that int16 counts


@dataclass(frozen=True, eq=False)
class PrefixClusters:
    """Which keys of a prefix are alike, of one model.

    Attributes:
        fine: layer to `(Hkv, C)` int16, or `(1, C)` for all kv heads: number of each key's cluster, of the first C
            tokens of the prefix.
        scores: `(levels, 1001)` float32: of each level, clusters first, the quantiles of what its keys score for the
            last tokens of the prefix.
        window: how many these are, behind the C.
        coarse: layer to `(Hkv or 1, K)` int16: number of the cluster of clusters that each is in; of the second level.
        tokens: `(C + window,)` int64 the ids of the prefix; `None`: prompts are not compared with it.
        base: the model, where it is known.
    """

    fine: dict[int, torch.Tensor] = field(repr=False)
    scores: torch.Tensor = field(repr=False)
    window: int
    coarse: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    tokens: torch.Tensor | None = field(default=None, repr=False)
    base: BaseFacts | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def length(self) -> int:
        """Tokens of the prefix."""
        return next(iter(self.fine.values())).shape[1] + self.window

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many clusters each level has, empty ones included."""
        most = [max(int(each.max()) for each in level.values()) + 1 for level in (self.fine, self.coarse) if level]
        return (next(iter(self.coarse.values())).shape[1], most[1]) if self.coarse else (most[0],)

    def thresholds(self, sparsity: float) -> tuple[float, ...]:
        """By level, the score that a share of the keys did not exceed; between two steps interpolated."""
        grid = np.linspace(0.0, 1.0, _STEPS + 1)
        return tuple(float(np.interp(sparsity, grid, level)) for level in self.scores.double().numpy())

    def of_layer(self, site: AttentionSite) -> list[torch.Tensor]:
        """By level, `(Hkv, C)` and `(Hkv, K)`, of one attention module; ValueError for another number of kv heads."""
        heads = site.require("kv_heads", by="Squeezed Attention")
        found = [level[site.layer_index] for level in (self.fine, self.coarse) if level]
        if found[0].shape[0] not in (1, heads):
            raise ValueError(
                f"These clusters are of {found[0].shape[0]} kv heads, and {site.name} has {heads}: make them with "
                "`patchattn calibrate squeezed` for this model."
            )
        return [level.expand(heads, -1) for level in found]

    def chosen(self, model: nn.Module, sites: Sequence[AttentionSite]) -> list[AttentionSite]:
        """The attention modules that there are clusters of; ValueError for another model, or where there is none."""
        found = [site for site in sites if site.layer_index in self.fine]
        if not found:
            raise ValueError(
                f"There are clusters of the layers {sorted(self.fine)}, none of which is among those chosen."
            )
        for site in found:
            if self.base is not None:
                self.base.check(model, site, "file of clusters")
            self.of_layer(site)
        return found

    def save(self, path: str | Path, **about: Any) -> None:
        """Write them as safetensors, whole or not at all; `about` is noted beside them."""
        tensors = {f"fine.{layer}": labels for layer, labels in self.fine.items()}
        tensors |= {f"coarse.{layer}": labels for layer, labels in self.coarse.items()}
        tensors |= {"scores": self.scores} | ({} if self.tokens is None else {"tokens": self.tokens})
        base = None if self.base is None else vars(self.base)
        told = {"format": _FORMAT, "window": str(self.window), "base": json.dumps(base), "about": json.dumps(about)}
        write_tensors(path, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, told)

    @classmethod
    def load(cls, path: str | Path) -> "PrefixClusters":
        """Read what `save` wrote; ValueError if there is no such file, it is damaged or holds something else."""
        if not os.path.isfile(path):
            raise ValueError(
                f"There is no file {quoted(str(path))} with clusters; `patchattn calibrate squeezed` writes one."
            )
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise ValueError("it holds no clusters of a prefix")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            base = parse_json(about.get("base", "null"), "base")
            levels = [
                {
                    int(name.partition(".")[2]): labels
                    for name, labels in tensors.items()
                    if name.startswith(f"{level}.")
                }
                for level in ("fine", "coarse")
            ]
            facts = None if base is None else parse_facts(base)
            scores, tokens = tensors.get("scores", torch.empty(0)), tensors.get("tokens")
            return cls(levels[0], scores, int(about.get("window", "-1")), levels[1], tokens, facts)
        except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged or not a file that `patchattn calibrate squeezed` wrote: {error}."
            ) from error


def _check(given: PrefixClusters) -> None:
    """ValueError unless its parts fit each other."""
    levels, window = 2 if given.coarse else 1, given.window
    labels = [*given.fine.values(), *given.coarse.values()]
    wrong = None
    if not given.fine or window < 1 or any(t.dim() != 2 or t.dtype != torch.int16 or not t.numel() for t in labels):
        wrong = "clusters are int16 (kv heads, keys) by layer, and the window is at least 1"
    elif min(int(each.min()) for each in labels) < 0:
        wrong = "clusters are numbered from 0"
    elif any(len({each.shape[1] for each in level.values()}) > 1 for level in (given.fine, given.coarse)):
        wrong = "layers differ in the number of keys that are clustered, or of clusters"
    elif given.coarse and any(
        each.shape[0] != given.fine[layer].shape[0] or each.shape[1] <= int(given.fine[layer].max())
        for layer, each in given.coarse.items()
    ):
        wrong = "not every cluster is in one of the second level"
    elif given.coarse and given.coarse.keys() != given.fine.keys():
        wrong = "layers differ in their levels"
    elif tuple(given.scores.shape) != (levels, _STEPS + 1) or bool((given.scores.diff(dim=-1) < 0).any()):
        wrong = f"scores are {levels} rows of {_STEPS + 1} quantiles, ascending"
    elif given.tokens is not None and tuple(given.tokens.shape) != (given.length,):
        wrong = f"the prefix has {given.length} tokens, and ids of {tuple(given.tokens.shape)}"
    if wrong:
        raise ValueError(wrong)


def prefix_clusters(
    model: nn.Module,
    tokens: Sequence[int],
    *,
    share: float = 0.05,
    coarse: float | None = None,
    window: int = 100,
    seed: int = 0,
    modules: str | list[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> PrefixClusters:
    """Cluster the keys of a prefix in each kv head, in one run of the model over it.

    Keys are clustered by their cosine: by scikit-learn's k-means, with k-means++, of keys of length 1. Without those of
    the last `window` tokens, which are always read, and whose queries say how keys score (arXiv 2411.09688, sections
    4.1 and 4.2).

    Args:
        model: a causal language model that is not patched, in evaluation mode.
        tokens: ids of the prefix, those that every prompt will begin with.
        share: of the keys that are clustered, how many clusters there are.
        coarse: likewise, how many clusters of clusters; by default there is one level alone.
        window: last tokens of the prefix that are not clustered.
        seed: of k-means.
        modules: names of attention modules, or regular expressions; needed where a model has several decoders.
        progress: called with the number of layers done.

    Raises:
        ValueError: an argument out of range, a prefix too short, a model that is patched or training, or modules of
            which several are in one layer.
        NotImplementedError: no attention module is causal self-attention without a sliding window.
        ImportError: there is no scikit-learn (`pip install patchattn[eval]`).
    """
    base: Any = base_model(model)
    if base.training or is_patched(base):
        raise ValueError(
            "Keys are clustered of a model as it is, without a patch, and in evaluation mode: model.eval()."
        )
    count = len(tokens) - window
    sizes = [int(count * each) for each in (share, coarse) if each is not None]
    if window < 1 or count < 1 or not 0.0 < share <= 1.0:
        raise ValueError(
            f"Expected a prefix longer than the window, a window of at least 1 and a share above 0 and at most 1, got "
            f"{len(tokens)} tokens, {window} and {share}."
        )
    sizes[0] = max(1, sizes[0])
    if sizes[0] > _MOST or (coarse is not None and not 1 <= sizes[1] < sizes[0]):
        raise ValueError(
            f"Expected at most {_MOST} clusters, and of the second level fewer than of the first, but one at least; "
            f"got {' and '.join(map(str, sizes))} of {count} keys."
        )
    sites = whole_sites(base, select_sites(base, modules=modules), by="Squeezed Attention")
    if len({site.layer_index for site in sites}) < len(sites):
        raise ValueError("Several of the chosen attention modules are in one layer: choose a decoder with modules=...")
    levels: list[dict[int, torch.Tensor]] = [{} for _ in sizes]
    found: list[list[torch.Tensor]] = [[] for _ in sizes]

    def see(call: AttentionCall, output: torch.Tensor) -> None:
        key, query = full_precision(call.key[0, :, :count]), call.query[:, :, count:]
        labels = torch.stack([_clustered(head, sizes[0], seed) for head in key]).to(key.device)
        means = means_of(key[None], labels, sizes[0])
        parts = [(labels, means)]
        levels[0][call.site.layer_index] = labels.to(torch.int16).cpu()
        if coarse is not None:
            of_means = torch.stack([_clustered(head, sizes[1], seed) for head in means[0]]).to(key.device)
            levels[1][call.site.layer_index] = of_means.to(torch.int16).cpu()
            parts.append((of_means.gather(1, labels), means_of(means, of_means, sizes[1])))
        for level, (of_keys, centres) in enumerate(parts):
            counts = counted(of_keys, centres.shape[2])
            scores = scores_of(query, centres, counts, call)[0].mean(dim=1)
            of_heads = of_keys.repeat_interleave(len(scores) // len(of_keys), dim=0)
            found[level].append(scores.gather(1, of_heads).float().cpu().flatten())
        if progress is not None:
            progress(len(levels[0]))

    ids = torch.tensor([list(tokens)], device=input_device(base))
    with torch.no_grad(), probed(base, see, modules=[f"^{site.name}$" for site in sites]):
        base(input_ids=ids, use_cache=False)
    grid = np.linspace(0.0, 1.0, _STEPS + 1)
    scores = torch.tensor(np.stack([np.quantile(torch.cat(each).double().numpy(), grid) for each in found]))
    told = torch.tensor(list(tokens))
    second = levels[1] if coarse is not None else {}
    return PrefixClusters(levels[0], scores.float(), window, second, told, BaseFacts.of(base, sites[0]))


def _clustered(vectors: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`(N,)` number of each vector's cluster, of `(N, D)`, by their cosine."""
    from sklearn.cluster import KMeans

    unit = F.normalize(vectors, dim=-1).cpu().numpy()
    fitted = KMeans(count, init="k-means++", n_init=1, max_iter=300, random_state=seed).fit(unit)
    return torch.from_numpy(fitted.labels_).long()


def means_of(vectors: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """`(B, Hkv, K, D)` means of the vectors `(B, Hkv, N, D)` of each cluster, zeros of empty ones.

    Args:
        vectors: in `full_precision`.
        labels: `(Hkv, N)` their clusters.
        count: K.
    """
    index = labels.long()[None, :, :, None].expand(vectors.shape)
    sums = vectors.new_zeros(*vectors.shape[:2], count, vectors.shape[-1]).scatter_add(2, index, vectors)
    return sums / counted(labels, count).clamp(min=1)[..., None]


def counted(labels: torch.Tensor, count: int) -> torch.Tensor:
    """`(Hkv, K)` how many keys each cluster has, of labels `(Hkv, N)`."""
    ones = torch.ones(labels.shape, device=labels.device)
    return ones.new_zeros(len(labels), count).scatter_add(1, labels.long(), ones)


def scores_of(
    query: torch.Tensor,
    means: torch.Tensor,
    counts: torch.Tensor,
    call: AttentionCall,
    left: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(B, H, Tq, K)` the weight that a key of each cluster would have if all keys were the means of theirs.

    Args:
        query: `(B, H, Tq, D)`.
        means: `(B, Hkv, K, D)`.
        counts: `(Hkv, K)` keys of the clusters.
        call: whose logits they are like.
        left: `(B, H, K)` bool: which clusters count in the softmax; by default all do.
    """
    query, groups = full_precision(query), means.shape[1]
    logits = (query.unflatten(1, (groups, -1)) @ means[:, :, None].mT).flatten(1, 2) * call.scaling
    softcap: float | None = call.kwargs.get("softcap")
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    masses = logits + counts.log().repeat_interleave(query.shape[1] // groups, dim=0)[None, :, None]
    if left is not None:
        masses = masses.masked_fill(~left[:, :, None], float("-inf"))
    return (logits - masses.logsumexp(dim=-1, keepdim=True)).exp()
