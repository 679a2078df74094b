"""How attention modules rotate queries and keys, found by looking at the model's own run at shifted positions.

A rotary model gives the same output where all positions are shifted, while queries and keys of every rotated layer turn
by the shift. So what turns those of one run into those of another is how they are rotated. No name of a module or of an
attribute is known here.
"""

import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.call import AttentionCall
from ..core.linear import is_dispatched
from ..core.probing import probed
from ..core.selection import evaluating, input_device
from ..core.sites import AttentionSite
from .rotary import Rotary, Rotation, Rotations

TOKENS = 12
FIRST = 3  # position of the first of them
SHIFTS = (1, 37, 1000)
FAR = 1 << 20  # a position beyond every trained length
# The largest error of queries and keys, relative, of what is found; all others are wrong by 0.6 and more. In half
# precision deeper layers see rounding of the layers before, and the gap decides.
EXACT, ROUNDED, GAP = 1e-3, 0.15, 3.0

Layout = Literal["half", "interleaved"]
Share = Literal["first", "last"]
Form = Literal["pairs", "halves", "neighbours"]


@dataclass(frozen=True, eq=False)
class Seen:
    """One call of attention: queries and keys, which argument says their positions, and whether a kv cache, if there
    is one, holds these keys."""

    query: torch.Tensor
    key: torch.Tensor
    told: str | None
    is_stored: bool


@dataclass
class Run:
    """One forward of a language model.

    Attributes:
        calls: of its attention modules, by name.
        tables: calls of modules that were given the positions and gave two tables: path, and arguments by name.
    """

    calls: dict[str, Seen] = field(default_factory=dict)
    tables: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)


def find_rotations(model: nn.Module, sites: Sequence[AttentionSite], *, by: str) -> Rotations:
    """How each of some attention modules rotates its queries and keys.

    Runs the language models that they are in on a few random tokens, at positions that differ by a shift.

    Args:
        model: a transformers model.
        sites: attention modules of it.
        by: who asks, for messages.

    Returns:
        `Rotation`s as dictionaries, by name of the attention module.

    Raises:
        NotImplementedError: one rotates in no way that is known (learned positions, an embedding that depends on the
            length of the text, three axes of positions), stores something else than the keys it attends to (latents of
            multi-head latent attention), or is not told the positions; the model cannot be run, for its weights are on
            the meta device; or no module rotates at all.
    """
    found: Rotations = {}
    owners: dict[int, tuple[nn.Module, list[AttentionSite]]] = {}
    for site in sites:
        owner = _language_model(model, site, by)
        owners.setdefault(id(owner), (owner, []))[1].append(site)
    for owner, own in owners.values():
        for site, rotation in _rotations(model, owner, own, by):
            found[site.name] = rotation.to_dict()
    if all(rotation["share"] == "none" for rotation in found.values()):
        raise NotImplementedError(
            f"{by} turns rotated queries and keys, and no attention module that was chosen in {type(model).__name__} "
            "rotates them: their order is not told by positions, or by a bias."
        )
    return found


def _language_model(model: nn.Module, site: AttentionSite, by: str) -> nn.Module:
    """The innermost model around an attention module that can be run on ids at given positions."""
    parts = site.name.split(".")
    for count in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:count]))
        if isinstance(module, PreTrainedModel):
            names = inspect.signature(module.forward).parameters
            if "position_ids" in names and "input_ids" in names:
                return module
    raise _refused(by, site, "no model around it can be run on input_ids at given position_ids")


def _rotations(
    model: nn.Module, owner: nn.Module, sites: Sequence[AttentionSite], by: str
) -> Iterator[tuple[AttentionSite, Rotation]]:
    if any(p.is_meta for p in owner.parameters()) and not any(map(is_dispatched, owner.modules())):
        raise _refused(by, sites[0], "its weights are on the meta device, so that the model cannot be run")
    longest = min((site.max_positions for site in sites if site.max_positions), default=FAR)
    shifts = sorted({min(shift, longest - FIRST - TOKENS - 1) for shift in SHIFTS if longest > FIRST + TOKENS + 1})
    if not shifts:
        raise _refused(by, sites[0], f"its trained length is {longest} tokens, too short to look at two positions")
    generator = torch.Generator().manual_seed(0)
    embeddings = owner.get_input_embeddings()  # type: ignore[operator]
    ids = torch.randint(len(embeddings.weight), (1, TOKENS), generator=generator)
    places = FIRST + torch.arange(TOKENS)[None]
    runs = [_run(model, owner, sites, ids, places + shift, by) for shift in (0, *shifts)]
    rotaries = _candidates(model, runs[0], sites[0], by)
    for site in sites:
        if any(site.name not in run.calls for run in runs):
            raise _refused(by, site, "it was not called in a run of the model on a few tokens")
        yield site, _best(site, runs, shifts, rotaries, places, by)


