"""Attention as a module has written it, read off the calls between its two products, and computed again.

They are recognised by which tensor goes into which call: exactly one softmax, behind exactly one product that reaches
it by sums, factors and views alone. Whatever else is added to the scores is a bias. Anything else is refused. What
variants leave alone is what the module has computed; the rest is computed again from where they changed something.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from patchattn_kernels.rows import seen_by

from .axes import axes_of, layout_of, lead_by_sequence
from .products import CASTS, MOVES, Exchanged, Layout, Product, Step, UnknownPatternError, any_in, tensors_in

_SUMS = ("add", "add_", "sub", "sub_")
_FACTORS = ("mul", "mul_")
_DIVISORS = ("div", "div_")
_MAXIMA = ("max", "maximum")
_LIKENESSES = ("expand_as", "view_as", "reshape_as", "type_as", "to")
_FILLS = ("masked_fill", "masked_fill_")
SOFTMAX = "softmax"


class Pattern:
    """Attention as a module has written it.

    Attributes:
        query, key, value: `(B, H, Tq, D)`, `(B, H or 1, Tk, D)`, `(B, H or 1, Tk, Dv)`; queries are multiplied by what
            their head's scores are, as by a learned temperature.
        scaling: factor of the product of queries and keys.
        mask: `(B or 1, H or 1, Tq or 1, Tk)` which keys are seen, or numbers that say it and are added; `None`: all.
        position_bias: `(B or 1, H, Tq, Tk)` what else is added to the scores, if it differs between heads.
        weights: `(B, H, Tq, Tk)` as values are multiplied by them.
        dropout: rate of it in this call.
        leads_by_sequence: whether the first dimension of queries is that of sequences.

    Raises:
        UnknownPatternError: see the module.
    """

    def __init__(
        self, steps: Sequence[Step], products: Sequence[Product], values: Product, before: Sequence[Step] = ()
    ) -> None:
        self._values = values
        at = _place_of_softmax(steps, values.left)
        self._softmax, self._after = steps[at], _behind(steps[at].result, steps[at + 1 :])
        self._scores: torch.Tensor = next(tensors_in((self._softmax.args, self._softmax.kwargs)))
        paths = [_affine(product, steps[:at], self._scores) for product in products]
        reaching = [path for path in paths if path is not None]
        if len(reaching) != 1:
            raise UnknownPatternError(
                f"{len(reaching)} products reach the softmax by sums, factors and views alone, where one should"
            )
        self._product, self._path, self.scaling, has_bias, self._factor = reaching[0]
        _refuse_other_axis(self._softmax, self._scores, self._product.step.result)
        told, leads = _told(self._product, [*self._path, *self._after], before)
        queries, keys, self._of_product = self._product.layouts(told, of_scores=True)
        self.scores_out, self._of_values, self._output = values.layouts(told, of_scores=False)
        self._of_queries, self._of_keys = queries, keys
        self.query, self.key = queries.read(self._product.left), keys.read(self._product.right)
        if self._factor is not None:
            self.query = self.query * self._factor
        self.value = self._of_values.read(values.right)
        self.weights = self.scores_out.read(values.left)
        shape = self._of_product.read(self._product.step.result).shape
        if self.weights.shape != shape or shape[2:] != (self.query.shape[2], self.key.shape[2]):
            raise UnknownPatternError(f"scores {tuple(shape)} become weights {tuple(self.weights.shape)}")
        self.mask, self.position_bias = _parted(self._bias() if has_bias else None)
        self.dropout = max([_rate(step) for step in self._after], default=0.0)
        self.leads_by_sequence = leads and (queries.order is None or queries.order[0] == 0)

    def base(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        position_bias: torch.Tensor | None,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output `(B, Tq, H, Dv)` and weights of others: as the module has computed it where they are its own."""
        if scaling != self.scaling:
            query = query * (scaling / self.scaling)
        adds_same = mask is self.mask and position_bias is self.position_bias
        if not adds_same or query.shape != self.query.shape or key.shape != self.key.shape:
            return self._plainly(query, key, value, _joined(mask, position_bias, self._scores.dtype))
        weights, native = self.weights, self._values.left
        if query is not self.query or key is not self.key:
            native = self._again(self._of_queries.written(self._without_factor(query)), self._of_keys.written(key))
            weights = self.scores_out.read(native)
        values = self._values.right if value is self.value else self._of_values.written(value)
        return self._output.read(self._values.again(native, values)).transpose(1, 2), weights

    def written(self, output: torch.Tensor) -> torch.Tensor:
        """Output `(B, Tq, H, Dv)` as the product with the values gives it."""
        return self._output.written(output.transpose(1, 2)).contiguous()

    def _without_factor(self, query: torch.Tensor) -> torch.Tensor:
        """Queries of variants as the module's product takes them: to the last bit its own where they are."""
        if self._factor is None:
            return query
        return self._of_queries.read(self._product.left) + (query - self.query) / self._factor

    def _again(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The weights of other queries and keys."""
        exchanged = Exchanged((self._product.step.result, self._product.again(left, right)))
        _replay([*self._path, self._softmax, *self._after], exchanged)
        found: torch.Tensor = exchanged.of(self._values.left)
        return found

    def _bias(self) -> torch.Tensor:
        """`(B or 1, H or 1, Tq, Tk)` the scores, had the product been zero."""
        product, given = self._product, self._product.step.result
        shrinks = given.dim() == 4 and self._of_product.order is None and not any(map(_needs_shape, self._path))
        if product.step.name == "baddbmm":
            zero = product.again(torch.zeros_like(product.left), torch.zeros_like(product.right))
        else:  # what differs between heads, or sequences, then says so by its shape
            zero = torch.zeros_like(given[:1, :1] if shrinks else given)
        exchanged = Exchanged((given, zero))
        _replay(self._path, exchanged)
        found: torch.Tensor = exchanged.of(self._scores)
        return found if shrinks else self._of_product.read(found.reshape(given.shape))

    def _plainly(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, added: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by a formula, for another mask, or other numbers of queries, keys or channels."""
        scores = (query @ _of_heads(key, query).mT).to(self._scores.dtype) * self.scaling
        if added is not None:
            scores = scores + added
        weights: torch.Tensor = self._softmax.again(Exchanged((self._scores, scores)))
        for step in self._after:
            if step.name == "dropout":
                weights = step.again(Exchanged((next(tensors_in(step.args)), weights)))
            elif step.name not in CASTS + MOVES:
                raise UnknownPatternError(f"weights go through {step.name}, which is not known for another mask")
        weights = weights.to(self.weights.dtype)
        return (weights @ _of_heads(value, query)).transpose(1, 2), weights


class ExplicitCall:
    """A call of `scaled_dot_product_attention` by the module itself; attributes as those of `Pattern`."""

    leads_by_sequence = True

    def __init__(self, step: Step) -> None:
        self._step = step
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, step.args, strict=False)), **step.kwargs}
        self.query, self.key, self.value = (given[name] for name in names[:3])
        if not self.query.dim() == self.key.dim() == self.value.dim() == 4:
            raise UnknownPatternError("scaled_dot_product_attention of tensors that have not four dimensions")
        mask: torch.Tensor | None = given.get("attn_mask")
        self.mask, self.position_bias = _parted(mask if mask is None else mask[(None,) * (4 - mask.dim())])
        self.dropout: float = given.get("dropout_p", 0.0)
        self.is_causal: bool = given.get("is_causal", False)
        scale: float | None = given.get("scale")
        self.scaling = self.query.shape[-1] ** -0.5 if scale is None else scale

    def base(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        position_bias: torch.Tensor | None,
        scaling: float,
    ) -> tuple[torch.Tensor, None]:
        """Output `(B, Tq, H, Dv)` of other arguments; as the module has called it, with those that it gave."""
        own = ((query, self.query), (key, self.key), (value, self.value))
        adds_same = mask is self.mask and position_bias is self.position_bias
        if adds_same and scaling == self.scaling and all(a is b for a, b in own):
            return self._step.func(*self._step.args, **self._step.kwargs).transpose(1, 2), None
        given: dict[str, Any] = {
            "attn_mask": _joined(mask, position_bias, query.dtype),
            "dropout_p": self.dropout,
            "is_causal": self.is_causal and adds_same and query.shape[2] > 1,  # a changed mask says it all
            "scale": scaling,
        }
        key, value = _of_heads(key, query), _of_heads(value, query)
        return F.scaled_dot_product_attention(query, key, value, **given).transpose(1, 2), None


