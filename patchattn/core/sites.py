"""Attention sites: where a model attends, and with what geometry. The host of the model finds them."""

from dataclasses import dataclass
from typing import Any

_SIZES = {
    "query_heads": "number of query heads",
    "kv_heads": "number of kv heads",
    "head_dim": "head dimension",
    "input_size": "input width",
    "memory_size": "width of what keys and values are made of",
}


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a model: plain data, without a reference to the module.

    Attributes:
        name: dotted path inside the model.
        tower: path of the stack of layers it belongs to (`""` for a bare decoder such as GPT2Model).
        layer_index: index of its layer inside the tower, counted from 0.
        layer_count: number of layers up to the last one of the tower that attends.
        module_class: class name of the module.
        is_cross: attends to another sequence than its own.
        query_heads, kv_heads, head_dim: geometry, `None` where tensors and configuration do not tell.
        input_size: width of the module's input, `None` where no projection is recognised.
        memory_size: width of what keys and values are made of; differs from `input_size` in some cross attention.
        projections: role (`query`, `key`, `value`, `fused`, `output`) to child name.
        projection_sizes: role to width of what that projection gives, for those (but `output`) that read the layer's
            input itself, or the other sequence of cross attention; the second half of a low-rank one does not.
        query_norm: child that normalises the query after its projection, `None` without one.
        input_argument: parameter of `forward` that holds the layer's input.
        memory_argument: parameter of `forward` that holds the other sequence of cross attention, if it has one.
        mask_argument: parameter of `forward` that holds the attention mask, if it has one.
        arguments: positional parameters of `forward`, in order.
        max_positions: length that the model was trained on by its configuration, before any rescaling of its rotary
            embedding, in tokens; `None` where it states none.
        inline: it computes attention in its own code, not by a function that is looked up by name.
        shares_keys: some modules of its class in its tower make no keys of their own, so that others lend them theirs.
    """

    name: str
    tower: str
    layer_index: int
    layer_count: int
    module_class: str
    is_cross: bool
    query_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    input_size: int | None
    memory_size: int | None
    projections: dict[str, str]
    projection_sizes: dict[str, int]
    query_norm: str | None
    input_argument: str
    memory_argument: str | None
    mask_argument: str | None
    arguments: tuple[str, ...]
    max_positions: int | None
    shares_keys: bool = False
    inline: bool = False

    def require(self, fact: str, *, by: str, instead: str | None = None) -> int:
        """A size that a variant cannot do without, such as `query_heads`.

        Args:
            fact: name of the attribute.
            by: who needs it, for the message.
            instead: what the user can do without it, likewise.

        Raises:
            NotImplementedError: neither the tensors nor the configuration of the model tell it.
        """
        value: int | None = getattr(self, fact)
        if value is None:
            advice = f"; {instead}" if instead else ""
            raise NotImplementedError(f"{by} cannot tell the {_SIZES[fact]} of {self.name}{advice}.")
        return value

    def geometry(self) -> dict[str, Any]:
        """What must agree for a patch made on another copy of the model to fit this one."""
        keep = ("query_heads", "kv_heads", "head_dim", "input_size", "is_cross")
        return {key: getattr(self, key) for key in keep}