def _run(
    model: nn.Module, owner: nn.Module, sites: Sequence[AttentionSite], ids: torch.Tensor, places: torch.Tensor, by: str
) -> Run:
    run, names, device = Run(), {module: name for name, module in model.named_modules()}, input_device(owner)
    ids, places = ids.to(device), places.to(device)

    def see(call: AttentionCall, output: torch.Tensor) -> None:
        told = next((name for name, value in call.kwargs.items() if _is_positions(value, places)), None)
        run.calls[call.site.name] = Seen(call.query.detach(), call.key.detach(), told, _is_stored(call))

    def see_tables(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not isinstance(output, tuple) or len(output) != 2 or not all(map(_is_table, output)):
            return
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        if any(_is_positions(value, places) for value in given.values()):
            path = names[module]
            plain = {n: v for n, v in given.items() if not isinstance(v, torch.Tensor)}
            run.tables[f"{path} {plain}"] = path, given

    wanted = "|".join(f"^{site.name}$".replace(".", r"\.") for site in sites)
    with ExitStack() as stack:
        for module in owner.modules():
            handle = module.register_forward_hook(see_tables, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(owner))
        stack.enter_context(probed(model, see, modules=wanted))
        try:
            owner(input_ids=ids, position_ids=places)
        except Exception as error:
            reason = f"the model cannot be run on {TOKENS} tokens at position {int(places[0, 0])} ({error})"
            raise _refused(by, sites[0], reason) from error
    return run


def _is_stored(call: AttentionCall) -> bool:
    """Whether the kv cache, if there is one, holds the last of the keys that are attended to."""
    cache = None if call.context.layer is None else call.context.layer.cache
    held = [] if cache is None else [getattr(layer, "keys", None) for layer in cache.layers]
    keys = [keys for keys in held if isinstance(keys, torch.Tensor) and keys.dim() == 4 and keys.shape[2]]
    return cache is None or any(
        part.shape == call.key[:, :, -part.shape[2] :].shape and torch.equal(part, call.key[:, :, -part.shape[2] :])
        for part in keys
    )


def _candidates(model: nn.Module, run: Run, site: AttentionSite, by: str) -> list[Rotary]:
    """All ways to rotate by what some module of the model gives."""
    found = []
    for path, given in run.tables.values():
        module = copy.deepcopy(model.get_submodule(path))
        places = next(v for v in given.values() if _is_integers(v))
        if places.dim() != 2:
            if places.dim() == 3 and _axes_differ(module, given):
                raise _refused(by, site, f"{type(module).__name__} has positions along several axes (M-RoPE)")
            raise _refused(by, site, f"{type(module).__name__} has positions of shape {tuple(places.shape)}")
        named: dict[str, Any] = {
            "module": (path,),
            "hidden": next((n for n, v in given.items() if _is_table(v)), None),
            "positions": next(n for n, v in given.items() if _is_integers(v)),
            "given": {n: v for n, v in given.items() if not isinstance(v, torch.Tensor)},
        }
        form = _form(_asked(module, given, places))
        if form is None:
            continue
        named |= {"form": form, "border": _border(module, given, site, by)}
        for layout, share in itertools.product(get_args(Layout), get_args(Share)):
            try:
                rotation = Rotation(layout=layout, share=share, **named)
            except TypeError as error:
                reason = f"{type(module).__name__} is called with what no patch can be saved with ({error})"
                raise _refused(by, site, reason) from error
            found.append(Rotary(rotation, model))
    return found


def _asked(module: nn.Module, given: dict[str, Any], places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module that was called with some arguments gives of other positions, in float32."""
    changed = {
        name: places if _is_integers(value) else value.float() if _is_table(value) else value
        for name, value in given.items()
    }
    cos, sin = module(**changed)
    return cos, sin


def _form(tables: tuple[torch.Tensor, torch.Tensor]) -> Form | None:
    """How often each angle is in tables `(1, T, w)`; `None`: they are not cosines and sines."""
    cos, sin = tables
    length = torch.hypot(cos, sin)
    if cos.dim() != 3 or not torch.allclose(length, length.flatten()[0].expand_as(length), rtol=1e-4):
        return None
    half = cos.shape[-1] // 2
    if cos.shape[-1] % 2 == 0:
        if all(torch.equal(t[..., :half], t[..., half:]) for t in tables):
            return "halves"
        if all(torch.equal(t[..., ::2], t[..., 1::2]) for t in tables):
            return "neighbours"
    return "pairs"


def _axes_differ(module: nn.Module, given: dict[str, Any]) -> bool:
    """Whether positions `(axes, B, T)` that are shifted along one axis are rotated otherwise than along all."""
    places = next(v for v in given.values() if _is_integers(v))
    one = places.clone()
    one[0] += 7
    tables = [_asked(copy.deepcopy(module), given, shifted)[0] for shifted in (places, one, places + 7)]
    return not torch.equal(tables[0], tables[1]) and not torch.equal(tables[1], tables[2])


def _border(module: nn.Module, given: dict[str, Any], site: AttentionSite, by: str) -> int | None:
    """The length of text from which on the tables of the first positions are others, or end; `None`: they never do."""
    places = next(v for v in given.values() if _is_integers(v))

    def first(last: int) -> torch.Tensor:
        longer = torch.cat([places, torch.full_like(places[:, :1], last)], dim=1)
        return _asked(copy.deepcopy(module), given, longer)[0][:, :TOKENS]

    alone = _asked(copy.deepcopy(module), given, places)[0]
    try:
        if torch.equal(first(FAR), alone):
            return None
    except (IndexError, RuntimeError):
        pass  # its table ends before
    border = site.max_positions
    if border is None or border < FIRST + TOKENS + 2 or not torch.equal(first(border - 2), alone):
        reason = (
            f"{type(module).__name__} rotates by frequencies that depend on the text's length, from an unknown one on"
        )
        raise _refused(by, site, reason)
    return border


def _best(
    site: AttentionSite,
    runs: Sequence[Run],
    shifts: Sequence[int],
    rotaries: Sequence[Rotary],
    places: torch.Tensor,
    by: str,
) -> Rotation:
    seen = runs[0].calls[site.name]
    if not seen.is_stored:
        raise _refused(by, site, "its kv cache holds something else than the keys it attends to (compressed latents)")
    pairs = [
        (one, other, places.to(one.device), places.to(one.device) + shift)
        for shifted, shift in zip((run.calls[site.name] for run in runs[1:]), shifts, strict=True)
        for one, other in ((seen.query, shifted.query), (seen.key, shifted.key))
    ]
    unrotated = max(_error(vectors, wanted) for vectors, wanted, _, _ in pairs)
    errors = {("none", "half"): (unrotated, Rotation(share="none"))}
    for rotary in rotaries:
        count = rotary.tables(places.to(seen.query.device)[:, :1])[0].shape[-1]
        if 2 * count > seen.query.shape[-1]:
            continue
        error = max(_error(rotary.turned(x, old, new), wanted) for x, wanted, old, new in pairs)
        rotation = rotary.rotation
        # What are other words for the same is one way: no gap is between them.
        way = rotation.share if 2 * count < seen.query.shape[-1] else "first", rotation.layout if count > 1 else "half"
        if way not in errors or error < errors[way][0]:
            errors[way] = error, rotation
    (error, rotation), *others = sorted(errors.values(), key=lambda one: one[0])
    is_exact = torch.finfo(seen.query.dtype).eps < 1e-5
    gap = min((other for other, _ in others), default=float("inf"))
    if error > (EXACT if is_exact else ROUNDED) or (not is_exact and gap < GAP * error):
        why = (
            "no module of the model makes cosines and sines of position ids: its positions are learned, or relative"
            if not rotaries
            else "they are learned, or the frequencies depend on them (dynamic NTK, longrope)"
        )
        raise _refused(
            by, site, f"no rotation explains what a shift of positions does to it (error {error:.1e}); {why}"
        )
    if rotation.share == "none":
        return rotation
    if seen.told is None:
        raise _refused(by, site, "its attention function is not told the positions of its tokens")
    return replace(rotation, told=seen.told)


def _error(one: torch.Tensor, other: torch.Tensor) -> float:
    difference = (one.double() - other.double()).norm()
    return float(difference / other.double().norm().clamp(min=1e-30))


def _is_positions(value: Any, places: torch.Tensor) -> bool:
    """Whether it is the positions of the tokens, along whatever axes."""
    return (
        _is_integers(value)
        and value.shape[-1:] == places.shape[-1:]
        and bool((value.to(places.device) == places[0]).all())
    )


def _is_integers(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)


def _is_table(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _refused(by: str, site: AttentionSite, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"{by} must know how {site.module_class} ({site.name}) rotates queries and keys, and that was not found: "
        f"{reason}."
    )