def _parted(bias: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What is added to the scores as a mask, for all heads, and what differs between them."""
    if bias is None or bias.shape[1] == 1 or not bias.is_floating_point():
        return bias, None
    seen = seen_by(bias).any(1, keepdim=True)
    return seen, bias.masked_fill(~seen, 0.0)


def _joined(mask: torch.Tensor | None, position_bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Both as numbers that are added to the scores."""
    if mask is not None and not mask.is_floating_point():
        mask = torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    if mask is None or position_bias is None:
        return position_bias if mask is None else mask
    return mask + position_bias


def _of_heads(of_kv: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    groups, heads = of_kv.shape[1], query.shape[1]
    return of_kv if groups in (1, heads) else of_kv.repeat_interleave(heads // groups, dim=1)


def _replay(steps: Sequence[Step], exchanged: Exchanged) -> None:
    """Compute steps again, each from what those before it have given."""
    for step in steps:
        again = step.again(exchanged)
        for old, new in zip(tensors_in(step.result), tensors_in(again), strict=True):
            exchanged.take(old, new)


def _reads_shape(step: Step, on_path: Sequence[torch.Tensor], bent: Sequence[torch.Tensor]) -> bool:
    """Whether of what is on the path a step takes nothing but shape and type, as `mask.expand_as(scores)` does."""
    first = list(tensors_in(step.args[:1]))
    return step.name in _LIKENESSES and not any_in(first, [*on_path, *bent])


def _needs_shape(step: Step) -> bool:
    """Whether a step may ask for the shape that a tensor had: a view, or a tensor that is added in place."""
    return step.name in MOVES or (step.name.endswith("_") and len(list(tensors_in((step.args, step.kwargs)))) > 1)


def _behind(start: torch.Tensor, steps: Sequence[Step]) -> list[Step]:
    """The steps that depend on a tensor."""
    known, found = [start], []
    for step in steps:
        if any_in(list(tensors_in((step.args, step.kwargs))), known):
            known += step.results()
            found.append(step)
    return found


def _place_of_softmax(steps: Sequence[Step], weights: torch.Tensor) -> int:
    for place, step in enumerate(steps):
        if step.name == SOFTMAX and _feeds(step, weights, steps[place:]):
            return place
    raise UnknownPatternError("no softmax gives the left side of the product with the values, where weights should be")


def _feeds(softmax: Step, weights: torch.Tensor, steps: Sequence[Step]) -> bool:
    if softmax.result is weights:
        return True
    return any(tensor is weights for step in _behind(softmax.result, steps) for tensor in step.results())


def _refuse_other_axis(softmax: Step, scores: torch.Tensor, product: torch.Tensor) -> None:
    """A softmax of other numbers than the product's rows; one that counts axes from the first is known of four."""
    dim = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    if (dim != -1 and not dim == 3 == scores.dim() - 1) or scores.shape[-1] != product.shape[-1]:
        raise UnknownPatternError(
            f"its softmax is over dimension {dim} of {tuple(scores.shape)}, of a product {tuple(product.shape)}"
        )


def _affine(
    product: Product, steps: Sequence[Step], scores: torch.Tensor
) -> tuple[Product, list[Step], float, bool, torch.Tensor | None] | None:
    """A product, the steps from it to the scores, its factor there, whether something is added on the way, and a factor
    `(B or 1, H, 1, 1)` of heads, if there is one; `None` if it gets there by other steps, or not at all."""
    first = next((place for place, step in enumerate(steps) if step is product.step), None)
    if first is None:
        return None  # it comes behind the softmax
    scaling, has_bias = 1.0, product.step.name == "baddbmm"
    if has_bias:
        scaling = float(product.step.kwargs.get("alpha", 1.0))
    carried: list[torch.Tensor] = [product.step.result]
    bent: list[torch.Tensor] = []
    path = []
    of_heads: torch.Tensor | None = None
    for step in steps[first + 1 :]:
        taken = list(tensors_in((step.args, step.kwargs)))
        on_path = [tensor for tensor in taken if any_in([tensor], carried)]
        if (not on_path and not any_in(taken, bent)) or _reads_shape(step, on_path, bent):
            continue
        is_straight = len(on_path) == 1 and not any_in(taken, bent)
        known = _effect(step, on_path[0]) if is_straight else None
        if known is None and of_heads is None and is_straight:
            of_heads = _factor_of_heads(step, on_path[0], product)
            known = None if of_heads is None else (1.0, False)
        if known is None:
            bent += step.results()
            continue
        scaling, has_bias = scaling * known[0], has_bias or known[1]
        carried += step.results()
        path.append(step)
    is_reached = any_in([scores], carried) and not any_in([scores], bent)
    return (product, path, scaling, has_bias, of_heads) if is_reached else None


def _effect(step: Step, carried: torch.Tensor) -> tuple[float, bool] | None:
    """The factor that a step puts on what is carried through it, and whether it adds to it; `None` of other steps."""
    result, others = step.result, [each for each in step.args if each is not carried]
    if not isinstance(result, torch.Tensor) or result.numel() != carried.numel():
        return None
    is_first = bool(step.args) and step.args[0] is carried
    if step.name in CASTS + MOVES:
        return (1.0, False) if is_first else None
    if result.shape[-2:] != carried.shape[-2:]:
        return None
    if step.name in _SUMS and not step.kwargs and len(others) == 1:
        return (1.0, True) if is_first or step.name == "add" else None
    if step.name in _FILLS:
        return (1.0, True) if is_first else None
    if step.name == "where":
        return (1.0, True) if not is_first else None
    if step.name in _FACTORS + _DIVISORS and not step.kwargs and len(others) == 1 and is_first:
        factor = _number(others[0])
        return (factor if step.name in _FACTORS else 1.0 / factor, False) if factor is not None else None
    if step.name in _MAXIMA and not step.kwargs and len(others) == 1 and isinstance(others[0], torch.Tensor):
        least = _number(others[0])  # that of the dtype changes no number
        return (1.0, False) if least is not None and least <= torch.finfo(result.dtype).min else None
    return None


def _factor_of_heads(step: Step, carried: torch.Tensor, product: Product) -> torch.Tensor | None:
    """`(B or 1, H, 1, 1)` what a step multiplies the scores of each head by, of a product in four dimensions."""
    others = [each for each in step.args if each is not carried]
    if step.name not in _FACTORS or step.kwargs or len(others) != 1 or not isinstance(others[0], torch.Tensor):
        return None
    factor = others[0][(None,) * max(0, 4 - others[0].dim())]
    is_known = product.letters is None and product.step.result.dim() == carried.dim() == factor.dim() == 4
    fits = is_known and factor.shape[1:] == (carried.shape[1], 1, 1) and factor.shape[0] in (1, carried.shape[0])
    return factor if fits and carried.shape == product.step.result.shape else None


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor):
        return float(value) if value.dim() == 0 and not torch.compiler.is_compiling() else None
    return float(value) if isinstance(value, int | float) else None


def _told(product: Product, behind: Sequence[Step], before: Sequence[Step]) -> tuple[Layout | None, bool]:
    """How the queries of a product lie that has not four dimensions, and whether its sequences are known to be those of
    the first axis of the module's input: as they were made; or as a view of the scores with four tells."""
    size = product.left.shape
    if len(size) == 4 or product.letters is not None:
        return None, True
    axes = axes_of(product.left, before)
    found = layout_of(axes, size)
    if found is not None:
        return found, lead_by_sequence(axes)
    shapes = [step.result.shape for step in behind if isinstance(step.result, torch.Tensor)]
    scores = product.step.result.shape
    heads = next((shape[1] for shape in shapes if len(shape) == 4 and shape[2:] == scores[1:]), None)
    return None if len(size) != 3 or heads is None else Layout(heads), True


def _rate(step: Step) -> float:
    if step.name != "dropout":
        return 0.0
    given = {**dict(zip(("input", "p", "training"), step.args, strict=False)), **step.kwargs}
    return float(given.get("p", 0.5)) if given.get("training", True) else 0.0
