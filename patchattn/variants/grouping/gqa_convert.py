"""GQA conversion: groups of kv heads become one. After GQA, arXiv 2305.13245, with starts that keep more of them; and
WGQA, arXiv 2407.10855, which learns how much of each head goes into the one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ...core.chain import active_chain
from ...core.context import running_module
from ...core.hooks import Hook
from ...core.probe import chain_on
from ...core.registry import register_variant
from ...core.selection import base_model, evaluating
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import VariantConfig, VariantInfo
from ...inspection.kv_moments import kv_moments
from ...surgery.kv_merge import Group, KvMerge, KvMoments, Maps, fold, merged_projections
from ...surgery.projections import unrecognised

_TINY = 1e-6  # of the largest: what is smaller is taken for that
_ROUNDS = 30

__all__ = ["GqaConvert", "GqaConvertConfig", "fold"]


@dataclass(frozen=True, kw_only=True)
class GqaConvertConfig(VariantConfig):
    """Settings of GQA conversion; every field is described by `patchattn info gqa_convert`."""

    kv_heads: int = option(
        1,
        help="How many kv heads a layer is left with, a divisor of those it has; neighbours are merged. 1 is "
        "multi-query attention, 0 leaves layers as they are.",
        minimum=0,
    )
    method: Literal["components", "procrustes", "mean"] = option(
        "components",
        help="Merge by principal components of keys, pair by pair of rotary channels, and of what is read of values; "
        "by their mean once turned to agree; or by their mean.",
        source="ours; the paper has mean, arXiv 2412.20677 procrustes",
    )
    weighted: bool = option(
        True, help="With components: heads count in each pair of channels as much as queries use it."
    )
    factors: Literal["none", "head", "row", "column"] = option(
        "none",
        help="Learned factors, 1 at the start, of what each head gives to the merged one (WGQA): one per head, per "
        "channel of it (row), or per channel of the layer's input (column).",
        source="GQA has none; arXiv 2407.10855 has all three",
    )
    moments: KvMoments | None = option(
        None,
        help="What patchattn.kv_moments(model, batches) returned; without, the inputs of layers are taken for white "
        "noise. A saved patch holds the weights that came of them instead.",
    )

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() if self.moments is None else replace(self, moments=None).to_dict()


class GqaConvert(KvMerge):
    """Attention with fewer kv heads: maps of them go into the projections of keys and values, the way back into those
    of queries and of the output."""

    config_class = GqaConvertConfig
    config: GqaConvertConfig

    def __init__(self, config: GqaConvertConfig, site: AttentionSite) -> None:
        super().__init__(replace(config, moments=None), site, config.kv_heads, config.moments)
        have = site.require("kv_heads", by="GQA conversion")
        if config.kv_heads and have % config.kv_heads:
            raise ValueError(f"{site.name} has {have} kv heads, which {config.kv_heads} does not divide.")
        if self.has_factors:
            dim, width = (site.require(fact, by="WGQA") for fact in ("head_dim", "input_size"))
            heads = (config.kv_heads, have // config.kv_heads)
            sizes = {"head": (1, 1), "row": (dim, 1), "column": (1, width)}[config.factors]
            for stream in ("key", "value"):
                self.register_buffer(f"{stream}_shares", torch.zeros(*heads, dim, width + 1))
                self.register_parameter(f"{stream}_factors", nn.Parameter(torch.ones(*heads, *sizes)))

    @classmethod
    def fit(
        cls, config: GqaConvertConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[GqaConvertConfig, Sequence[AttentionSite]]:
        if not config.kv_heads:
            return config, sites
        for site in sites:
            merged_projections(model, site)
            if config.factors != "none" and "fused" in site.projections:
                raise unrecognised(site, "WGQA's factors are of projections of keys and of values, which are one here")
        return replace(config, moments=_checked(config, model, sites)), sites

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"kv_heads": 0}

    @property
    def has_factors(self) -> bool:
        return self.config.factors != "none" and not self.is_identity

    @property
    def needs_context(self) -> bool:
        return self.has_factors

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def keep_shares(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.has_factors:
            for stream, shares in (("key", keys), ("value", values)):
                self.get_buffer(f"{stream}_shares").copy_(shares)

    def hooks(self, model: nn.Module) -> list[Hook]:
        if not self.has_factors:
            return super().hooks(model)
        streams = (("key", self.after_keys), ("value", self.after_values))
        places = [(model.get_submodule(self._projection(stream)), method) for stream, method in streams]
        return [*super().hooks(model), *(Hook(module, "after", method) for module, method in places)]

    def after_keys(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        """What the projection of keys gives with the factors as they are now, of which it knows those of the start."""
        return output + self._of_this_call()("change", "key", args[0]).to(output.dtype)

    def after_values(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        """Likewise, of values."""
        return output + self._of_this_call()("change", "value", args[0]).to(output.dtype)

    def change(self, stream: str, inputs: torch.Tensor) -> torch.Tensor:
        """`(..., G * D)` what factors other than 1 add to merged keys or values, of inputs `(..., E)`."""
        weight, bias = self._changes(stream)
        return nn.functional.linear(inputs.to(weight.dtype), weight, bias)

    def _changes(self, stream: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`(G * D, E)` and `(G * D,)`; what is by the input's channel leaves the bias alone."""
        shares, more = self.get_buffer(f"{stream}_shares"), self.get_parameter(f"{stream}_factors") - 1
        weight = (shares[..., :-1] * more).sum(1)
        of_bias = more if more.shape[-1] == 1 else torch.zeros_like(more[..., :1])
        return weight.flatten(0, 1), (shares[..., -1:] * of_bias).sum(1).flatten()

    def _of_this_call(self) -> "GqaConvert":
        """The variant that computes: PEFT trains a copy of the one that hooks were placed of."""
        chain: Any = chain_on(running_module())
        return next(variant for variant in active_chain(chain).variants().values() if isinstance(variant, GqaConvert))

    def _projection(self, stream: str) -> str:
        return f"{self.site.name}.{self.site.projections[stream]}"

    @torch.no_grad()
    def fold(self, plain: nn.Module) -> None:
        for stream in ("key", "value") if self.has_factors else ():
            layer: Any = plain.get_submodule(self._projection(stream))
            weight, bias = self._changes(stream)
            layer.weight = nn.Parameter(layer.weight + weight.to(layer.weight), layer.weight.requires_grad)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias + bias.to(layer.bias), layer.bias.requires_grad)

    def merge(self, group: Group) -> tuple[Maps, Maps]:
        moments, method = group.moments, self.config.method
        if method == "mean":
            means = _means(group.keys)
            return means, means
        if moments.fault is not None:
            raise unrecognised(self.site, f"{moments.fault}. method='mean' needs to know nothing of that")
        if method == "procrustes":
            return _keys(group, lambda moment, energy: _turned(moment)), Maps(*_turned(group.values))
        weigh = self.config.weighted

        def parts(moment: torch.Tensor, energy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scale = energy.sqrt() if weigh else torch.ones_like(energy)
            eye = torch.eye(moment.shape[-1]).to(moment)
            return _components(moment, scale[..., None, None] * eye)

        return _keys(group, parts), Maps(*_components(group.values, _power(group.readers, 0.5)))


def _checked(config: GqaConvertConfig, model: nn.Module, sites: Sequence[AttentionSite]) -> KvMoments:
    """The moments given, or those of white noise."""
    if config.moments is not None:
        return config.moments
    base: Any = base_model(model)
    with evaluating(base):
        found = kv_moments(base, [base.dummy_inputs], sites=sites)
    white = {
        name: replace(moments, inputs=torch.eye(len(moments.inputs), dtype=torch.float64))
        for name, moments in found.sites.items()
    }
    return KvMoments(white)


def _keys(group: Group, of: Any) -> Maps:
    """Maps of keys: a complex number for each pair of channels that turn together, any map among those that do not.

    Args:
        group: the heads.
        of: of moments `(..., m, d, m, d)` and mean squares of queries `(..., m)`, maps to and from one head.
    """
    keys, energy = group.keys, group.queries
    encode = torch.zeros_like(keys[:, :, :, 0])  # (G, m, D, D)
    decode = torch.zeros_like(encode)
    first, second = group.moments.pairs.to(keys.device).unbind(1)
    if len(first):
        a, b, ba = (
            keys[:, :, i][..., j].diagonal(dim1=2, dim2=4)
            for i, j in ((first, first), (second, second), (second, first))
        )
        ab = keys[:, :, first][..., second].diagonal(dim1=2, dim2=4)
        moment = torch.complex(a + b, ba - ab).permute(0, 3, 1, 2)[:, :, :, None, :, None]  # (G, P, m, 1, m, 1)
        used = (energy[..., first] + energy[..., second]).transpose(1, 2)  # (G, P, m)
        for numbers, whole in zip(of(moment, used), (encode, decode), strict=True):
            number = numbers[..., 0, 0].transpose(1, 2)  # (G, m, P)
            whole[:, :, first, first] = whole[:, :, second, second] = number.real
            whole[:, :, second, first], whole[:, :, first, second] = number.imag, -number.imag
    turned = torch.zeros(keys.shape[2], dtype=torch.bool)
    turned[group.moments.pairs.flatten()] = True
    rest = (~turned).nonzero()[:, 0].to(keys.device)
    if len(rest):
        moment = keys[:, :, rest][..., rest]
        for numbers, whole in zip(of(moment, energy[..., rest].sum(-1)), (encode, decode), strict=True):
            whole[:, :, rest[:, None], rest] = numbers
    return Maps(encode, decode)


def _means(keys: torch.Tensor) -> Maps:
    eye = torch.eye(keys.shape[2]).to(keys).expand(*keys.shape[:3], -1)
    return Maps(eye / keys.shape[1], eye)


def _components(moment: torch.Tensor, root: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The d directions that keep most of m heads of d channels, once each is multiplied by its root.

    Args:
        moment: `(..., m, d, m, d)` Hermitian.
        root: `(..., m, d, d)` Hermitian and positive.
    """
    heads, dim = moment.shape[-4:-2]
    largest = (
        root.diagonal(dim1=-2, dim2=-1)
        .abs()
        .amax((-2, -1))
        .clamp(min=torch.finfo(root.dtype).tiny ** 0.5)[..., None, None, None]
    )
    root = root + _TINY * largest * torch.eye(dim).to(root)
    scaled = torch.einsum("...mde,...menf,...nfg->...mdng", root, moment, root)
    _, vectors = torch.linalg.eigh(scaled.reshape(*moment.shape[:-4], heads * dim, heads * dim))
    chosen = vectors[..., -dim:].unflatten(-2, (heads, dim))  # (..., m, d, d)
    encode, decode = chosen.mH @ root, torch.linalg.solve(root, chosen)
    size = (decode.mH @ decode).mean(-3, keepdim=True)
    return _agreeing(_power(size, 0.5) @ encode, decode @ _power(size, -0.5))


def _turned(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads turned, each by a unitary map, to be as alike as can be; their mean is what is shared (Procrustes)."""
    heads, dim = moment.shape[-4:-2]
    decode = torch.eye(dim).to(moment).expand(*moment.shape[:-4], heads, dim, dim)
    for _ in range(_ROUNDS):
        decode = _unitary(torch.einsum("...mdne,...nef->...mdf", moment, decode))
    return _agreeing(decode.mH / heads, decode)


def _agreeing(encode: torch.Tensor, decode: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same maps, the shared head turned so that going back from it changes as little as can be."""
    turn = _unitary(decode.mean(-3, keepdim=True))
    return turn @ encode, decode @ turn.mH


def _unitary(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """Of a Hermitian positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=_TINY**2 * values.amax(-1, keepdim=True)).pow(exponent)
    return (vectors * values[..., None, :]) @ vectors.mH


register_variant(
    VariantInfo(
        name="gqa_convert",
        variant=GqaConvert,
        title="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
        arxiv_id="2305.13245",
        year=2023,
        summary="Groups of kv heads are merged into one each, for a smaller kv cache.",
        extra_parameters="none; fewer. With factors one per kv head and layer, or one per channel",
        needs_training=True,
        presets={"wgqa": {"method": "mean", "factors": "head"}},
        examples=({"kv_heads": 1}, {"kv_heads": 1, "method": "mean", "factors": "row"}),
    )
)
