"""How important every query head of a model is, as a calibration finds it, saves it, and ranks by it."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from torch import nn

from ..files.documents import naming, quoted, read_json, write_json
from .heads import BaseFacts, HeadList, parse_facts
from .host import find_sites
from .settings import nearest

Scope = Literal["global", "layer"]
_FORMAT = "patchattn head importance 1"


@dataclass(frozen=True)
class SiteScores:
    """The heads of one attention module.

    Attributes:
        layer: index of its layer, as `AttentionSite.layer_index`.
        kv_heads: heads of its keys and values; equal numbers of query heads follow each other on each, but where heads
            were pruned.
        scores: one per query head; the higher, the more it is worth to keep.
    """

    layer: int
    kv_heads: int
    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.scores or not all(math.isfinite(score) for score in self.scores):
            raise ValueError(f"every query head needs a finite score, got {list(self.scores)}.")
        if self.layer < 0 or self.kv_heads < 1 or len(self.scores) < self.kv_heads:
            raise ValueError(
                f"{len(self.scores)} query heads on {self.kv_heads} kv heads in layer {self.layer}: expected a layer "
                "counted from 0, and at least one query head per kv head."
            )


@dataclass(frozen=True)
class HeadImportance:
    """A score of every query head; higher is more important. Heads are counted from 0, as the model is now.

    Attributes:
        sites: name of the attention module to its heads, in the order of the model.
        method: how they were scored, such as `michel`.
        settings: of the method.
        base: the model; its `heads` are those of the first site.
        tokens: query tokens that the scores are from, in the site that saw the most; 0 for a method without data.
    """

    sites: dict[str, SiteScores]
    method: str
    base: BaseFacts
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("an importance needs the scores of at least one attention module.")

    @property
    def scores(self) -> dict[str, list[float]]:
        """Name of the attention module to the score of each of its query heads."""
        return {name: list(site.scores) for name, site in self.sites.items()}

    def highest(self, count: int | None = None, *, threshold: float | None = None) -> HeadList:
        """The heads of the largest scores, as settings take lists of heads.

        Args:
            count: so many; equal scores go by layer and head.
            threshold: instead, all whose score is above it.

        Raises:
            ValueError: neither or both of them, a count of less than 1 or of more than there are, or no head.
        """
        if (count is None) == (threshold is None):
            raise ValueError(f"Give either count or threshold, got count={count} and threshold={threshold}.")
        ranked = sorted(
            (-score, site.layer, head) for site in self.sites.values() for head, score in enumerate(site.scores)
        )
        if count is not None and not 1 <= count <= len(ranked):
            raise ValueError(f"count is a number of heads from 1 to {len(ranked)}, got {count}.")
        chosen = ranked[:count] if threshold is None else [one for one in ranked if -one[0] > threshold]
        if not chosen:
            raise ValueError(f"No head scores above {threshold}; the highest score is {-ranked[0][0]:.3f}.")
        heads: dict[int, list[int]] = {}
        for _, layer, head in chosen:
            heads.setdefault(layer, []).append(head)
        return HeadList({layer: tuple(sorted(heads[layer])) for layer in sorted(heads)}, self.base)

    def lowest(
        self,
        *,
        sparsity: float | None = None,
        count: int | None = None,
        scope: Scope = "global",
        groups: bool = False,
        keep_one_per_layer: bool = True,
    ) -> dict[str, tuple[int, ...]]:
        """The heads to be removed first.

        Args:
            sparsity: share of the query heads, from 0 to 1; at most this share is taken.
            count: number of query heads instead; in all, or of every attention module with scope `layer`.
            scope: `global` compares heads of all layers, `layer` takes the same share of each attention module.
            groups: take only all query heads of a kv head together; their mean score counts. Never more heads than
                asked for, so fewer where the groups do not fit. Not where pruning has left groups of different sizes.
            keep_one_per_layer: leave the best head, or group, of every attention module.

        Returns:
            Name of the attention module to its heads, sorted; modules that lose none are left out. Equal scores go by
            the order of the model.

        Raises:
            ValueError: neither or both of sparsity and count, out of range, or more than there is to take.
        """
        if (sparsity is None) == (count is None):
            raise ValueError(f"Give either sparsity or count, got sparsity={sparsity} and count={count}.")
        if sparsity is not None and not 0.0 <= sparsity <= 1.0:
            raise ValueError(f"sparsity is a share from 0 to 1, got {sparsity}.")
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            raise ValueError(f"count is a number of heads, at least 0, got {count!r}.")
        if scope not in ("global", "layer"):
            raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}.")
        together = [list(self.sites)] if scope == "global" else [[name] for name in self.sites]
        removed: dict[str, list[int]] = {name: [] for name in self.sites}
        for names in together:
            available = sum(len(self.sites[name].scores) for name in names)
            # a share such as 0.29 of 100 is a little less than 29 in binary
            wanted = count if sparsity is None else math.floor(sparsity * available + 1e-9)
            self._take(names, int(wanted or 0), groups, keep_one_per_layer, removed)
        return {name: tuple(sorted(heads)) for name, heads in removed.items() if heads}

    def lowest_of_each(self, sparsity: float, *, groups: bool = False) -> dict[str, tuple[int, ...]]:
        """The heads to be removed first where all attention modules, and in each all kv heads, lose equally many.

        Args:
            sparsity: share of the query heads of each kv head, from 0 to 1, rounded down; each keeps one. Where every
                query head has a kv head of its own, share of these pairs.
            groups: share of the kv heads of each attention module, which go with all their query heads.

        Returns, raises: as `lowest`.
        """
        if groups:
            return self.lowest(sparsity=sparsity, scope="layer", groups=True)
        parts: dict[str, SiteScores] = {}
        for name, site in self.sites.items():
            size, rest = divmod(len(site.scores), site.kv_heads)
            if rest:
                raise ValueError(
                    f"{name} has {len(site.scores)} query heads on {site.kv_heads} kv heads: equally many of each "
                    "cannot be taken out."
                )
            size = len(site.scores) if size == 1 else size
            for start in range(0, len(site.scores), size):
                parts[f"{name}/{start}"] = SiteScores(site.layer, 1, site.scores[start : start + size])
        removed: dict[str, list[int]] = {}
        for part, heads in replace(self, sites=parts).lowest(sparsity=sparsity, scope="layer").items():
            name, _, first = part.rpartition("/")
            removed.setdefault(name, []).extend(int(first) + head for head in heads)
        return {name: tuple(sorted(heads)) for name, heads in removed.items()}

    def _take(
        self, names: Sequence[str], wanted: int, groups: bool, keep_one: bool, removed: dict[str, list[int]]
    ) -> None:
        """Add the lowest units of some attention modules to `removed`."""
        units: list[tuple[float, int, str, range]] = []
        for name in names:
            site = self.sites[name]
            if groups and len(site.scores) % site.kv_heads:
                raise ValueError(
                    f"{name} has {len(site.scores)} query heads on {site.kv_heads} kv heads: which belong together is "
                    "not known. Choose single heads, with groups=False."
                )
            size = len(site.scores) // site.kv_heads if groups else 1
            starts = range(0, len(site.scores), size)
            ranked = sorted((math.fsum(site.scores[s : s + size]) / size, s, name, range(s, s + size)) for s in starts)
            units += ranked[:-1] if keep_one else ranked
        most = sum(len(heads) for *_, heads in units)
        if wanted > most:
            raise ValueError(
                f"{wanted} heads are to be removed, but there are only {most} to choose from"
                f"{' when one of every layer is kept' if keep_one else ''}: remove fewer."
            )
        order = {name: index for index, name in enumerate(self.sites)}
        for _, _, name, heads in sorted(units, key=lambda unit: (unit[0], order[unit[2]], unit[1])):
            if len(heads) <= wanted:
                removed[name] += heads
                wanted -= len(heads)

    def check(self, model: nn.Module) -> None:
        """ValueError unless the model has the attention modules, with as many heads, that were scored."""
        there = {site.name: site for site in find_sites(model)}
        for name, scored in self.sites.items():
            if name not in there:
                raise ValueError(
                    f"This importance is of {self.base} and scores {name!r}, which {type(model).__name__} does not "
                    f"have{nearest(name, list(there))}"
                )
            heads = (there[name].query_heads, there[name].kv_heads)
            if heads != (len(scored.scores), scored.kv_heads):
                raise ValueError(
                    f"This importance is of {self.base} and scores {len(scored.scores)} query heads on "
                    f"{scored.kv_heads} kv heads in {name}, where the model has {heads[0]} on {heads[1]}. Score this "
                    "model anew."
                )

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        sites = [{"name": name, **vars(site), "scores": list(site.scores)} for name, site in self.sites.items()]
        content = {
            "format": _FORMAT,
            "method": self.method,
            "settings": self.settings,
            "base": vars(self.base).copy(),
            "tokens": self.tokens,
            "sites": sites,
        }
        write_json(Path(path), content)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, not valid JSON, or not what `save` writes; the message says what is wrong.
        """
        if not os.path.isfile(path):
            raise ValueError(f"There is no importance file {quoted(os.fspath(path))}.")
        try:
            return cls._parse(read_json(path))
        except (TypeError, ValueError) as error:
            raise ValueError(str(naming(path, error))) from error

    @classmethod
    def _parse(cls, content: Any) -> Self:
        if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
            raise ValueError(
                f"expected an object with format={_FORMAT!r}: this file does not hold the importance of heads."
            )
        kinds = {"format": str, "method": str, "settings": dict, "base": dict, "tokens": int, "sites": list}
        _check_fields("an importance", content, kinds)
        sites: dict[str, SiteScores] = {}
        for entry in content["sites"]:
            _check_fields("a site", entry, {"name": str, "layer": int, "kv_heads": int, "scores": list})
            if wrong := [s for s in entry["scores"] if isinstance(s, bool) or not isinstance(s, int | float)]:
                raise ValueError(f"{entry['name']} has the score {quoted(wrong[0])}; expected numbers.")
            if entry["name"] in sites:
                raise ValueError(f"{entry['name']} appears twice.")
            sites[entry["name"]] = SiteScores(entry["layer"], entry["kv_heads"], tuple(map(float, entry["scores"])))
        return cls(sites, content["method"], parse_facts(content["base"]), content["settings"], content["tokens"])


def _check_fields(what: str, given: Any, kinds: Mapping[str, type]) -> None:
    if not isinstance(given, Mapping) or set(given) != set(kinds):
        got = sorted(given) if isinstance(given, Mapping) else given
        raise ValueError(f"{what} has the fields {', '.join(kinds)}, got {quoted(got)}.")
    for name, kind in kinds.items():
        if not isinstance(given[name], kind) or isinstance(given[name], bool):
            raise ValueError(f"{name} of {what} must be {kind.__name__}, got {quoted(given[name])}.")
